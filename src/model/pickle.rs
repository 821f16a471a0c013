//! Tensors from PyTorch's `.pth`: a zip archive with a pickle and raw storages.
//!
//! A pickle is a program that may call anything. This reader knows only what a dictionary of
//! tensors needs; every other instruction and every other name is refused, nothing is executed.

use std::{
    collections::HashMap,
    io::{Cursor, Read},
    rc::Rc,
};

use half::{bf16, f16};
use zip::{CompressionMethod, ZipArchive};

use super::import::{Tensor, Tensors};

/// The description of the tensors of a large network has 200 kB.
const MAX_PICKLE_BYTES: u64 = 16 << 20;
/// State dictionaries are flat; what nests deeper is meant to harm.
const MAX_DEPTH: u32 = 16;
/// Training checkpoints keep the network under one of these.
const NESTED: [&str; 4] = ["state_dict", "model", "teacher", "ema"];

type Archive<'a> = ZipArchive<Cursor<&'a [u8]>>;

/// All tensors of the dictionary in the file, by name.
pub(super) fn tensors(bytes: &[u8]) -> Result<Tensors, String> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| format!("its zip: {e}"))?;
    let description = archive.file_names().find(|name| name.ends_with("/data.pkl"));
    let description = description
        .map(str::to_owned)
        .ok_or("it holds no data.pkl; save it again with PyTorch 1.6 or newer")?;
    let folder = description.trim_end_matches("data.pkl").to_owned();
    let pickle = entry(&mut archive, &description, MAX_PICKLE_BYTES)?;
    let top = Machine::default().run(&pickle)?;
    let dictionary = NESTED.iter().find_map(|key| top.get(key)).unwrap_or(top);
    let Value::Dict(entries) = &dictionary.value else {
        return Err("it holds no dictionary of tensors".to_owned());
    };
    let max_bytes = bytes.len() as u64;
    let mut reader = Storages { archive, folder, max_bytes, read: HashMap::new() };
    let mut tensors = Tensors::new();
    for (key, value) in entries {
        let (Value::Text(name), Value::Tensor(view)) = (&key.value, &value.value) else {
            continue;
        };
        let name = name.strip_prefix("backbone.").unwrap_or(name);
        tensors.insert(name.to_owned(), reader.tensor(name, view)?);
    }
    Ok(tensors)
}

/// An entry of the archive, at most so large, whatever the archive says about it.
fn entry(archive: &mut Archive<'_>, name: &str, max_bytes: u64) -> Result<Vec<u8>, String> {
    let file = archive.by_name(name).map_err(|error| format!("{name}: {error}"))?;
    if file.compression() != CompressionMethod::Stored {
        return Err(format!("{name} is compressed; PyTorch stores its entries as they are"));
    }
    let mut bytes = Vec::new();
    let n_read = file.take(max_bytes + 1).read_to_end(&mut bytes);
    match n_read.map_err(|error| format!("{name}: {error}"))? as u64 {
        n_read if n_read > max_bytes => Err(format!("{name} has over {max_bytes} bytes")),
        _ => Ok(bytes),
    }
}

/// Numbers in a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    F64,
    F32,
    F16,
    Bf16,
}

impl Number {
    fn n_bytes(self) -> usize {
        match self {
            Number::F64 => 8,
            Number::F32 => 4,
            Number::F16 | Number::Bf16 => 2,
        }
    }

    fn read(self, bytes: &[u8]) -> f32 {
        match self {
            Number::F64 => f64::from_le_bytes(bytes.try_into().expect("eight bytes")) as f32,
            Number::F32 => f32::from_le_bytes(bytes.try_into().expect("four bytes")),
            Number::F16 => f16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32(),
            Number::Bf16 => bf16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32(),
        }
    }
}

/// Where the numbers of a tensor lie in a storage.
#[derive(Debug, Clone)]
struct View {
    key: String,
    number: Number,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

struct Storages<'a> {
    archive: Archive<'a>,
    folder: String,
    /// No entry is larger than the whole file: storages are not compressed.
    max_bytes: u64,
    read: HashMap<String, Rc<Vec<u8>>>,
}

