//! Cutting in width, the rival that the paper compares depth with: which heads and MLP channels to keep
//! (Diff-Pruning, Fang et al. 2023, arXiv 2305.10924).

mod ratio;
mod taylor;

pub use ratio::{kept_count, kept_groups, ratio_for_parameters};
pub use taylor::{LossThreshold, Taylor, TaylorConfig, taylor};

use tinyfusion_core::{Result, StateDict, StepRng, WidthGroups, stream, values_f64};

/// Scores by size alone, one for each group: √Σw² over all weights of the group.
pub fn magnitude(weights: &StateDict, groups: &[WidthGroups]) -> Result<Vec<Vec<f64>>> {
    let squares = |name: &str| {
        let (mut values, dims) = values_f64(weights.require(name)?)?;
        values.iter_mut().for_each(|v| *v *= *v);
        Ok((values, dims))
    };
    let norms = |groups: &WidthGroups| {
        let sums = groups.sums(squares)?;
        Ok(sums.into_iter().map(f64::sqrt).collect())
    };
    groups.iter().map(norms).collect()
}

/// Scores drawn uniformly from [0, 1): the control.
pub fn random(groups: &[WidthGroups], seed: u64) -> Vec<Vec<f64>> {
    let mut rng = StepRng::new(seed, 0, stream::CRITERION);
    groups.iter().map(|g| rng.uniform(g.count)).collect()
}
