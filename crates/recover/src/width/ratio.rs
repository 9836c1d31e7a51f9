use tinyfusion_core::{Error, Result, StateDict, WidthGroups};

/// How many of `count` groups are kept when the share `ratio` is removed: (1 − ratio)·count, rounded to the nearest (a
/// half upwards), and at least one.
pub fn kept_count(count: usize, ratio: f64) -> usize {
    let kept = ((1.0 - ratio) * count as f64).round() as usize;
    kept.clamp(1, count.max(1))
}

/// The groups that are kept, ascending, when those of the lowest `scores` are removed: [`kept_count`] of them. Of equal
/// scores the first ones are kept.
///
/// # Errors
/// If `ratio` is not in [0, 1), or a score is not finite.
pub fn kept_groups(scores: &[f64], ratio: f64) -> Result<Vec<usize>> {
    if !(0.0..1.0).contains(&ratio) {
        return Err(Error::usage(format!(
            "the ratio, the share of heads and channels to remove, must be at least 0 and less than 1, found {ratio}"
        )));
    }
    if let Some(at) = scores.iter().position(|s| !s.is_finite()) {
        return Err(Error::run(format!(
            "the importance of group {at} is {}: nothing can be ranked by it",
            scores[at]
        )));
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a])); // stable: equal scores stay in order
    order.truncate(kept_count(scores.len(), ratio));
    order.sort_unstable();
    Ok(order)
}

/// The ratio at which narrowing the network of `weights` leaves it nearest to `parameters` values, among the steps of its
/// widest layer: for
/// comparing width and depth at the same size.
///
/// # Errors
/// If the network has fewer, or keeps more even with one group per layer.
pub fn ratio_for_parameters(
    weights: &StateDict,
    groups: &[WidthGroups],
    parameters: usize,
) -> Result<f64> {
    let sizes = groups
        .iter()
        .map(|g| Ok((g.count, g.values_of_one(weights)?)))
        .collect::<Result<Vec<_>>>()?;
    let left = |ratio: f64| {
        let removed = sizes
            .iter()
            .map(|&(count, values)| (count - kept_count(count, ratio)) * values);
        weights.elem_count() - removed.sum::<usize>()
    };
    // The layer of most groups has the finest steps; k of them are kept.
    let finest = sizes.iter().map(|&(count, _)| count).max().unwrap_or(1);
    let ratio = |k: usize| 1.0 - k as f64 / finest as f64;
    let (least, most) = (left(ratio(1)), left(0.0));
    if !(least..=most).contains(&parameters) {
        return Err(Error::usage(format!(
            "narrowing this model leaves {least} to {most} parameters, for its other layers stay; {parameters} were asked for"
        )));
    }
    // More are left the larger k is: the first k with enough, or the one before it.
    let (mut low, mut high) = (1, finest);
    while low < high {
        let middle = low.midpoint(high);
        if left(ratio(middle)) < parameters {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    let candidates = [low.max(2) - 1, low].map(ratio);
    let off = |ratio: f64| left(ratio).abs_diff(parameters);
    Ok(if off(candidates[0]) < off(candidates[1]) {
        candidates[0]
    } else {
        candidates[1]
    })
}
