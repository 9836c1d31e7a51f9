//! Python's pickle, as far as PyTorch's weight files use it, and nothing that runs code: a class is a name, and only
//! calls that rebuild a tensor or an ordered dictionary are understood.

use std::rc::Rc;

/// What went wrong, for the end of a message.
pub(super) type Failure = String;

/// A value; containers are numbers into [`Pickle`], so that shared and nested ones cost nothing to copy or drop.
#[derive(Debug, Clone)]
pub(super) enum Value {
    None,
    Bool,
    Int(i128),
    Float,
    Text(Rc<str>),
    /// `module name` of a class or function.
    Global(Rc<str>),
    Tuple(usize),
    List(usize),
    Dict(usize),
    /// What `persistent_load` would have been asked for: a tuple.
    Persistent(usize),
    /// `torch._utils._rebuild_tensor_v2` of a tuple of arguments.
    Tensor(usize),
}

/// The containers that a pickle built.
#[derive(Debug, Default)]
pub(super) struct Pickle {
    pub(super) tuples: Vec<Vec<Value>>,
    pub(super) lists: Vec<Vec<Value>>,
    pub(super) dicts: Vec<Vec<(Value, Value)>>,
}

/// Reads one pickle from the front of `bytes`, which moves behind it.
pub(super) fn read(bytes: &mut &[u8]) -> Result<(Pickle, Value), Failure> {
    let mut machine = Machine {
        bytes,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
        pickle: Pickle::default(),
    };
    loop {
        if let Some(value) = machine.step()? {
            return Ok((machine.pickle, value));
        }
    }
}

/// The stack machine of `Lib/pickle.py`.
struct Machine<'a, 'b> {
    bytes: &'a mut &'b [u8],
    stack: Vec<Value>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: Vec<Option<Value>>,
    pickle: Pickle,
}

impl Machine<'_, '_> {
    /// One instruction; the result at the last.
    fn step(&mut self) -> Result<Option<Value>, Failure> {
        let [op] = self.take()?;
        match op {
            0x80 => {
                let [protocol] = self.take()?;
                if protocol > 5 {
                    return Err(format!("pickle protocol {protocol}, expected at most 5"));
                }
            }
            0x95 => drop(self.take::<8>()?), // FRAME
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            b'J' => {
                let value = i32::from_le_bytes(self.take()?);
                self.stack.push(Value::Int(value.into()));
            }
            b'K' => {
                let value = u8::from_le_bytes(self.take()?);
                self.stack.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.take()?);
                self.stack.push(Value::Int(value.into()));
            }
            0x8a => {
                let [n] = self.take()?;
                let value = integer(self.slice(n.into())?)?;
                self.stack.push(Value::Int(value));
            }
            b'G' => {
                self.take::<8>()?;
                self.stack.push(Value::Float);
            }
            0x8c | b'U' => {
                let [n] = self.take()?;
                self.text(n.into())?;
            }
            b'X' | b'T' => {
                let n = u32::from_le_bytes(self.take()?);
                self.text(n as usize)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack
                    .push(Value::Global(format!("{module} {name}").into()));
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                self.stack
                    .push(Value::Global(format!("{module} {name}").into()));
            }
            b'q' => {
                let [at] = self.take()?;
                self.memoize(at.into())?;
            }
            b'r' => {
                let at = u32::from_le_bytes(self.take()?);
                self.memoize(at as usize)?;
            }
            0x94 => self.memoize(self.memo.len())?,
            b'h' => {
                let [at] = self.take()?;
                self.recall(at.into())?;
            }
            b'j' => {
                let at = u32::from_le_bytes(self.take()?);
                self.recall(at as usize)?;
            }
            b')' => self.tuple(Vec::new()),
            0x85..=0x87 => {
                let n = usize::from(op - 0x84);
                let from = self
                    .stack
                    .len()
                    .checked_sub(n)
                    .ok_or("the stack is empty")?;
                self.above(from)?;
                let items = self.stack.split_off(from);
                self.tuple(items);
            }
            b't' => {
                let items = self.above_mark()?;
                self.tuple(items);
            }
            b']' => {
                self.pickle.lists.push(Vec::new());
                self.stack.push(Value::List(self.pickle.lists.len() - 1));
            }
            b'}' => self.dict(),
            b'a' => {
                let item = self.pop()?;
                self.list()?.push(item);
            }
            b'e' => {
                let mut items = self.above_mark()?;
                self.list()?.append(&mut items);
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.items()?.push((key, value));
            }
            b'u' => {
                let items = self.above_mark()?;
                if items.len() % 2 == 1 {
                    return Err("a key without its value".into());
                }
                let mut items = items.into_iter();
                let mut pairs = Vec::new();
                while let (Some(key), Some(value)) = (items.next(), items.next()) {
                    pairs.push((key, value));
                }
                self.items()?.append(&mut pairs);
            }
            b'Q' => match self.pop()? {
                Value::Tuple(at) => self.stack.push(Value::Persistent(at)),
                other => return Err(format!("the persistent id {other:?}, expected a tuple")),
            },
            b'R' => self.call()?,
            // The state of an object (`_metadata` of a state dictionary): nothing of the weights.
            b'b' => drop(self.pop()?),
            other => {
                return Err(format!(
                    "pickle instruction {other:#04x}, which no weight file needs"
                ));
            }
        }
        Ok(None)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Failure> {
        let (head, rest) = self
            .bytes
            .split_first_chunk()
            .ok_or("the pickle is cut off")?;
        *self.bytes = rest;
        Ok(*head)
    }

