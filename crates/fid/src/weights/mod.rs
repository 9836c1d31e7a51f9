//! The network's weights, from the public files: PyTorch's two formats and safetensors.

mod pickle;
mod torch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use half::{bf16, f16};
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};

use crate::hash::{hex, sha256};
use crate::{Error, Result};

/// SHA-256 of the public weight files of this network.
const KNOWN: [(&str, &str); 1] = [(
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "pt_inception-2015-12-05-6726825d.pth (pytorch-fid and torch-fidelity)",
)];

/// The published file has 95.6 MB.
const LARGEST_FILE: u64 = 1 << 30;

/// Counters that PyTorch stores beside a batch normalisation; no part of the function.
const IGNORED: &str = ".num_batches_tracked";

/// How many names a message lists.
const LISTED: usize = 5;

/// Shape and row-major values of a tensor.
pub type Values<T> = (Vec<usize>, Vec<T>);

/// Named tensors of a weight file, in f32.
#[derive(Debug, Clone)]
pub struct Weights {
    source: PathBuf,
    sha256: String,
    content: OnceLock<String>,
    tensors: BTreeMap<String, Values<f32>>,
}

impl Weights {
    /// Reads a `.pth` of `torch.save` (a state dictionary, legacy or zip; no code in it is run) or a `.safetensors`,
    /// told apart by content.
    ///
    /// # Errors
    /// When the file cannot be read, is neither, is damaged, or holds values that are not finite.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed = |message: String| Error::file(path, message);
        let length = std::fs::metadata(path)
            .map_err(|e| failed(format!("cannot be read as a weight file: {e}")))?
            .len();
        if length > LARGEST_FILE {
            return Err(failed(format!(
                "has {length} bytes; Inception's weights have about 96 million"
            )));
        }
        let bytes = std::fs::read(path)
            .map_err(|e| failed(format!("cannot be read as a weight file: {e}")))?;
        Self::parse(&bytes, path)
    }

    /// The same from the content of a file; `source` is its name in messages.
    pub fn parse(bytes: &[u8], source: impl AsRef<Path>) -> Result<Self> {
        let source = source.as_ref();
        let failed = |message: String| Error::file(source, message);
        let entries = entries(bytes).map_err(|e| failed(format!("not a weight file: {e}")))?;
        let mut tensors = BTreeMap::new();
        for (name, entry) in entries {
            if name.ends_with(IGNORED) {
                continue;
            }
            let values = entry
                .floats()
                .map_err(|e| failed(format!("`{name}`: {e}")))?;
            tensors.insert(name, (entry.shape, values));
        }
        let mut weights = Self::from_tensors(tensors, source)?;
        weights.sha256 = sha256(bytes);
        Ok(weights)
    }

    /// Tensors that somebody else has read, by name: shape and row-major values. The hash is empty.
    ///
    /// # Errors
    /// When a shape does not fit its values, or a value is not finite.
    pub fn from_tensors(
        tensors: BTreeMap<String, Values<f32>>,
        source: impl AsRef<Path>,
    ) -> Result<Self> {
        let source = source.as_ref();
        for (name, (shape, values)) in &tensors {
            let count = shape
                .iter()
                .try_fold(1usize, |n, &side| n.checked_mul(side));
            if count != Some(values.len()) {
                let found = values.len();
                return Err(Error::file(
                    source,
                    format!("`{name}` is {shape:?} but has {found} values"),
                ));
            }
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(Error::file(
                    source,
                    format!(
                        "`{name}` {shape:?} holds {} at position {at}; finite values are expected",
                        values[at]
                    ),
                ));
            }
        }
        Ok(Self {
            source: source.to_path_buf(),
            sha256: String::new(),
            content: OnceLock::new(),
            tensors,
        })
    }

    /// SHA-256 of the file, in lower-case hexadecimal; empty if there was none.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// SHA-256 over the tensors themselves, in f32 and sorted by name: the same for the same values in any container.
    ///
    /// Of each tensor: the length of its name in bytes, the name, the number of its sides, the sides (each number as 8
    /// bytes, little-endian), then its values, row-major, 4 bytes each.
    pub fn content_sha256(&self) -> &str {
        self.content.get_or_init(|| {
            let mut hash = Sha256::new();
            for (name, (shape, values)) in &self.tensors {
                hash.update((name.len() as u64).to_le_bytes());
                hash.update(name);
                hash.update((shape.len() as u64).to_le_bytes());
                for &side in shape {
                    hash.update((side as u64).to_le_bytes());
                }
                for values in values.chunks(1 << 12) {
                    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                    hash.update(&bytes);
                }
            }
            hex(hash)
        })
    }

    /// Which public file this is, if it is one.
    pub fn known(&self) -> Option<&'static str> {
        known_weights(&self.sha256)
    }

    /// Names and shapes, sorted by name.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors
            .iter()
            .map(|(name, (shape, _))| (name.as_str(), shape.as_slice()))
    }

    /// The row-major values of the tensor `name`.
    pub fn values(&self, name: &str) -> Result<&[f32]> {
        let found = self.tensors.get(name).map(|(_, values)| values.as_slice());
        found.ok_or_else(|| Error::file(&self.source, format!("has no tensor `{name}`")))
    }

    /// These are all tensors of FID's Inception-v3 and no others, or one error that lists the differences.
    pub fn check_inception(&self) -> Result<()> {
        self.check(&crate::Inception::tensors())
    }

    /// There are exactly the `expected` tensors, or one error that lists the differences; variances are not negative.
    fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        let expected: BTreeMap<&str, &[usize]> = expected
            .iter()
            .map(|(name, shape)| (name.as_str(), shape.as_slice()))
            .collect();
        let (mut missing, mut shaped, mut unexpected) = (Vec::new(), Vec::new(), Vec::new());
        for (name, shape) in &expected {
            match self.tensors.get(*name) {
                None => missing.push((*name).to_owned()),
                Some((found, _)) if found != shape => {
                    shaped.push(format!("{name} is {found:?}, expected {shape:?}"));
                }
                Some(_) => {}
            }
        }
        unexpected.extend(
            self.tensors
                .keys()
                .filter(|name| !expected.contains_key(name.as_str()))
                .cloned(),
        );
        let parts: Vec<String> = [
            ("missing", missing),
            ("mis-shaped", shaped),
            ("unexpected", unexpected),
        ]
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(what, names)| {
            let more = names.len().saturating_sub(LISTED);
            let more = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            format!(
                "{} {what}: {}{more}",
                names.len(),
                names[..names.len().min(LISTED)].join(", ")
            )
        })
        .collect();
        if !parts.is_empty() {
            return Err(Error::file(
                &self.source,
                format!(
                    "not the weights of FID's Inception-v3 ({}); use pt_inception-2015-12-05-6726825d.pth, not those of torchvision or timm",
                    parts.join("; ")
                ),
            ));
        }
        for (name, (_, values)) in &self.tensors {
            if let Some(at) = values
                .iter()
                .position(|&v| v < 0.0 && name.ends_with("running_var"))
            {
                return Err(Error::file(
                    &self.source,
                    format!(
                        "`{name}` holds the variance {} at position {at}",
                        values[at]
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// Which public weight file has this SHA-256, if one has.
pub fn known_weights(sha256: &str) -> Option<&'static str> {
    let found = KNOWN.iter().find(|(known, _)| *known == sha256);
    found.map(|(_, name)| *name)
}

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dtype {
    F16,
    BF16,
    F32,
    F64,
    I64,
}

impl Dtype {
    fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }
}

/// A stored tensor: row-major, little-endian.
#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Entry {
    fn floats(&self) -> std::result::Result<Vec<f32>, String> {
        let data = &self.data;
        Ok(match self.dtype {
            Dtype::F32 => data
                .as_chunks()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
            Dtype::F64 => data
                .as_chunks()
                .0
                .iter()
                .map(|b| f64::from_le_bytes(*b) as f32)
                .collect(),
            Dtype::F16 => data
                .as_chunks()
                .0
                .iter()
                .map(|b| f16::from_le_bytes(*b).to_f32())
                .collect(),
            Dtype::BF16 => data
                .as_chunks()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b).to_f32())
                .collect(),
            Dtype::I64 => return Err("holds integers, expected floating-point numbers".into()),
        })
    }
}

