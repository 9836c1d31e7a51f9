//! Writes what `torch.load` reads, with `weights_only` too: a pickle of protocol 2 and uncompressed storages.

use std::io::{self, Write};

use candle_core::DType;
use tinyfusion_core::StateDict;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::atomic::WriteSeek;
use crate::dtype::DTypePolicy;
use crate::save::write_values;

/// The folder in the archive; `torch.save` takes the file's name for it.
const FOLDER: &str = "archive";
/// Storages begin at multiples of this, so that `torch.load(…, mmap=True)` can use them where they lie.
const ALIGNMENT: u16 = 64;

/// Writes `tensors`, once under each of the `roots` (the values are there once), or plain where there are none.
pub(crate) fn write_torch(
    to: &mut dyn WriteSeek,
    tensors: &StateDict,
    roots: &[&str],
    dtype: DTypePolicy,
) -> io::Result<()> {
    let mut zip = ZipWriter::new(to);
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .with_alignment(ALIGNMENT);
    let mut pickle = Pickle(vec![0x80, 2]);
    if roots.is_empty() {
        pickle.tensors(tensors, dtype)?;
    } else {
        pickle.0.extend(b"}(");
        for root in roots {
            pickle.text(root);
            pickle.tensors(tensors, dtype)?;
        }
        pickle.0.push(b'u');
    }
    pickle.0.push(b'.');
    for (name, content) in [
        ("data.pkl", &pickle.0[..]),
        ("byteorder", &b"little"[..]),
        ("version", &b"3\n"[..]),
    ] {
        zip.start_file(format!("{FOLDER}/{name}"), options)?;
        zip.write_all(content)?;
    }
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        let stored = dtype.apply(tensor.dtype());
        let bytes = tensor.elem_count() * stored.size_in_bytes();
        let is_large = bytes as u64 >= u64::from(u32::MAX);
        zip.start_file(format!("{FOLDER}/data/{i}"), options.large_file(is_large))?;
        write_values(&mut zip, name, tensor, dtype)?;
    }
    zip.finish()?;
    Ok(())
}

/// Instructions of a pickle (`Lib/pickletools.py`).
struct Pickle(Vec<u8>);

impl Pickle {
    /// An ordered dictionary of tensors, whose storages are numbered.
    fn tensors(&mut self, tensors: &StateDict, dtype: DTypePolicy) -> io::Result<()> {
        self.0.extend(b"ccollections\nOrderedDict\n)R(");
        for (i, (name, tensor)) in tensors.iter().enumerate() {
            let stored = dtype.apply(tensor.dtype());
            let class = match stored {
                DType::F64 => "Double",
                DType::F32 => "Float",
                DType::F16 => "Half",
                DType::BF16 => "BFloat16",
                DType::U8 => "Byte",
                DType::I16 => "Short",
                DType::I32 => "Int",
                DType::I64 => "Long",
                other => {
                    return Err(io::Error::other(format!(
                        "`{name}` is {other:?}, which PyTorch does not store; convert it"
                    )));
                }
            };
            self.text(name);
            self.0.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
            self.text("storage");
            self.0
                .extend(format!("ctorch\n{class}Storage\n").as_bytes());
            self.text(&i.to_string());
            self.text("cpu");
            self.number(tensor.elem_count());
            self.0.extend(b"tQ");
            self.number(0);
            self.numbers(tensor.dims());
            self.numbers(&row_major(tensor.dims()));
            // No gradient, no hooks.
            self.0.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        }
        self.0.push(b'u');
        Ok(())
    }

    fn text(&mut self, text: &str) {
        self.0.push(b'X');
        self.0.extend((text.len() as u32).to_le_bytes());
        self.0.extend(text.as_bytes());
    }

    fn number(&mut self, n: usize) {
        match (u8::try_from(n), i32::try_from(n)) {
            (Ok(n), _) => self.0.extend([b'K', n]),
            (_, Ok(n)) => {
                self.0.push(b'J');
                self.0.extend(n.to_le_bytes());
            }
            _ => {
                self.0.extend([0x8a, 8]);
                self.0.extend((n as u64).to_le_bytes());
            }
        }
    }

    fn numbers(&mut self, all: &[usize]) {
        self.0.push(b'(');
        all.iter().for_each(|&n| self.number(n));
        self.0.push(b't');
    }
}

fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut stride = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        stride[i - 1] = stride[i] * shape[i].max(1);
    }
    stride
}
