use tinyfusion_core::{Error, Result, StateDict, WidthGroups};

/// Cuts in width for good: of every entry of `groups` keeps those listed at its place in `kept` (strictly ascending) and
/// drops the rows and columns of the others; all other tensors are unchanged and shared with the original.
///
/// # Errors
/// If the two lists differ in length, if nothing is left of a layer, or if a tensor is not of the shape that its groups
/// describe.
pub fn keep_groups(
    tensors: &StateDict,
    groups: &[WidthGroups],
    kept: &[Vec<usize>],
) -> Result<StateDict> {
    if groups.len() != kept.len() {
        return Err(Error::usage(format!(
            "kept groups were given for {} layers, the network has {} that can be narrowed",
            kept.len(),
            groups.len()
        )));
    }
    let mut narrowed = tensors.clone();
    for (groups, kept) in groups.iter().zip(kept) {
        for (name, tensor) in groups.keep(tensors, kept)? {
            narrowed.insert(name, tensor);
        }
    }
    Ok(narrowed)
}