impl Storages<'_> {
    fn tensor(&mut self, name: &str, view: &View) -> Result<Tensor, String> {
        let storage = self.storage(&view.key)?;
        let n_values = view.shape.iter().try_fold(1_usize, |n, &extent| n.checked_mul(extent));
        // A stride of 0 would let a small storage claim a tensor of any size.
        let n_values = n_values
            .filter(|&n| n <= storage.len() / view.number.n_bytes())
            .ok_or_else(|| format!("{name} of shape {:?} exceeds its storage", view.shape))?;
        let mut values = Vec::with_capacity(n_values);
        for index in 0..n_values {
            let place = view.place(index).and_then(|place| {
                let start = place.checked_mul(view.number.n_bytes())?;
                storage.get(start..start.checked_add(view.number.n_bytes())?)
            });
            let bytes = place.ok_or_else(|| format!("{name} reaches beyond its storage"))?;
            values.push(view.number.read(bytes));
        }
        Ok(Tensor { shape: view.shape.clone(), values })
    }

    fn storage(&mut self, key: &str) -> Result<Rc<Vec<u8>>, String> {
        if let Some(storage) = self.read.get(key) {
            return Ok(Rc::clone(storage));
        }
        let name = format!("{}data/{key}", self.folder);
        let storage = Rc::new(entry(&mut self.archive, &name, self.max_bytes)?);
        self.read.insert(key.to_owned(), Rc::clone(&storage));
        Ok(storage)
    }
}

impl View {
    /// Position in the storage of a value by its row-major index.
    fn place(&self, mut index: usize) -> Option<usize> {
        let mut place = self.offset;
        for (&extent, &stride) in self.shape.iter().zip(&self.strides).rev() {
            place = place.checked_add((index % extent).checked_mul(stride)?)?;
            index /= extent;
        }
        Some(place)
    }
}

/// A value of the pickle with the depth of what it holds.
#[derive(Debug)]
struct Node {
    depth: u32,
    value: Value,
}

#[derive(Debug)]
enum Value {
    None,
    Number(i64),
    Text(String),
    Tuple(Vec<Rc<Node>>),
    Dict(Vec<(Rc<Node>, Rc<Node>)>),
    /// A name that may be called, of the few that are known.
    Callable(Callable),
    StorageType(Number),
    Storage(String, Number),
    Tensor(View),
    /// Something harmless that no tensor needs.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Callable {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
}

impl Node {
    fn get(self: &Rc<Self>, key: &str) -> Option<Rc<Self>> {
        let Value::Dict(entries) = &self.value else { return None };
        let is_key = |node: &Node| matches!(&node.value, Value::Text(text) if text == key);
        let found = entries.iter().find(|(name, _)| is_key(name)).map(|(_, value)| value);
        found.filter(|node| matches!(node.value, Value::Dict(_))).cloned()
    }
}

/// The pickle machine: a stack, marks on it, and a memo.
#[derive(Default)]
struct Machine {
    stack: Vec<Rc<Node>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Rc<Node>>,
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        if n > self.0.len() {
            return Err("its description ends early".to_owned());
        }
        let (taken, rest) = self.0.split_at(n);
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn u32(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn text(&mut self, n: usize) -> Result<String, String> {
        String::from_utf8(self.take(n)?.to_vec()).map_err(|_| "a name is not UTF-8".to_owned())
    }

    fn line(&mut self) -> Result<String, String> {
        let end = self.0.iter().position(|&byte| byte == b'\n').ok_or("a line without end")?;
        let line = self.text(end)?;
        self.byte()?;
        Ok(line)
    }
}

impl Machine {
    fn run(mut self, pickle: &[u8]) -> Result<Rc<Node>, String> {
        let mut input = Input(pickle);
        loop {
            let instruction = input.byte()?;
            if instruction == b'.' {
                return self.pop();
            }
            self.step(instruction, &mut input)?;
        }
    }

