//! Reads tensors from PyTorch's `.pth` and TorchScript's `.pt`: zip archives with a pickle and raw
//! storages.
//!
//! A pickle is a program that may call anything. This reader knows only the instructions for a
//! dictionary of tensors and for TorchScript's modules, which are dictionaries of tensors and
//! modules. It refuses every other instruction and name, and executes nothing. The code of a
//! TorchScript archive is not read at all.

use std::{
    collections::{BTreeMap, HashMap},
    io::Cursor,
};

use half::{bf16, f16};
use zip::{CompressionMethod, ZipArchive};

use super::tensor::{Tensor, Tensors};

/// Limit on the pickle. The pickle of a large network has 200 kB. One of this size takes up to half
/// a gigabyte as values.
const MAX_PICKLE_BYTES: usize = 4 << 20;
/// Limit on the bytes that are read and made, as a multiple of the file's size. A file in f16 is
/// read once and becomes twice its size. A little more lets names share a tensor.
const MAX_FILES_WORTH: usize = 4;
/// Limit on a tensor's axes. The kernel of a convolution over a volume has five.
const MAX_AXES: usize = 8;
/// Limit on the depth of modules within modules. The supported networks have four levels.
const MAX_DEPTH: usize = 16;
/// Limit on the number of modules. A module counts once for each module that holds it. The
/// supported networks have 144.
const MAX_MODULES: usize = 4096;
/// Limit on a tensor's name, bytes.
const MAX_NAME_BYTES: usize = 512;
/// Training checkpoints store the network under one of these keys.
const NESTED: [&str; 4] = ["state_dict", "model", "teacher", "ema"];

type Archive<'a> = ZipArchive<Cursor<&'a [u8]>>;

/// All tensors of the dictionary or the module in the file, by name.
pub(super) fn tensors(bytes: &[u8]) -> Result<Tensors, String> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| format!("its zip: {e}"))?;
    let description = archive.file_names().find(|name| name.ends_with("/data.pkl"));
    let description = description
        .map(str::to_owned)
        .ok_or("it holds no data.pkl; save it again with PyTorch 1.6 or newer")?;
    let folder = description.trim_end_matches("data.pkl").to_owned();

    let pickle = entry(&mut archive, bytes, &description)?;
    if pickle.len() > MAX_PICKLE_BYTES {
        let found = pickle.len();
        return Err(format!(
            "its description has {found} bytes, at most {MAX_PICKLE_BYTES} are read; {SAVE_LESS}"
        ));
    }

    let mut machine = Machine::default();
    let top = machine.run(pickle)?;
    let named = machine.named_tensors(top)?;

    let mut reader = Storages { archive, bytes, folder, read: HashMap::new(), n_bytes_done: 0 };
    let mut tensors = Tensors::new();
    for (name, arguments) in named {
        let view = machine
            .view(arguments)
            .ok_or_else(|| format!("{name} is described wrongly, or has over {MAX_AXES} axes"))?;
        let tensor = reader.tensor(&name, &view)?;
        tensors.insert(name.strip_prefix("backbone.").unwrap_or(&name).to_owned(), tensor);
    }
    Ok(tensors)
}

/// An entry of the archive. PyTorch does not compress entries, so each is a part of the file.
fn entry<'a>(archive: &mut Archive<'a>, bytes: &'a [u8], name: &str) -> Result<&'a [u8], String> {
    let file = archive.by_name(name).map_err(|error| format!("{name}: {error}"))?;
    if file.compression() != CompressionMethod::Stored {
        return Err(format!("{name} is compressed; PyTorch stores its entries as they are"));
    }

    let part = || {
        let start = usize::try_from(file.data_start()?).ok()?;
        bytes.get(start..)?.get(..usize::try_from(file.compressed_size()).ok()?)
    };
    let part = part().ok_or_else(|| format!("{name} reaches beyond the end of the file"))?;

    let (found, needed) = (crc32fast::hash(part), file.crc32());
    if found != needed {
        return Err(format!(
            "{name} has the checksum {found:08x}, {needed:08x} is needed; the file is damaged"
        ));
    }
    Ok(part)
}