/// Shapes and stored bytes (row-major, little-endian) of every tensor in the content of a weight file, whatever network
/// it belongs to.
pub fn read_tensors(bytes: &[u8]) -> std::result::Result<BTreeMap<String, Values<u8>>, String> {
    let all = entries(bytes)?.into_iter();
    Ok(all
        .map(|(name, entry)| (name, (entry.shape, entry.data)))
        .collect())
}

fn entries(bytes: &[u8]) -> std::result::Result<BTreeMap<String, Entry>, String> {
    match bytes {
        [b'P', b'K', ..] => torch::archive(bytes),
        [0x80, ..] if bytes.get(8) != Some(&b'{') => torch::legacy(bytes),
        [_, _, _, _, _, _, _, _, b'{', ..] => safetensors(bytes),
        _ => Err("it begins like neither a .pth of torch.save nor a .safetensors".into()),
    }
}

fn safetensors(bytes: &[u8]) -> std::result::Result<BTreeMap<String, Entry>, String> {
    let file =
        SafeTensors::deserialize(bytes).map_err(|e| format!("a damaged .safetensors: {e}"))?;
    file.tensors()
        .into_iter()
        .map(|(name, tensor)| {
            let dtype = match tensor.dtype() {
                safetensors::Dtype::F16 => Dtype::F16,
                safetensors::Dtype::BF16 => Dtype::BF16,
                safetensors::Dtype::F32 => Dtype::F32,
                safetensors::Dtype::F64 => Dtype::F64,
                safetensors::Dtype::I64 => Dtype::I64,
                other => {
                    return Err(format!(
                        "`{name}` is stored as {other:?}, expected floating-point numbers"
                    ));
                }
            };
            let entry = Entry {
                dtype,
                shape: tensor.shape().to_vec(),
                data: tensor.data().to_vec(),
            };
            Ok((name, entry))
        })
        .collect()
}