    /// One instruction, by its letter in Python's pickle.py.
    fn step(&mut self, instruction: u8, input: &mut Input<'_>) -> Result<(), String> {
        match instruction {
            0x80 => drop(input.byte()?),  // PROTO
            0x95 => drop(input.take(8)?), // FRAME
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Number(1))?,
            0x89 => self.push(Value::Number(0))?,
            b'K' => {
                let number = input.byte()?;
                self.push(Value::Number(number.into()))?;
            }
            b'M' => {
                let bytes = input.take(2)?;
                self.push(Value::Number(u16::from_le_bytes([bytes[0], bytes[1]]).into()))?;
            }
            b'J' => {
                let number = input.u32()? as i32;
                self.push(Value::Number(number.into()))?;
            }
            0x8a => {
                let number = long(input)?; // LONG1
                self.push(Value::Number(number))?;
            }
            b'G' => {
                input.take(8)?;
                self.push(Value::Other)?;
            }
            b'X' => {
                let n = input.u32()? as usize;
                let text = input.text(n)?;
                self.push(Value::Text(text))?;
            }
            0x8c => {
                let n = input.byte()? as usize;
                let text = input.text(n)?;
                self.push(Value::Text(text))?;
            }
            b')' => self.push(Value::Tuple(Vec::new()))?,
            b']' => self.push(Value::Tuple(Vec::new()))?,
            b'}' => self.push(Value::Dict(Vec::new()))?,
            0x85..=0x87 => {
                let n = usize::from(instruction - 0x84);
                let from = self.stack.len().checked_sub(n).ok_or(UNDERRUN)?;
                let items = self.stack.split_off(from);
                self.push(Value::Tuple(items))?;
            }
            b't' => {
                let items = self.since_mark()?;
                self.push(Value::Tuple(items))?;
            }
            b'a' => drop(self.pop()?),
            b'e' => drop(self.since_mark()?),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.extend(vec![key, value])?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.extend(items)?;
            }
            b'q' => {
                let slot = input.byte()?;
                self.remember(slot.into())?;
            }
            b'r' => {
                let slot = input.u32()?;
                self.remember(slot)?;
            }
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => {
                let slot = input.byte()?;
                self.recall(slot.into())?;
            }
            b'j' => {
                let slot = input.u32()?;
                self.recall(slot)?;
            }
            b'c' => {
                let (module, name) = (input.line()?, input.line()?);
                self.push(known_name(&module, &name)?)?;
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                self.push(known_name(&module, &name)?)?;
            }
            b'Q' => self.persistent()?,
            b'R' => self.call()?,
            // State of an OrderedDict: its metadata.
            b'b' => drop(self.pop()?),
            other => return Err(format!("its description holds the instruction {other:#04x}")),
        }
        Ok(())
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        let depth = 1 + match &value {
            Value::Tuple(items) => items.iter().map(|item| item.depth).max().unwrap_or(0),
            Value::Dict(entries) => {
                entries.iter().map(|(key, value)| key.depth.max(value.depth)).max().unwrap_or(0)
            }
            _ => 0,
        };
        if depth > MAX_DEPTH {
            return Err(format!("its description nests deeper than {MAX_DEPTH}"));
        }
        self.stack.push(Rc::new(Node { depth, value }));
        Ok(())
    }

    fn pop(&mut self) -> Result<Rc<Node>, String> {
        self.stack.pop().ok_or_else(|| UNDERRUN.to_owned())
    }

    fn pop_text(&mut self) -> Result<String, String> {
        match &self.pop()?.value {
            Value::Text(text) => Ok(text.clone()),
            other => Err(format!("{other:?} stands where a name is needed")),
        }
    }

    fn since_mark(&mut self) -> Result<Vec<Rc<Node>>, String> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len()).ok_or(UNDERRUN)?;
        Ok(self.stack.split_off(mark))
    }

    /// Puts keys and values into the dictionary on top of the stack.
    fn extend(&mut self, items: Vec<Rc<Node>>) -> Result<(), String> {
        let Value::Dict(entries) = unshared(self.pop()?) else {
            return Err("entries stand where no dictionary is".to_owned());
        };
        let mut entries = entries;
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            entries.push((key, value));
        }
        self.push(Value::Dict(entries))
    }

    fn remember(&mut self, slot: u32) -> Result<(), String> {
        let top = self.stack.last().ok_or(UNDERRUN)?;
        self.memo.insert(slot, Rc::clone(top));
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<(), String> {
        let node = self.memo.get(&slot).ok_or("a value is used before it is made")?;
        self.stack.push(Rc::clone(node));
        Ok(())
    }

    /// `('storage', type, key, device, size)`.
    fn persistent(&mut self) -> Result<(), String> {
        let top = self.pop()?;
        let Value::Tuple(parts) = &top.value else { return Err(NO_STORAGE.to_owned()) };
        match parts.iter().map(|part| &part.value).collect::<Vec<_>>()[..] {
            [Value::Text(kind), Value::StorageType(number), Value::Text(key), ..]
                if kind == "storage" =>
            {
                self.push(Value::Storage(key.clone(), *number))
            }
            _ => Err(NO_STORAGE.to_owned()),
        }
    }

    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Value::Callable(callable), Value::Tuple(arguments)) =
            (&function.value, &arguments.value)
        else {
            return Err("something is called that is no function".to_owned());
        };
        match callable {
            Callable::OrderedDict => self.push(Value::Dict(Vec::new())),
            Callable::RebuildParameter => {
                let tensor = arguments.first().ok_or("a parameter without a tensor")?;
                self.stack.push(Rc::clone(tensor));
                Ok(())
            }
            Callable::RebuildTensor => {
                let view = view(arguments).ok_or("a tensor that is described wrongly")?;
                self.push(Value::Tensor(view))
            }
        }
    }
}