/// The number format of a storage.
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

/// The place of a tensor's numbers in a storage.
struct View<'p> {
    key: &'p str,
    number: Number,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

struct Storages<'a> {
    archive: Archive<'a>,
    bytes: &'a [u8],
    folder: String,
    read: HashMap<&'a str, &'a [u8]>,
    /// Bytes read and made so far.
    n_bytes_done: usize,
}

impl<'a> Storages<'a> {
    fn tensor(&mut self, name: &str, view: &View<'a>) -> Result<Tensor, String> {
        let storage = self.storage(view.key)?;
        let n_values = view.shape.iter().try_fold(1_usize, |n, &extent| n.checked_mul(extent));
        // A stride of 0 would let a small storage claim a tensor of any size.
        let n_values = n_values
            .filter(|&n| n <= storage.len() / view.number.n_bytes())
            .ok_or_else(|| format!("{name} of shape {:?} exceeds its storage", view.shape))?;
        self.spend(n_values * size_of::<f32>())?;

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

    fn storage(&mut self, key: &'a str) -> Result<&'a [u8], String> {
        if let Some(storage) = self.read.get(key) {
            return Ok(storage);
        }
        let storage = entry(&mut self.archive, self.bytes, &format!("{}data/{key}", self.folder))?;
        self.spend(storage.len())?;
        self.read.insert(key, storage);
        Ok(storage)
    }

    /// Counts bytes against the limit. Entries can overlap and names can share a tensor. So without
    /// a limit, a small file could ask for any amount of work and memory.
    fn spend(&mut self, n_bytes: usize) -> Result<(), String> {
        self.n_bytes_done += n_bytes;
        let (found, most) = (self.n_bytes_done, MAX_FILES_WORTH * self.bytes.len());
        if found > most {
            return Err(format!(
                "its tensors need {found} bytes or more, at most {most} bytes are made of a file \
                 of its size; {SAVE_LESS}"
            ));
        }
        Ok(())
    }
}

impl View<'_> {
    /// Position of a value in the storage, by its row-major index.
    fn place(&self, mut index: usize) -> Option<usize> {
        let mut place = self.offset;
        for (&extent, &stride) in self.shape.iter().zip(&self.strides).rev() {
            place = place.checked_add((index % extent).checked_mul(stride)?)?;
            index /= extent;
        }
        Some(place)
    }
}

/// A value of the pickle. Tuples and dictionaries are indices into the machine's lists, as they are
/// references in Python. So all holders of a dictionary see its later entries, and no nested value
/// is ever copied, printed or dropped.
#[derive(Debug, Clone, Copy)]
enum Value<'p> {
    Number(i64),
    Text(&'p str),
    Tuple(usize),
    Dict(usize),
    /// A module of TorchScript, by its index in the machine's list.
    Module(usize),
    /// A known name that may be called.
    Callable(Callable),
    StorageType(Number),
    Storage(&'p str, Number),
    /// A tensor, by the tuple that describes it.
    Tensor(usize),
    /// A harmless value that no tensor needs.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Callable {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    /// A class of TorchScript. Its instances only hold their state.
    Module,
}

impl Value<'_> {
    fn kind(self) -> &'static str {
        match self {
            Value::Number(_) => "a number",
            Value::Text(_) => "a text",
            Value::Tuple(_) => "a tuple",
            Value::Dict(_) => "a dictionary",
            Value::Module(_) => "a module",
            Value::Callable(_) | Value::StorageType(_) => "a function",
            Value::Storage(..) => "a storage",
            Value::Tensor(_) => "a tensor",
            Value::Other => "a constant",
        }
    }

    fn size(self) -> Option<usize> {
        match self {
            Value::Number(number) => usize::try_from(number).ok(),
            _ => None,
        }
    }
}

/// The pickle machine: a stack, marks on it, a memo, and the lists that values point to. No
/// instruction adds more than a few values. So the memory grows with the pickle, and not with the
/// tensors that it describes.
#[derive(Default)]
struct Machine<'p> {
    stack: Vec<Value<'p>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'p>>,
    tuples: Vec<Vec<Value<'p>>>,
    /// Entries with a text as key. Names of tensors are always texts.
    dicts: Vec<BTreeMap<&'p str, Value<'p>>>,
    /// The dictionary of each module; `None` before the module is built.
    modules: Vec<Option<usize>>,
}

