use std::collections::BTreeSet;

use tinyfusion_core::{Error, Result, StateDict};

/// Cuts for good: keeps the blocks `kept` (strictly ascending) of the stack called `prefix`,
/// numbered 0, 1, … in that order, and drops its other blocks; all other keys are unchanged.
/// With 14 of 28 kept, `blocks.27.*` becomes `blocks.13.*`.
///
/// The tensors share storage with the original. A stack of several stages is cut stage by stage, each
/// with its own prefix and its own indices.
pub fn keep_blocks(tensors: &StateDict, prefix: &str, kept: &[usize]) -> Result<StateDict> {
    if kept.is_empty() {
        return Err(Error::usage(format!(
            "no block of `{prefix}` is to be kept; at least one is needed"
        )));
    }
    if let Some(pair) = kept.windows(2).find(|w| w[0] >= w[1]) {
        return Err(Error::usage(format!(
            "kept blocks must ascend, found {} before {}",
            pair[0], pair[1]
        )));
    }
    let present: BTreeSet<usize> = tensors
        .names()
        .filter_map(|name| Some(split(name, prefix)?.0))
        .collect();
    let absent: Vec<usize> = kept
        .iter()
        .copied()
        .filter(|i| !present.contains(i))
        .collect();
    if !absent.is_empty() {
        let found = match (present.first(), present.last()) {
            (Some(first), Some(last)) => format!("{} blocks, {first} to {last}", present.len()),
            _ => "none".into(),
        };
        return Err(Error::usage(format!(
            "no tensors for the blocks {absent:?} of `{prefix}`; there are {found}"
        )));
    }
    Ok(tensors
        .iter()
        .filter_map(|(name, tensor)| {
            let name = match split(name, prefix) {
                None => name.to_string(),
                Some((block, rest)) => {
                    format!("{prefix}.{}.{rest}", kept.binary_search(&block).ok()?)
                }
            };
            Some((name, tensor.clone()))
        })
        .collect())
}

/// The block of the stack called `prefix` that the tensor `name` belongs to, if it belongs to one.
pub fn block_of(name: &str, prefix: &str) -> Option<usize> {
    split(name, prefix).map(|(block, _)| block)
}

/// Block index and inner key of `prefix.index.key`.
fn split<'a>(name: &'a str, prefix: &str) -> Option<(usize, &'a str)> {
    let (index, rest) = name
        .strip_prefix(prefix)?
        .strip_prefix('.')?
        .split_once('.')?;
    Some((block_index(index)?, rest))
}

/// A block number as it is written in keys: digits without sign or leading zeros.
pub(crate) fn block_index(text: &str) -> Option<usize> {
    text.parse().ok().filter(|n: &usize| n.to_string() == text)
}