const UNDERRUN: &str = "its description takes what is not there";
const NO_STORAGE: &str = "a reference to something other than a storage";

/// The value itself, copied where others hold it too; what it holds stays shared.
fn unshared(node: Rc<Node>) -> Value {
    Rc::try_unwrap(node).map_or_else(
        |shared| match &shared.value {
            Value::Dict(entries) => Value::Dict(entries.clone()),
            _ => Value::Other,
        },
        |node| node.value,
    )
}

fn known_name(module: &str, name: &str) -> Result<Value, String> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Value::Callable(Callable::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2") => Value::Callable(Callable::RebuildTensor),
        ("torch._utils", "_rebuild_parameter") => Value::Callable(Callable::RebuildParameter),
        ("torch", "DoubleStorage") => Value::StorageType(Number::F64),
        ("torch", "FloatStorage") => Value::StorageType(Number::F32),
        ("torch", "HalfStorage") => Value::StorageType(Number::F16),
        ("torch", "BFloat16Storage") => Value::StorageType(Number::Bf16),
        _ => {
            return Err(format!(
                "it names {module}.{name}; only dictionaries of tensors are read, and nothing is \
                 executed; save the state_dict() alone"
            ));
        }
    })
}

/// Arguments of `_rebuild_tensor_v2`: storage, offset, shape, strides, ...
fn view(arguments: &[Rc<Node>]) -> Option<View> {
    let sizes = |node: &Node| match &node.value {
        Value::Tuple(items) => items.iter().map(|item| size(item)).collect::<Option<Vec<usize>>>(),
        _ => None,
    };
    let [storage, offset, shape, strides, ..] = arguments else { return None };
    let Value::Storage(key, number) = &storage.value else { return None };
    let (shape, strides) = (sizes(shape)?, sizes(strides)?);
    (shape.len() == strides.len()).then_some(())?;
    Some(View { key: key.clone(), number: *number, offset: size(offset)?, shape, strides })
}

fn size(node: &Node) -> Option<usize> {
    match node.value {
        Value::Number(number) => usize::try_from(number).ok(),
        _ => None,
    }
}

