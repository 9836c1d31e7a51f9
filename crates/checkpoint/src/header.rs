//! The header of a safetensors file: what is in it, without its data.

use std::io::Read;
use std::path::Path;

use safetensors::tensor::Metadata as FileMetadata;
use tinyfusion_core::{Error, Result};

use crate::dtype::from_file;
use crate::weight_file::{Entry, WeightFile};
use crate::window::open;

/// The library's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// Reads and checks the header of the file `path`.
pub(crate) fn read(path: &Path) -> Result<WeightFile> {
    let (mut reader, length) = open(path)?;
    let wrong = |what: String| Error::file(path, what);
    let unread = |e: std::io::Error| Error::file(path, format!("could not be read: {e}"));
    if length < 8 {
        return Err(wrong(format!(
            "is not a safetensors file: {length} bytes long, at least 8 are expected"
        )));
    }
    let mut size = [0u8; 8];
    reader.read_exact(&mut size).map_err(unread)?;
    if size.starts_with(b"PK") {
        return Err(wrong(
            "is a zip archive (a .pt or .npz file?); a safetensors file is expected here".into(),
        ));
    }
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER {
        return Err(wrong(format!(
            "is not a safetensors file: its header would have {size} bytes, at most {MAX_HEADER} are allowed"
        )));
    }
    if size > length - 8 {
        return Err(wrong(format!(
            "is truncated, or not a safetensors file: the header should have {size} bytes, {} are there",
            length - 8
        )));
    }
    let mut text = vec![0u8; size as usize];
    reader.read_exact(&mut text).map_err(unread)?;
    let parsed: FileMetadata = serde_json::from_slice(&text).map_err(|e| {
        wrong(format!(
            "is not a safetensors file, or damaged: its header does not parse: {e}"
        ))
    })?;

    let (expected, found) = (parsed.data_len() as u64, length - 8 - size);
    if expected != found {
        let what = if found < expected {
            "is truncated"
        } else {
            "has bytes left over"
        };
        return Err(wrong(format!(
            "{what}: {expected} bytes of tensor data are expected, {found} are there"
        )));
    }
    let data = 8 + size; // where it begins
    let mut entries = Vec::new();
    for name in parsed.offset_keys() {
        let Some(info) = parsed.info(&name) else {
            continue;
        };
        // The library multiplies in order and so lets [0, 2^63, 4] pass; strides would overflow.
        if info
            .shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d.max(1)))
            .is_none()
        {
            return Err(wrong(format!(
                "`{name}` has the impossible shape {:?}",
                info.shape
            )));
        }
        let (start, end) = info.data_offsets;
        entries.push(Entry {
            shape: info.shape.clone(),
            dtype: info.dtype.to_string(),
            kind: from_file(info.dtype),
            bytes: data + start as u64..data + end as u64,
            view: None,
            name,
        });
    }
    let metadata = parsed
        .metadata()
        .iter()
        .flatten()
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    Ok(WeightFile {
        path: path.to_path_buf(),
        length,
        entries,
        metadata,
        others: Vec::new(),
    })
}
