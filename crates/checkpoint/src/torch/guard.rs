//! Looks a pickle through before candle's reader sees it.
//!
//! candle's reader runs no code, but it trusts lengths (a text of 4 GB is allocated before it is read), copies whatever
//! is put into or taken from the memo, and its values are dropped recursively. Here every instruction is walked once
//! with the *sizes* of the values instead of the values, so that nothing of this can happen afterwards.

use std::collections::HashMap;

/// Deepest nesting of values; a training checkpoint has about 10.
const MAX_DEPTH: u32 = 64;
/// Most instructions; a training checkpoint of DiT-XL has about 100 thousand.
const MAX_STEPS: usize = 1 << 22;
/// Most values that memo and copies may hold together.
const MAX_COPIED: u64 = 1 << 22;

/// What stands for a value: how deep it is nested and of how many parts it is.
#[derive(Clone, Copy)]
struct Size {
    depth: u32,
    parts: u64,
}

const LEAF: Size = Size { depth: 1, parts: 1 };

enum Slot {
    Value(Size),
    Mark,
}

struct Guard<'a> {
    bytes: &'a [u8],
    stack: Vec<Slot>,
    memo: HashMap<u32, Size>,
    copied: u64,
}

/// An error if the pickle is not one that can be read without harm.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let mut guard = Guard {
        bytes,
        stack: Vec::new(),
        memo: HashMap::new(),
        copied: 0,
    };
    for _ in 0..MAX_STEPS {
        if guard.step()? {
            return Ok(());
        }
    }
    Err(format!(
        "has more than {MAX_STEPS} instructions; a weight file needs far fewer"
    ))
}

impl Guard<'_> {
    /// One instruction; whether it was the last.
    fn step(&mut self) -> Result<bool, String> {
        let [op] = self.take()?;
        match op {
            0x80 => {
                let [protocol] = self.take()?;
                if protocol > 3 {
                    return Err(format!(
                        "has protocol {protocol}; 2 is read, which is what torch.save writes by default"
                    ));
                }
            }
            b'.' => {
                self.pop()?;
                return Ok(true);
            }
            b'(' => self.stack.push(Slot::Mark),
            b'N' | 0x88 | 0x89 | b')' | b']' | b'}' => self.push(LEAF)?,
            b'K' => self.leaf::<1>()?,
            b'M' => self.leaf::<2>()?,
            b'J' => self.leaf::<4>()?,
            b'G' => self.leaf::<8>()?,
            0x8a => {
                let [n] = self.take()?;
                if n > 8 {
                    return Err(format!("has an integer of {n} bytes; at most 8 are read"));
                }
                self.skip(n.into())?;
                self.push(LEAF)?;
            }
            b'X' => {
                let n = u32::from_le_bytes(self.take()?);
                self.skip(n as usize)?;
                self.push(LEAF)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                if !is_known(&module, &name) {
                    return Err(format!(
                        "refers to `{module}.{name}`, which no weight file needs and which is not run; load it where \
                         it is trusted and save only the tensors: torch.save(model.state_dict(), …)"
                    ));
                }
                self.push(LEAF)?;
            }
            b'q' => {
                let [at] = self.take()?;
                self.memoize(at.into())?;
            }
            b'r' => {
                let at = u32::from_le_bytes(self.take()?);
                self.memoize(at)?;
            }
            b'h' => {
                let [at] = self.take()?;
                self.recall(at.into())?;
            }
            b'j' => {
                let at = u32::from_le_bytes(self.take()?);
                self.recall(at)?;
            }
            b'Q' => self.join(1)?,
            0x85..=0x87 => self.join(usize::from(op - 0x84))?,
            // A call, a new object, an object's state: two values become one.
            b'R' | 0x81 | b'b' => self.join(2)?,
            // A list's item, a dictionary's entry: into what is there already.
            b'a' => self.put(1)?,
            b's' => self.put(2)?,
            b't' => {
                let items = self.above_mark()?;
                self.push(items)?;
            }
            b'e' | b'u' => {
                let items = self.above_mark()?;
                let container = self.pop()?;
                self.push(merged(container, items))?;
            }
            other => {
                return Err(format!(
                    "has the instruction {other:#04x}, which torch.save does not write"
                ));
            }
        }
        Ok(false)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, rest) = self.bytes.split_first_chunk().ok_or("is cut off")?;
        self.bytes = rest;
        Ok(*head)
    }

    fn skip(&mut self, n: usize) -> Result<(), String> {
        let (_, rest) = self.bytes.split_at_checked(n).ok_or("is cut off")?;
        self.bytes = rest;
        Ok(())
    }

    fn leaf<const N: usize>(&mut self) -> Result<(), String> {
        self.take::<N>()?;
        self.push(LEAF)
    }

    fn line(&mut self) -> Result<String, String> {
        let end = self.bytes.iter().take(256).position(|&b| b == b'\n');
        let end = end.ok_or("has a class without a name")?;
        let line = String::from_utf8_lossy(&self.bytes[..end]).into_owned();
        self.skip(end + 1)?;
        Ok(line)
    }

    fn push(&mut self, size: Size) -> Result<(), String> {
        if size.depth > MAX_DEPTH {
            return Err(format!(
                "is nested more than {MAX_DEPTH} deep; no weight file is"
            ));
        }
        self.stack.push(Slot::Value(size));
        Ok(())
    }

    fn pop(&mut self) -> Result<Size, String> {
        match self.stack.pop() {
            Some(Slot::Value(size)) => Ok(size),
            Some(Slot::Mark) => Err("is damaged: a mark is in the way".into()),
            None => Err("is damaged: its stack is empty".into()),
        }
    }

    /// The last `n` values as one.
    fn join(&mut self, n: usize) -> Result<(), String> {
        let mut all = Size { depth: 0, parts: 0 };
        for _ in 0..n {
            all = merged(all, self.pop()?);
        }
        self.push(deeper(all))
    }

    /// The last `n` values into the container below them, which is no deeper for having many.
    fn put(&mut self, n: usize) -> Result<(), String> {
        let mut items = Size { depth: 0, parts: 0 };
        for _ in 0..n {
            items = merged(items, self.pop()?);
        }
        let container = self.pop()?;
        self.push(merged(container, deeper(items)))
    }

    /// Everything above the last mark as one.
    fn above_mark(&mut self) -> Result<Size, String> {
        let mut all = Size { depth: 0, parts: 0 };
        loop {
            match self.stack.pop() {
                Some(Slot::Value(size)) => all = merged(all, size),
                Some(Slot::Mark) => return Ok(deeper(all)),
                None => return Err("is damaged: no mark is open".into()),
            }
        }
    }

    fn copy(&mut self, size: Size) -> Result<(), String> {
        self.copied = self.copied.saturating_add(size.parts);
        if self.copied > MAX_COPIED {
            return Err("copies its values over and over; no weight file does".into());
        }
        Ok(())
    }

    fn memoize(&mut self, at: u32) -> Result<(), String> {
        let size = self.pop()?;
        self.copy(size)?;
        self.memo.insert(at, size);
        self.push(size)
    }

    fn recall(&mut self, at: u32) -> Result<(), String> {
        let size = *self
            .memo
            .get(&at)
            .ok_or_else(|| format!("is damaged: place {at} of its memo is empty"))?;
        self.copy(size)?;
        self.push(size)
    }
}