struct Input<'p>(&'p [u8]);

impl<'p> Input<'p> {
    fn take(&mut self, n: usize) -> Result<&'p [u8], String> {
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

    fn text(&mut self, n: usize) -> Result<&'p str, String> {
        std::str::from_utf8(self.take(n)?).map_err(|_| "a name is not UTF-8".to_owned())
    }

    fn line(&mut self) -> Result<&'p str, String> {
        let end = self.0.iter().position(|&byte| byte == b'\n').ok_or("a line without end")?;
        let line = self.text(end)?;
        self.byte()?;
        Ok(line)
    }
}

impl<'p> Machine<'p> {
    fn run(&mut self, pickle: &'p [u8]) -> Result<Value<'p>, String> {
        let mut input = Input(pickle);
        loop {
            let instruction = input.byte()?;
            if instruction == b'.' {
                return self.pop();
            }
            self.step(instruction, &mut input)?;
        }
    }

    /// Executes one instruction, by its letter in Python's pickle.py.
    fn step(&mut self, instruction: u8, input: &mut Input<'p>) -> Result<(), String> {
        match instruction {
            0x80 => drop(input.byte()?),  // PROTO
            0x95 => drop(input.take(8)?), // FRAME
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.stack.push(Value::Other),
            0x88 => self.stack.push(Value::Number(1)),
            0x89 => self.stack.push(Value::Number(0)),
            b'K' => self.stack.push(Value::Number(input.byte()?.into())),
            b'M' => {
                let bytes = input.take(2)?;
                let number = u16::from_le_bytes([bytes[0], bytes[1]]);
                self.stack.push(Value::Number(number.into()));
            }
            b'J' => self.stack.push(Value::Number((input.u32()? as i32).into())),
            0x8a => self.stack.push(Value::Number(long(input)?)), // LONG1
            b'G' => {
                input.take(8)?;
                self.stack.push(Value::Other);
            }
            b'X' => {
                let n = input.u32()? as usize;
                self.stack.push(Value::Text(input.text(n)?));
            }
            0x8c => {
                let n = input.byte()? as usize;
                self.stack.push(Value::Text(input.text(n)?));
            }
            // A list becomes a tuple without items, because no list holds a tensor.
            b')' | b']' => self.push_tuple(Vec::new()),
            b'}' => self.push_dict(),
            0x85..=0x87 => {
                let n = usize::from(instruction - 0x84);
                let from = self.stack.len().checked_sub(n).ok_or(UNDERRUN)?;
                let items = self.stack.drain(from..).collect();
                self.push_tuple(items);
            }
            b't' => {
                let items = self.since_mark()?;
                self.push_tuple(items);
            }
            b'a' => drop(self.pop()?),
            b'e' => drop(self.since_mark()?),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.extend(&[key, value])?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.extend(&items)?;
            }
            b'q' => self.remember(input.byte()?.into())?,
            b'r' => self.remember(input.u32()?)?,
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => self.recall(input.byte()?.into())?,
            b'j' => self.recall(input.u32()?)?,
            b'c' => {
                let (module, name) = (input.line()?, input.line()?);
                self.stack.push(known_name(module, name)?);
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                self.stack.push(known_name(module, name)?);
            }
            b'Q' => self.persistent()?,
            b'R' => self.call()?,
            0x81 => self.make()?, // NEWOBJ
            b'b' => self.build()?,
            other => return Err(format!("its description holds the instruction {other:#04x}")),
        }
        Ok(())
    }

    fn push_tuple(&mut self, items: Vec<Value<'p>>) {
        self.stack.push(Value::Tuple(self.tuples.len()));
        self.tuples.push(items);
    }

