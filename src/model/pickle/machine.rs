//! The interpreter of a pickle. It knows only the instructions for dictionaries of tensors.

use std::collections::{BTreeMap, HashMap};

use half::{bf16, f16};

/// Limit on a tensor's axes. The kernel of a convolution over a volume has five.
pub(super) const MAX_AXES: usize = 8;
/// Limit on the depth of modules within modules. The supported networks have four levels.
const MAX_DEPTH: usize = 16;
/// Limit on the number of modules. A module counts once for each module that holds it. The
/// supported networks have 144.
const MAX_MODULES: usize = 4096;
/// Limit on a tensor's name, bytes.
const MAX_NAME_BYTES: usize = 512;
/// Training checkpoints store the network under one of these keys.
const NESTED: [&str; 4] = ["state_dict", "model", "teacher", "ema"];

/// The number format of a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    F64,
    F32,
    F16,
    Bf16,
}

impl Number {
    pub(super) fn n_bytes(self) -> usize {
        match self {
            Number::F64 => 8,
            Number::F32 => 4,
            Number::F16 | Number::Bf16 => 2,
        }
    }

    pub(super) fn read(self, bytes: &[u8]) -> f32 {
        match self {
            Number::F64 => f64::from_le_bytes(bytes.try_into().expect("eight bytes")) as f32,
            Number::F32 => f32::from_le_bytes(bytes.try_into().expect("four bytes")),
            Number::F16 => f16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32(),
            Number::Bf16 => bf16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32(),
        }
    }
}

/// The place of a tensor's numbers in a storage.
pub(super) struct View<'p> {
    pub(super) key: &'p str,
    pub(super) number: Number,
    offset: usize,
    pub(super) shape: Vec<usize>,
    strides: Vec<usize>,
}

impl View<'_> {
    /// Position of a value in the storage, by its row-major index.
    pub(super) fn place(&self, mut index: usize) -> Option<usize> {
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
pub(super) enum Value<'p> {
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
pub(super) enum Callable {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    /// A class of TorchScript. Its instances only hold their state.
    Module,
}

impl Value<'_> {
    pub(super) fn kind(self) -> &'static str {
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

    pub(super) fn size(self) -> Option<usize> {
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
pub(super) struct Machine<'p> {
    stack: Vec<Value<'p>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'p>>,
    tuples: Vec<Vec<Value<'p>>>,
    /// Entries with a text as key. Names of tensors are always texts.
    dicts: Vec<BTreeMap<&'p str, Value<'p>>>,
    /// The dictionary of each module; `None` before the module is built.
    modules: Vec<Option<usize>>,
}

pub(super) struct Input<'p>(&'p [u8]);

impl<'p> Input<'p> {
    pub(super) fn take(&mut self, n: usize) -> Result<&'p [u8], String> {
        if n > self.0.len() {
            return Err("its description ends early".to_owned());
        }
        let (taken, rest) = self.0.split_at(n);
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub(super) fn text(&mut self, n: usize) -> Result<&'p str, String> {
        std::str::from_utf8(self.take(n)?).map_err(|_| "a name is not UTF-8".to_owned())
    }

    pub(super) fn line(&mut self) -> Result<&'p str, String> {
        let end = self.0.iter().position(|&byte| byte == b'\n').ok_or("a line without end")?;
        let line = self.text(end)?;
        self.byte()?;
        Ok(line)
    }
}

impl<'p> Machine<'p> {
    pub(super) fn run(&mut self, pickle: &'p [u8]) -> Result<Value<'p>, String> {
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
    pub(super) fn step(&mut self, instruction: u8, input: &mut Input<'p>) -> Result<(), String> {
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

    pub(super) fn push_tuple(&mut self, items: Vec<Value<'p>>) {
        self.stack.push(Value::Tuple(self.tuples.len()));
        self.tuples.push(items);
    }

    pub(super) fn push_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(BTreeMap::new());
    }

    pub(super) fn pop(&mut self) -> Result<Value<'p>, String> {
        self.stack.pop().ok_or_else(|| UNDERRUN.to_owned())
    }

    pub(super) fn pop_text(&mut self) -> Result<&'p str, String> {
        match self.pop()? {
            Value::Text(text) => Ok(text),
            other => Err(format!("{} stands where a name is needed", other.kind())),
        }
    }

