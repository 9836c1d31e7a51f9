//! The header of numpy's `.npy` format (versions 1.0, 2.0 and 3.0).

use std::io::Read;

/// What goes wrong, for the end of a message.
type Failure = String;

/// Longest header; numpy's own have some hundred bytes.
const LONGEST: usize = 1 << 16;

/// How the numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dtype {
    Bool,
    I8,
    U8,
    I16,
    U16,
    F16,
    F32,
    F64,
    I32,
    I64,
    U32,
    U64,
}

impl Dtype {
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::Bool | Self::I8 | Self::U8 => 1,
            Self::F16 | Self::I16 | Self::U16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }

    /// numpy's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::I8 => "int8",
            Self::U8 => "uint8",
            Self::I16 => "int16",
            Self::U16 => "uint16",
            Self::F16 => "float16",
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::I32 => "int32",
            Self::I64 => "int64",
            Self::U32 => "uint32",
            Self::U64 => "uint64",
        }
    }
}

/// What stands before the numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) dtype: Dtype,
    /// Columns first instead of rows first.
    pub(crate) fortran: bool,
    pub(crate) shape: Vec<usize>,
    /// Its own length in bytes; the numbers follow.
    pub(crate) length: usize,
}

impl Header {
    /// Reads the header from the front of `reader`.
    pub(crate) fn read(reader: &mut impl Read) -> Result<Self, Failure> {
        let mut start = [0u8; 8];
        fill(reader, &mut start)?;
        if &start[..6] != b"\x93NUMPY" {
            return Err("it does not begin like an .npy array".into());
        }
        let (prefix, length) = match start[6] {
            1 => {
                let mut n = [0u8; 2];
                fill(reader, &mut n)?;
                (10, usize::from(u16::from_le_bytes(n)))
            }
            2 | 3 => {
                let mut n = [0u8; 4];
                fill(reader, &mut n)?;
                (12, u32::from_le_bytes(n) as usize)
            }
            version => {
                return Err(format!(
                    "version {version}.{} of .npy, expected 1 to 3",
                    start[7]
                ));
            }
        };
        if length > LONGEST {
            return Err(format!(
                "a header of {length} bytes, expected at most {LONGEST}"
            ));
        }
        let mut text = vec![0u8; length];
        fill(reader, &mut text)?;
        let text = String::from_utf8_lossy(&text);
        Self::parse(text.trim(), prefix + length)
    }

    /// `{'descr': '|u1', 'fortran_order': False, 'shape': (6, 16, 12, 3), }`
    fn parse(text: &str, length: usize) -> Result<Self, Failure> {
        let value = |key: &str| {
            let (_, rest) = text.split_once(&format!("'{key}':"))?;
            Some(rest.trim_start())
        };
        let bad = |what: &str| format!("a header without {what}: {}", short(text));
        let descr = value("descr")
            .and_then(|rest| rest.strip_prefix('\'')?.split_once('\''))
            .map(|(descr, _)| descr)
            .ok_or_else(|| bad("a plain descr"))?;
        let dtype = match descr {
            "|u1" | "<u1" | ">u1" | "u1" => Dtype::U8,
            "|b1" => Dtype::Bool,
            "|i1" => Dtype::I8,
            "<i2" => Dtype::I16,
            "<u2" => Dtype::U16,
            "<f2" => Dtype::F16,
            "<f4" => Dtype::F32,
            "<f8" => Dtype::F64,
            "<i4" => Dtype::I32,
            "<i8" => Dtype::I64,
            "<u4" => Dtype::U32,
            "<u8" => Dtype::U64,
            "|O" => {
                return Err(
                    "Python objects (dtype object), which are not unpickled; save plain numbers"
                        .into(),
                );
            }
            other => {
                return Err(format!(
                    "the dtype `{}`, expected uint8, a float or an integer, little-endian",
                    short(other)
                ));
            }
        };
        let fortran = match value("fortran_order") {
            Some(rest) if rest.starts_with("True") => true,
            Some(rest) if rest.starts_with("False") => false,
            _ => return Err(bad("fortran_order")),
        };
        let (shape, _) = value("shape")
            .and_then(|rest| rest.strip_prefix('(')?.split_once(')'))
            .ok_or_else(|| bad("a shape"))?;
        let shape = shape
            .split(',')
            .map(|side| side.trim().trim_end_matches('L'))
            .filter(|side| !side.is_empty())
            .map(|side| {
                side.parse()
                    .map_err(|_| format!("the shape ({})", short(shape)))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            dtype,
            fortran,
            shape,
            length,
        })
    }

    /// Number of values, if it is a number.
    pub(crate) fn count(&self) -> Option<usize> {
        self.shape
            .iter()
            .try_fold(1usize, |n, &side| n.checked_mul(side))
    }

    /// Bytes of the values, which must be what a member of `size` bytes has left.
    pub(crate) fn data_bytes(&self, size: u64) -> Result<usize, Failure> {
        let Self { shape, dtype, .. } = self;
        let bytes = self.count().and_then(|n| n.checked_mul(dtype.bytes()));
        let expected = bytes.and_then(|n| n.checked_add(self.length));
        match bytes.filter(|_| expected.and_then(|n| u64::try_from(n).ok()) == Some(size)) {
            Some(bytes) => Ok(bytes),
            None => Err(format!(
                "the header claims {} {shape:?}, but {} bytes of values are there",
                dtype.name(),
                size.saturating_sub(self.length as u64)
            )),
        }
    }
}

fn fill(reader: &mut impl Read, out: &mut [u8]) -> Result<(), Failure> {
    reader
        .read_exact(out)
        .map_err(|e| format!("the header cannot be read: {e}"))
}

fn short(text: &str) -> String {
    text.chars().take(120).collect()
}