    fn push_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(BTreeMap::new());
    }

    fn pop(&mut self) -> Result<Value<'p>, String> {
        self.stack.pop().ok_or_else(|| UNDERRUN.to_owned())
    }

    fn pop_text(&mut self) -> Result<&'p str, String> {
        match self.pop()? {
            Value::Text(text) => Ok(text),
            other => Err(format!("{} stands where a name is needed", other.kind())),
        }
    }

    fn since_mark(&mut self) -> Result<Vec<Value<'p>>, String> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len()).ok_or(UNDERRUN)?;
        Ok(self.stack.drain(mark..).collect())
    }

    /// Puts keys and values into the dictionary on top of the stack.
    fn extend(&mut self, items: &[Value<'p>]) -> Result<(), String> {
        let Some(Value::Dict(index)) = self.stack.last() else {
            return Err("entries stand where no dictionary is".to_owned());
        };
        let entries = items.chunks_exact(2).filter_map(|pair| match pair[0] {
            Value::Text(key) => Some((key, pair[1])),
            _ => None,
        });
        self.dicts[*index].extend(entries);
        Ok(())
    }

    fn remember(&mut self, slot: u32) -> Result<(), String> {
        self.memo.insert(slot, *self.stack.last().ok_or(UNDERRUN)?);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<(), String> {
        let value = self.memo.get(&slot).ok_or("a value is used before it is made")?;
        self.stack.push(*value);
        Ok(())
    }

    /// `('storage', type, key, device, size)`.
    fn persistent(&mut self) -> Result<(), String> {
        let Value::Tuple(index) = self.pop()? else { return Err(NO_STORAGE.to_owned()) };
        match self.tuples[index][..] {
            [Value::Text("storage"), Value::StorageType(number), Value::Text(key), ..] => {
                self.stack.push(Value::Storage(key, number));
                Ok(())
            }
            _ => Err(NO_STORAGE.to_owned()),
        }
    }

    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Value::Callable(callable), Value::Tuple(arguments)) = (function, arguments) else {
            return Err("something is called that is no function".to_owned());
        };
        match callable {
            Callable::OrderedDict => self.push_dict(),
            Callable::RebuildParameter => {
                let tensor =
                    self.tuples[arguments].first().ok_or("a parameter without a tensor")?;
                self.stack.push(*tensor);
            }
            Callable::RebuildTensor => self.stack.push(Value::Tensor(arguments)),
            Callable::Module => return Err("a module's class is called".to_owned()),
        }
        Ok(())
    }

    /// Makes an instance from a class and a tuple of arguments.
    fn make(&mut self) -> Result<(), String> {
        let (arguments, class) = (self.pop()?, self.pop()?);
        let (Value::Callable(Callable::Module), Value::Tuple(_)) = (class, arguments) else {
            return Err("an instance is made of something other than a module's class".to_owned());
        };
        self.stack.push(Value::Module(self.modules.len()));
        self.modules.push(None);
        Ok(())
    }

    /// Sets the state of the value on top of the stack.
    fn build(&mut self) -> Result<(), String> {
        let state = self.pop()?;
        match (self.stack.last(), state) {
            (Some(&Value::Module(module)), Value::Dict(state)) => {
                self.modules[module] = Some(state);
                Ok(())
            }
            (Some(Value::Module(_)), other) => {
                Err(format!("a module is built with {}; a dictionary is needed", other.kind()))
            }
            // The state of an OrderedDict is only metadata.
            _ => Ok(()),
        }
    }

    /// Names and arguments of the tensors of a dictionary or a module.
    fn named_tensors(&self, top: Value<'p>) -> Result<Vec<(String, usize)>, String> {
        let mut named = Vec::new();
        if let Value::Module(module) = top {
            self.collect(module, "", MAX_DEPTH, &mut 0, &mut named)?;
            return Ok(named);
        }

        let top = self.dictionary(top).ok_or("it holds no dictionary of tensors")?;
        let nested = NESTED.iter().find_map(|&key| self.dictionary(*top.get(key)?));
        for (name, value) in nested.unwrap_or(top) {
            if let Value::Tensor(arguments) = *value {
                named.push(((*name).to_owned(), arguments));
            }
        }
        Ok(named)
    }

    /// The tensors of a module and of the modules within it, under names joined by dots.
    ///
    /// Modules can hold one another, and themselves. So without limits, a small file could ask for
    /// any amount of work.
    fn collect(
        &self,
        module: usize,
        prefix: &str,
        depth_left: usize,
        n_modules: &mut usize,
        named: &mut Vec<(String, usize)>,
    ) -> Result<(), String> {
        *n_modules += 1;
        if depth_left == 0 || *n_modules > MAX_MODULES {
            return Err(format!(
                "its modules are more than {MAX_MODULES}, or lie more than {MAX_DEPTH} deep"
            ));
        }

        let entries = self.modules[module].into_iter().flat_map(|state| &self.dicts[state]);
        for (key, value) in entries {
            let is_named = matches!(value, Value::Tensor(_) | Value::Module(_));
            if is_named && prefix.len() + key.len() >= MAX_NAME_BYTES {
                return Err(format!("a name has over {MAX_NAME_BYTES} bytes"));
            }
            match *value {
                Value::Tensor(arguments) => named.push((format!("{prefix}{key}"), arguments)),
                Value::Module(inner) => {
                    let prefix = format!("{prefix}{key}.");
                    self.collect(inner, &prefix, depth_left - 1, n_modules, named)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn dictionary(&self, value: Value<'p>) -> Option<&BTreeMap<&'p str, Value<'p>>> {
        match value {
            Value::Dict(index) => Some(&self.dicts[index]),
            _ => None,
        }
    }

    /// Arguments of `_rebuild_tensor_v2`: storage, offset, shape, strides, ...
    fn view(&self, arguments: usize) -> Option<View<'p>> {
        let [Value::Storage(key, number), offset, shape, strides, ..] = self.tuples[arguments][..]
        else {
            return None;
        };
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        (shape.len() == strides.len()).then_some(())?;
        Some(View { key, number, offset: offset.size()?, shape, strides })
    }

    fn sizes(&self, value: Value<'p>) -> Option<Vec<usize>> {
        let Value::Tuple(index) = value else { return None };
        // Thousands of tensors can share one tuple, and each would copy it. So its length is
        // limited.
        let sizes = Some(&self.tuples[index]).filter(|sizes| sizes.len() <= MAX_AXES)?;
        sizes.iter().map(|size| size.size()).collect()
    }
}

const SAVE_LESS: &str = "save the network's state_dict() alone, each tensor under one name";
const UNDERRUN: &str = "its description takes a value that does not exist";
const NO_STORAGE: &str = "a reference to something other than a storage";

fn known_name(module: &str, name: &str) -> Result<Value<'static>, String> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Value::Callable(Callable::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2") => Value::Callable(Callable::RebuildTensor),
        ("torch._utils", "_rebuild_parameter") => Value::Callable(Callable::RebuildParameter),
        ("__torch__", _) => Value::Callable(Callable::Module),
        (module, _) if module.starts_with("__torch__.") => Value::Callable(Callable::Module),
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

/// Reads a number of at most eight bytes.
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

    /// An archive like those of `torch.save`.
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

    fn text(text: &str) -> Vec<u8> {
        [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn sizes(sizes: &[u8]) -> Vec<u8> {
        let numbers = sizes.iter().flat_map(|&size| [b'K', size]);
        b"(".iter().copied().chain(numbers).chain(*b"t").collect()
    }

    /// A view of the storage `key` with `shape` and `strides` from `offset`.
    fn tensor(kind: &str, key: &str, offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
        let mut pickle = b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
        pickle.extend([text("storage"), format!("ctorch\n{kind}\n").into()].concat());
        pickle.extend([text(key), text("cpu"), b"K\x06tQ".to_vec()].concat());
        pickle.extend([vec![b'K', offset], sizes(shape), sizes(strides)].concat());
        pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        pickle
    }

    /// An ordered dictionary, with memo 1, of values that are already in the pickle's form.
    fn dictionary(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let entries = entries.iter().flat_map(|(name, value)| [text(name), value.clone()].concat());
        let start = b"ccollections\nOrderedDict\n)Rq\x01(".iter().copied();
        start.chain(entries).chain(*b"u").collect()
    }

    /// The output of `torch.save` for a dictionary.
    fn saved(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
        [b"\x80\x02", &dictionary(entries)[..], b"}b."].concat()
    }

    /// The output of `torch.save({"w": tensor})`.
    fn one_tensor(kind: &str, offset: u8, shape: [u8; 2], strides: [u8; 2]) -> Vec<u8> {
        saved(&[("w", tensor(kind, "0", offset, &shape, &strides))])
    }

    /// One value of a storage.
    fn scalar(key: &str) -> Vec<u8> {
        tensor("FloatStorage", key, 0, &[1], &[1])
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
    fn what_nests_without_end_does_no_harm() {
        let pickle = [b"\x80\x02)", &[0x85; 1_000_000][..], b"."].concat();
        assert!(tensors(&archive(&pickle, &[])).unwrap_err().contains("no dictionary"));
    }

    #[test]
    fn a_value_in_the_place_of_a_name_is_named_by_its_kind_only() {
        // Ten levels of tuples, each with four times the last one: a million values if printed.
        let tuples = b"(h\x00h\x00h\x00h\x00tq\x00".repeat(10);
        let pickle = [b"\x80\x02)q\x00", &tuples[..], b"\x93."].concat();
        let error = tensors(&archive(&pickle, &[])).unwrap_err();
        let wanted = "a tuple stands where a name is needed";
        assert!(error == wanted, "{} bytes: {error:.80}", error.len());
    }

    #[test]
    fn a_dictionary_that_two_names_hold_is_the_same_for_both() {
        let network = dictionary(&[("w", scalar("0"))]);
        let recalled = b"h\x01".to_vec();
        let entries = [text("model"), network, text("state_dict"), recalled].concat();
        let pickle = [b"\x80\x02}(", &entries[..], b"u."].concat();
        let read = tensors(&archive(&pickle, &[("0", floats(&[1.5]))])).unwrap();
        assert_eq!(read["w"].values, [1.5]);
    }

    #[test]
    fn a_dictionary_that_holds_itself_is_read_once() {
        let pickle = saved(&[("model", b"h\x01".to_vec()), ("w", scalar("0"))]);
        let read = tensors(&archive(&pickle, &[("0", floats(&[1.5]))])).unwrap();
        assert_eq!(read.keys().collect::<Vec<_>>(), ["w"]);
    }

    /// The output of `torch.jit.save` for a module of values that are already in the pickle's form.
    fn module(class: &str, entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let entries = entries.iter().flat_map(|(name, value)| [text(name), value.clone()].concat());
        let start =
            format!("c__torch__{class}\n)\u{81}").chars().map(|c| c as u8).collect::<Vec<_>>();
        start.into_iter().chain(*b"}(").chain(entries).chain(*b"ub").collect()
    }

    fn script(top: Vec<u8>) -> Vec<u8> {
        [b"\x80\x02", &top[..], b"."].concat()
    }

    #[test]
    fn modules_of_torchscript_are_dictionaries_within_dictionaries() {
        let inner = module(
            ".torch.nn.modules.conv\nConv3d",
            &[("training", b"\x89".to_vec()), ("weight", scalar("1")), ("bias", b"N".to_vec())],
        );
        let top = module("\nNet", &[("scale", scalar("0")), ("first", inner)]);
        let storages = [("0", floats(&[0.5])), ("1", floats(&[2.5]))];
        let read = tensors(&archive(&script(top), &storages)).unwrap();
        let found: Vec<_> = read.iter().map(|(name, t)| (&name[..], t.values[0])).collect();
        assert_eq!(found, [("first.weight", 2.5), ("scale", 0.5)]);
    }

    #[test]
    fn modules_are_inert_and_nothing_else_is_made_or_built() {
        let refused = |top: &[u8]| tensors(&archive(&script(top.to_vec()), &[])).unwrap_err();
        assert!(refused(b"cos\nsystem\n)\x81}b").contains("os.system"));
        assert!(refused(b"c__torch___evil\nNet\n)\x81}b").contains("__torch___evil.Net"));
        assert!(refused(b"c__torch__\nNet\n)R").contains("class is called"));
        assert!(refused(b"ccollections\nOrderedDict\n)\x81}b").contains("a module's class"));
        assert!(refused(b"c__torch__\nNet\n)\x81)b").contains("built with a tuple"));
    }

    #[test]
    fn modules_that_hold_themselves_or_one_another_without_end_are_refused() {
        let refused = |top: &[u8]| tensors(&archive(&script(top.to_vec()), &[])).unwrap_err();
        let own = [b"c__torch__\nNet\n)\x81q\x01}", &text("a")[..], b"h\x01sb"].concat();
        assert!(refused(&own).contains("16 deep"));
        // Each of 14 modules holds its predecessor twice.
        let mut twice = b"c__torch__\nNet\n)\x81q\x01".to_vec();
        for _ in 0..14 {
            let entries = [text("a"), b"h\x01".to_vec(), text("b"), b"h\x01".to_vec()].concat();
            twice.extend([b"c__torch__\nNet\n)\x81}(", &entries[..], b"ubq\x01"].concat());
        }
        assert!(refused(&twice).contains("more than 4096"));
        let long = module("\nNet", &[(&"n".repeat(600), scalar("0"))]);
        assert!(refused(&long).contains("512 bytes"));
    }

    #[test]
    fn names_that_share_a_tensor_cannot_multiply_it() {
        let names: Vec<String> = (0..100).map(|n| format!("w{n}")).collect();
        let shared =
            [&tensor("FloatStorage", "0", 0, &[10, 100], &[100, 1])[..], b"q\x02"].concat();
        let value = |n| if n == 0 { shared.clone() } else { b"h\x02".to_vec() };
        let file = |n_names: usize| {
            let names = names[..n_names].iter().map(String::as_str).enumerate();
            let pickle = saved(&names.map(|(n, name)| (name, value(n))).collect::<Vec<_>>());
            archive(&pickle, &[("0", floats(&[0.5; 1000]))])
        };
        assert_eq!(tensors(&file(2)).unwrap().len(), 2);
        let error = tensors(&file(100)).unwrap_err();
        assert!(error.contains(&format!("at most {} bytes", 4 * file(100).len())), "{error}");
    }

    #[test]
    fn entries_of_the_archive_that_overlap_cannot_multiply_it() {
        let keys: Vec<String> = (0..100).map(|n| n.to_string()).collect();
        let entries: Vec<_> = keys.iter().map(|key| (&key[..], scalar(key))).collect();
        let file = archive(&saved(&entries), &[("0", vec![0; 100_000])]);
        let mut zip = ZipWriter::new_append(Cursor::new(file)).unwrap();
        for key in &keys[1..] {
            zip.shallow_copy_file("net/data/0", &format!("net/data/{key}")).unwrap();
        }
        let file = zip.finish().unwrap().into_inner();
        let error = tensors(&file).unwrap_err();
        assert!(error.contains(&format!("at most {} bytes", 4 * file.len())), "{error}");
    }

    #[test]
    fn a_shape_of_many_axes_is_refused() {
        let pickle = saved(&[("w", tensor("FloatStorage", "0", 0, &[1; 9], &[1; 9]))]);
        let error = tensors(&archive(&pickle, &[("0", floats(&[0.0]))])).unwrap_err();
        assert!(error.contains("w is described wrongly"), "{error}");
    }

    #[test]
    fn a_damaged_storage_is_refused() {
        let mut file = archive(&saved(&[("w", scalar("0"))]), &[("0", floats(&[1234.5]))]);
        let value = file.windows(4).position(|bytes| bytes == 1234.5_f32.to_le_bytes()).unwrap();
        file[value] ^= 1;
        assert!(tensors(&file).unwrap_err().to_lowercase().contains("checksum"));
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
        fn a_damaged_module_is_read_or_refused(place in 0_usize..300, value in any::<u8>()) {
            let inner = module("\nInner", &[("weight", scalar("0"))]);
            let mut pickle = script(module("\nNet", &[("first", inner)]));
            let place = place % pickle.len();
            pickle[place] = value;
            tensors(&archive(&pickle, &[("0", floats(&[0.0]))])).ok();
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