    pub(super) fn since_mark(&mut self) -> Result<Vec<Value<'p>>, String> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len()).ok_or(UNDERRUN)?;
        Ok(self.stack.drain(mark..).collect())
    }

    /// Puts keys and values into the dictionary on top of the stack.
    pub(super) fn extend(&mut self, items: &[Value<'p>]) -> Result<(), String> {
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

    pub(super) fn remember(&mut self, slot: u32) -> Result<(), String> {
        self.memo.insert(slot, *self.stack.last().ok_or(UNDERRUN)?);
        Ok(())
    }

    pub(super) fn recall(&mut self, slot: u32) -> Result<(), String> {
        let value = self.memo.get(&slot).ok_or("a value is used before it is made")?;
        self.stack.push(*value);
        Ok(())
    }

    /// `('storage', type, key, device, size)`.
    pub(super) fn persistent(&mut self) -> Result<(), String> {
        let Value::Tuple(index) = self.pop()? else { return Err(NO_STORAGE.to_owned()) };
        match self.tuples[index][..] {
            [Value::Text("storage"), Value::StorageType(number), Value::Text(key), ..] => {
                self.stack.push(Value::Storage(key, number));
                Ok(())
            }
            _ => Err(NO_STORAGE.to_owned()),
        }
    }

    pub(super) fn call(&mut self) -> Result<(), String> {
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
    pub(super) fn make(&mut self) -> Result<(), String> {
        let (arguments, class) = (self.pop()?, self.pop()?);
        let (Value::Callable(Callable::Module), Value::Tuple(_)) = (class, arguments) else {
            return Err("an instance is made of something other than a module's class".to_owned());
        };
        self.stack.push(Value::Module(self.modules.len()));
        self.modules.push(None);
        Ok(())
    }

    /// Sets the state of the value on top of the stack.
    pub(super) fn build(&mut self) -> Result<(), String> {
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
    pub(super) fn named_tensors(&self, top: Value<'p>) -> Result<Vec<(String, usize)>, String> {
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
    pub(super) fn collect(
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

    pub(super) fn dictionary(&self, value: Value<'p>) -> Option<&BTreeMap<&'p str, Value<'p>>> {
        match value {
            Value::Dict(index) => Some(&self.dicts[index]),
            _ => None,
        }
    }

    /// Arguments of `_rebuild_tensor_v2`: storage, offset, shape, strides, ...
    pub(super) fn view(&self, arguments: usize) -> Option<View<'p>> {
        let [Value::Storage(key, number), offset, shape, strides, ..] = self.tuples[arguments][..]
        else {
            return None;
        };
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        (shape.len() == strides.len()).then_some(())?;
        Some(View { key, number, offset: offset.size()?, shape, strides })
    }

    pub(super) fn sizes(&self, value: Value<'p>) -> Option<Vec<usize>> {
        let Value::Tuple(index) = value else { return None };
        // Thousands of tensors can share one tuple, and each would copy it. So its length is
        // limited.
        let sizes = Some(&self.tuples[index]).filter(|sizes| sizes.len() <= MAX_AXES)?;
        sizes.iter().map(|size| size.size()).collect()
    }
}

pub(super) const UNDERRUN: &str = "its description takes a value that does not exist";
pub(super) const NO_STORAGE: &str = "a reference to something other than a storage";

pub(super) fn known_name(module: &str, name: &str) -> Result<Value<'static>, String> {
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
pub(super) fn long(input: &mut Input<'_>) -> Result<i64, String> {
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