    fn slice(&mut self, n: usize) -> Result<&[u8], Failure> {
        let (head, rest) = self
            .bytes
            .split_at_checked(n)
            .ok_or("the pickle is cut off")?;
        *self.bytes = rest;
        Ok(head)
    }

    fn line(&mut self) -> Result<String, Failure> {
        let end = self.bytes.iter().take(256).position(|&b| b == b'\n');
        let line = self.slice(end.ok_or("a class without a name")?)?;
        let line = String::from_utf8_lossy(line).into_owned();
        self.take::<1>()?;
        Ok(line)
    }

    fn text(&mut self, n: usize) -> Result<(), Failure> {
        let text = String::from_utf8_lossy(self.slice(n)?).into();
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, Failure> {
        self.above(
            self.stack
                .len()
                .checked_sub(1)
                .ok_or("the stack is empty")?,
        )?;
        self.stack.pop().ok_or_else(|| "the stack is empty".into())
    }

    fn pop_text(&mut self) -> Result<Rc<str>, Failure> {
        match self.pop()? {
            Value::Text(text) => Ok(text),
            other => Err(format!("{other:?}, expected text")),
        }
    }

    /// Nothing is taken from below an open mark.
    fn above(&self, height: usize) -> Result<(), Failure> {
        match self.marks.last() {
            Some(&mark) if height < mark => Err("a mark is in the way".into()),
            _ => Ok(()),
        }
    }

    fn above_mark(&mut self) -> Result<Vec<Value>, Failure> {
        let mark = self.marks.pop().ok_or("no mark is open")?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, items: Vec<Value>) {
        self.pickle.tuples.push(items);
        self.stack.push(Value::Tuple(self.pickle.tuples.len() - 1));
    }

    fn dict(&mut self) {
        self.pickle.dicts.push(Vec::new());
        self.stack.push(Value::Dict(self.pickle.dicts.len() - 1));
    }

    /// The list on top of the stack.
    fn list(&mut self) -> Result<&mut Vec<Value>, Failure> {
        match self.stack.last() {
            Some(&Value::List(at)) => Ok(&mut self.pickle.lists[at]),
            other => Err(format!("{other:?}, expected a list")),
        }
    }

    /// The dictionary on top of the stack.
    fn items(&mut self) -> Result<&mut Vec<(Value, Value)>, Failure> {
        match self.stack.last() {
            Some(&Value::Dict(at)) => Ok(&mut self.pickle.dicts[at]),
            other => Err(format!("{other:?}, expected a dictionary")),
        }
    }

    fn memoize(&mut self, at: usize) -> Result<(), Failure> {
        let value = self.stack.last().ok_or("the stack is empty")?.clone();
        // Numbers are given out one by one; a jump would only make the table large.
        if at > self.memo.len() + 4096 {
            return Err(format!(
                "place {at} of the memo, expected about {}",
                self.memo.len()
            ));
        }
        if at >= self.memo.len() {
            self.memo.resize(at + 1, None);
        }
        self.memo[at] = Some(value);
        Ok(())
    }

    fn recall(&mut self, at: usize) -> Result<(), Failure> {
        let value = self.memo.get(at).cloned().flatten();
        self.stack
            .push(value.ok_or_else(|| format!("place {at} of the memo is empty"))?);
        Ok(())
    }

    /// A function of a tuple of arguments.
    fn call(&mut self) -> Result<(), Failure> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Value::Tuple(at), Value::Global(function)) = (arguments, function) else {
            return Err("a call of something that is no function".into());
        };
        match &*function {
            "collections OrderedDict" => self.dict(),
            "torch._utils _rebuild_tensor_v2" | "torch._utils _rebuild_tensor" => {
                self.stack.push(Value::Tensor(at));
            }
            "torch._utils _rebuild_parameter" => {
                let data = self.pickle.tuples[at].first().cloned();
                self.stack.push(data.ok_or("a parameter without data")?);
            }
            other => {
                return Err(format!(
                    "a call of `{other}`, which is not run; expected a dictionary of tensors (torch.save of a state_dict)"
                ));
            }
        }
        Ok(())
    }
}

/// Little-endian two's complement of up to 16 bytes.
fn integer(bytes: &[u8]) -> Result<i128, Failure> {
    if bytes.len() > 16 {
        return Err(format!("an integer of {} bytes", bytes.len()));
    }
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut all = [if negative { 0xff } else { 0 }; 16];
    all[..bytes.len()].copy_from_slice(bytes);
    Ok(i128::from_le_bytes(all))
}