fn merged(a: Size, b: Size) -> Size {
    Size {
        depth: a.depth.max(b.depth),
        parts: a.parts.saturating_add(b.parts),
    }
}

fn deeper(size: Size) -> Size {
    Size {
        depth: size.depth + 1,
        parts: size.parts.saturating_add(1),
    }
}

/// Names that checkpoints of training code have: tensors, containers, and the plain values among options. None is ever
/// called or looked up.
fn is_known(module: &str, name: &str) -> bool {
    match module {
        "torch" => {
            name.ends_with("Storage")
                || matches!(name, "Size" | "device" | "Tensor")
                || is_torch_type(name)
        }
        "torch.storage" => name.ends_with("Storage"),
        "torch._utils" => name.starts_with("_rebuild_"),
        "torch._tensor" => name == "_rebuild_from_type_v2",
        "torch.nn.parameter" => name == "Parameter",
        "torch.torch_version" => name == "TorchVersion",
        "collections" => matches!(name, "OrderedDict" | "defaultdict"),
        "argparse" => name == "Namespace",
        "types" => name == "SimpleNamespace",
        "_codecs" => name == "encode",
        "builtins" | "__builtin__" => {
            matches!(
                name,
                "set"
                    | "frozenset"
                    | "list"
                    | "dict"
                    | "int"
                    | "float"
                    | "str"
                    | "bool"
                    | "bytearray"
            )
        }
        "pathlib" | "pathlib._local" => name.ends_with("Path"),
        "numpy" => matches!(name, "dtype" | "ndarray"),
        "numpy.core.multiarray" | "numpy._core.multiarray" => {
            matches!(name, "scalar" | "_reconstruct")
        }
        _ => false,
    }
}

fn is_torch_type(name: &str) -> bool {
    [
        "float", "bfloat", "int", "uint", "bool", "double", "half", "long",
    ]
    .iter()
    .any(|start| {
        name.strip_prefix(start)
            .is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit()))
    })
}
