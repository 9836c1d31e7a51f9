//! Bounds on sizes read from files, so that a hostile or mistyped config is refused before anything is
//! computed, listed or allocated from it.

use tinyfusion_core::{Error, ParamSpec, Result};

/// Most blocks of a network.
const MAX_DEPTH: usize = 4096;
/// Largest width, side, count of channels, heads or classes.
const MAX_SIZE: usize = 1 << 20;
/// Most values in a network: 256 GiB in f32, a hundred times DiT-XL.
const MAX_VALUES: u128 = 1 << 36;

/// Checks that every named size is in 1..=2²⁰ and `depth` in 1..=4096; `what` starts the error.
pub(crate) fn check_sizes(what: &str, depth: usize, sizes: &[(&str, usize)]) -> Result<()> {
    let limits = sizes.iter().map(|&(name, size)| (name, size, MAX_SIZE));
    for (name, size, limit) in limits.chain([("depth", depth, MAX_DEPTH)]) {
        if !(1..=limit).contains(&size) {
            return Err(Error::usage(format!(
                "{what}: {name} is {size}; it must be in 1..={limit}"
            )));
        }
    }
    Ok(())
}

/// Checks that the tensors together are not absurdly large: sizes that are in bounds one by one need not
/// be so multiplied. Call it after [`check_sizes`], which bounds the list.
pub(crate) fn check_values(what: &str, specs: &[ParamSpec]) -> Result<()> {
    // Saturating: four factors of 2⁶⁴ would overflow even u128.
    let values = |spec: &ParamSpec| {
        let factors = spec.shape.iter().map(|&n| n as u128);
        factors.fold(1, u128::saturating_mul)
    };
    let total = specs.iter().map(values).fold(0, u128::saturating_add);
    if total > MAX_VALUES {
        return Err(Error::usage(format!(
            "{what}: the sizes make a network of {total} values; at most {MAX_VALUES} are allowed"
        )));
    }
    Ok(())
}