/// A number of at most eight bytes.
fn long(input: &mut Input<'_>) -> Result<i64, String> {
    let n = usize::from(input.byte()?);
    let bytes = input.take(n)?;
    if n > 8 {
        return Err(format!("a number of {n} bytes"));
    }
    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut whole = [if negative { 0xff } else { 0 }; 8];
    whole[..n].copy_from_slice(bytes);
    Ok(i64::from_le_bytes(whole))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use zip::{ZipWriter, write::SimpleFileOptions};

    /// An archive as `torch.save` writes it.
    fn archive(pickle: &[u8], storages: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        zip.start_file("net/data.pkl", options).unwrap();
        zip.write_all(pickle).unwrap();
        for (key, bytes) in storages {
            zip.start_file(format!("net/data/{key}"), options).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// What `torch.save({"w": tensor})` writes for a view of `shape` with `strides` from `offset`.
    fn one_tensor(kind: &str, offset: u8, shape: [u8; 2], strides: [u8; 2]) -> Vec<u8> {
        let mut pickle =
            b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(X\x01\x00\x00\x00w".to_vec();
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n");
        pickle.extend(kind.as_bytes());
        pickle.extend(b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ");
        pickle.extend([b'K', offset, b'K', shape[0], b'K', shape[1], 0x86]);
        pickle.extend([b'K', strides[0], b'K', strides[1], 0x86]);
        pickle.extend(b"\x89ccollections\nOrderedDict\n)RtRu}b.");
        pickle
    }

    #[test]
    fn a_view_of_a_storage_is_read_by_offset_and_strides() {
        let storage = floats(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let read = |offset, shape, strides| {
            let pickle = one_tensor("FloatStorage", offset, shape, strides);
            tensors(&archive(&pickle, &[("0", storage.clone())]))
                .map(|mut t| t.remove("w").unwrap())
        };
        assert_eq!(read(0, [2, 3], [3, 1]).unwrap().values, [0., 1., 2., 3., 4., 5.]);
        assert_eq!(read(0, [3, 2], [1, 3]).unwrap().values, [0., 3., 1., 4., 2., 5.]);
        assert_eq!(read(2, [1, 2], [2, 1]).unwrap().values, [2., 3.]);
        assert!(read(3, [2, 3], [3, 1]).unwrap_err().contains("beyond its storage"));
        assert!(read(0, [200, 200], [0, 0]).unwrap_err().contains("exceeds its storage"));
    }

    #[test]
    fn half_precision_becomes_single() {
        for (kind, bytes) in [
            ("HalfStorage", [f16::from_f32(1.5).to_le_bytes(), f16::from_f32(-2.0).to_le_bytes()]),
            (
                "BFloat16Storage",
                [bf16::from_f32(1.5).to_le_bytes(), bf16::from_f32(-2.0).to_le_bytes()],
            ),
        ] {
            let pickle = one_tensor(kind, 0, [1, 2], [2, 1]);
            let read = tensors(&archive(&pickle, &[("0", bytes.concat())])).unwrap();
            assert_eq!(read["w"].values, [1.5, -2.0]);
        }
    }

    #[test]
    fn a_pickle_that_would_run_something_is_refused_by_name() {
        let pickle = b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.";
        let error = tensors(&archive(pickle, &[])).unwrap_err();
        assert!(error.contains("os.system") && error.contains("nothing is executed"), "{error}");
    }

    #[test]
    fn what_nests_without_end_is_refused() {
        let mut pickle = b"\x80\x02)".to_vec();
        pickle.extend([0x85; 1000]);
        assert!(tensors(&archive(&pickle, &[])).unwrap_err().contains("nests deeper"));
    }

    #[test]
    fn other_archives_and_missing_storages_are_errors() {
        assert!(tensors(b"PK\x03\x04 and so on").unwrap_err().contains("zip"));
        let pickle = one_tensor("FloatStorage", 0, [1, 2], [2, 1]);
        assert!(tensors(&archive(&pickle, &[])).unwrap_err().contains("net/data/0"));
        assert!(tensors(&archive(b"\x80\x02K\x01.", &[])).unwrap_err().contains("no dictionary"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_value_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            Machine::default().run(&bytes).ok();
        }

        #[test]
        fn a_damaged_description_is_read_or_refused(place in 0_usize..200, value in any::<u8>()) {
            let mut pickle = one_tensor("FloatStorage", 0, [2, 3], [3, 1]);
            let place = place % pickle.len();
            pickle[place] = value;
            tensors(&archive(&pickle, &[("0", floats(&[0.0; 6]))])).ok();
        }
    }
}
