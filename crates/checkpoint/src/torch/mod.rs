//! PyTorch's weight files (`torch.save` since 1.6): a zip archive of one pickle, which describes tensors, and one
//! uncompressed member for each storage.

mod guard;
mod objects;
mod write;

use std::collections::HashMap;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::path::Path;

use candle_core::pickle::Stack;
use tinyfusion_core::{Error, Result};
use zip::{CompressionMethod, ZipArchive};

use crate::save::Metadata;
use crate::weight_file::{Entry, View, WeightFile};
use crate::window::open;

pub(crate) use write::write_torch;

/// Longest pickle; that of a training checkpoint of DiT-XL has 0.3 MB.
const MAX_PICKLE: u64 = 16 << 20;

/// How a file of this format begins.
pub(crate) const MAGIC: &[u8] = b"PK\x03\x04";

/// Reads what the archive says of its tensors, not the tensors.
pub(crate) fn read(path: &Path) -> Result<WeightFile> {
    let (file, length) = open(path)?;
    let wrong = |what: String| Error::file(path, what);
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| {
        wrong(format!(
            "is a damaged zip archive: {e}; it may be cut off, so load it again"
        ))
    })?;
    let mut pickles: Vec<String> = archive
        .file_names()
        .filter_map(|name| Some(name.ok()?.into_owned()))
        .filter(|name| {
            name.split_once('/')
                .is_some_and(|(_, inner)| inner == "data.pkl")
        })
        .collect();
    let (Some(pickle), true) = (pickles.pop(), pickles.is_empty()) else {
        return Err(wrong(
            "is a zip archive without (one) data.pkl, so not one of torch.save; a .pt or .safetensors file is expected"
                .into(),
        ));
    };
    let folder = pickle.trim_end_matches("data.pkl").to_string();
    let order = format!("{folder}byteorder");
    if archive.index_for_name(&order).is_some()
        && text(path, &mut archive, &order, 16)? != b"little"
    {
        return Err(wrong(
            "has big-endian values; save it again on a little-endian machine".into(),
        ));
    }
    let bytes = text(path, &mut archive, &pickle, MAX_PICKLE)?;
    let in_pickle = |e: String| wrong(format!("its {pickle} {e}"));
    guard::check(&bytes).map_err(in_pickle)?;
    let mut stack = Stack::empty();
    let object = stack
        .read_loop(&mut &*bytes)
        .and_then(|()| stack.finalize())
        .map_err(|e| in_pickle(format!("is damaged: {e}")))?;
    let (described, others) = objects::tensors(&object).map_err(wrong)?;
    drop(object);

    let mut storages: HashMap<String, Range<u64>> = HashMap::new();
    let (mut entries, mut shown) = (Vec::new(), 0u128);
    for tensor in described {
        let member = format!("{folder}data/{}", tensor.storage);
        let bytes = match storages.get(&member) {
            Some(bytes) => bytes.clone(),
            None => {
                let found = range(path, &mut archive, &member, &tensor.name, length)?;
                storages.insert(member.clone(), found.clone());
                found
            }
        };
        if u128::from(bytes.end - bytes.start) != tensor.numel as u128 * tensor.width as u128 {
            return Err(wrong(format!(
                "`{}` {:?}: its storage {member} has {} bytes, expected {} values of {} bytes",
                tensor.name,
                tensor.shape,
                bytes.end - bytes.start,
                tensor.numel,
                tensor.width
            )));
        }
        shown += tensor.shape.iter().product::<usize>() as u128 * tensor.width as u128;
        entries.push(Entry {
            name: tensor.name,
            shape: tensor.shape,
            dtype: tensor.dtype,
            kind: tensor.kind,
            bytes,
            view: Some(View {
                offset: tensor.offset,
                stride: tensor.stride,
            }),
        });
    }
    // Views of one storage are usual (tied weights); tensors of many times the file's size are not.
    if shown > 4 * u128::from(length) + (64 << 20) {
        return Err(wrong(
            "has tensors that are many times larger than the file; no weight file has".into(),
        ));
    }
    let mut names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
        return Err(wrong(format!("has two tensors called `{}`", twice[0])));
    }
    entries.sort_by(|a, b| (a.bytes.start, &a.name).cmp(&(b.bytes.start, &b.name)));
    Ok(WeightFile {
        path: path.to_path_buf(),
        length,
        entries,
        metadata: Metadata::new(),
        others,
    })
}

type Archive = ZipArchive<BufReader<std::fs::File>>;

/// Where an uncompressed member lies in the file.
fn range(
    path: &Path,
    archive: &mut Archive,
    member: &str,
    tensor: &str,
    length: u64,
) -> Result<Range<u64>> {
    let wrong =
        |what: String| Error::file(path, format!("`{tensor}`: its storage {member} {what}"));
    let Some(index) = archive.index_for_name(member) else {
        return Err(wrong("is missing; the file is damaged".into()));
    };
    let file = archive
        .by_index_raw(index)
        .map_err(|e| wrong(format!("is damaged: {e}")))?;
    if file.compression() != CompressionMethod::Stored || file.encrypted() {
        return Err(wrong(
            "is compressed or encrypted, which torch.save never does; save it again with torch.save".into(),
        ));
    }
    let start = file.data_start();
    let end = start.and_then(|start| start.checked_add(file.size()));
    match (start, end) {
        (Some(start), Some(end)) if end <= length && file.size() == file.compressed_size() => {
            Ok(start..end)
        }
        _ => Err(wrong(format!(
            "should have {} bytes, more than the file holds: it is cut off",
            file.size()
        ))),
    }
}

/// An uncompressed member of at most `limit` bytes.
fn text(path: &Path, archive: &mut Archive, member: &str, limit: u64) -> Result<Vec<u8>> {
    let wrong = |what: String| Error::file(path, format!("its {member} {what}"));
    let Some(index) = archive.index_for_name(member) else {
        return Err(wrong("is missing".into()));
    };
    let file = archive
        .by_index_raw(index)
        .map_err(|e| wrong(format!("is damaged: {e}")))?;
    if file.compression() != CompressionMethod::Stored || file.encrypted() {
        return Err(wrong(
            "is compressed or encrypted, which torch.save never does; save it again with torch.save".into(),
        ));
    }
    if file.size() > limit {
        return Err(wrong(format!(
            "has {} bytes, at most {limit} are read",
            file.size()
        )));
    }
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| wrong(format!("could not be read: {e}")))?;
    Ok(bytes)
}
