//! What the rows were measured with, where it limits what they show.

use std::collections::BTreeMap;

use super::rules::rows;
use crate::results::{Recovery, ResultRow, Results, Spread};
use crate::svg::short;

/// The pattern of the random masks.
fn random_pattern(results: &Results) -> Option<&str> {
    rows(results, "random", Recovery::FineTuning).find_map(|r| r.pattern.as_deref())
}

/// A sentence about a mask of another pattern than the random ones have.
pub(super) fn other_masks(row: &ResultRow, results: &Results) -> Option<String> {
    let (own, random) = (row.pattern.as_deref()?, random_pattern(results)?);
    (own != random).then(|| {
        format!(" The random masks are drawn from {random}, this one from another set, {own}.")
    })
}

/// That the control of some learned masks is one of another pattern.
pub(super) fn patterns(results: &Results) -> Option<String> {
    let random = random_pattern(results)?;
    let mut others: Vec<&str> = rows(results, "learned", Recovery::FineTuning)
        .filter_map(|r| r.pattern.as_deref().filter(|p| *p != random))
        .collect();
    others.dedup();
    let others = (!others.is_empty()).then(|| others.join(" and "))?;
    Some(format!(
        "The random masks are drawn from {random} only. Masks learned with {others} come from another set, so that against \
         them it may be the pattern that wins or loses, and not the learning."
    ))
}

/// What all rows had the same amount of, and what not.
pub(super) fn budget(results: &Results) -> String {
    let steps = "The same budget means the same number of recovery steps and images";
    let ratios: Vec<f64> = results
        .rows
        .iter()
        .filter(|r| r.recovery == Recovery::MaskedKd)
        .filter_map(|kd| Some(recovery(kd)? / recovery(fine_tuned(kd, results)?)?))
        .filter(|x| x.is_finite())
        .collect();
    match Spread::of(&ratios) {
        None => format!("{steps}, not the same time: with a teacher a step also runs the teacher."),
        Some(s) => format!(
            "{steps}, not the same time: a step of masked KD also runs the teacher and took {} times as long as one of \
             fine-tuning ({} to {}, {} pairs of rows).",
            short(s.median),
            short(s.min),
            short(s.max),
            ratios.len()
        ),
    }
}

fn recovery(row: &ResultRow) -> Option<f64> {
    row.stages.get("recovery").map(|c| c.seconds)
}

/// The row of the same mask that was recovered without a teacher.
pub(super) fn fine_tuned<'a>(kd: &ResultRow, results: &'a Results) -> Option<&'a ResultRow> {
    let same_mask = |r: &&ResultRow| {
        r.criterion == kd.criterion && r.pattern == kd.pattern && r.seed == kd.seed
    };
    results
        .rows
        .iter()
        .filter(same_mask)
        .find(|r| r.recovery == Recovery::FineTuning)
}

/// Rows that do the same work are equally fast, but for what else ran on the machine.
const UNEVEN: f64 = 1.1;

/// That the speeds of rows with the same work differ.
pub(super) fn uneven_speeds(results: &Results) -> Option<String> {
    let mut alike: BTreeMap<(usize, u64), Vec<f64>> = BTreeMap::new();
    for row in &results.rows {
        let speeds = alike.entry((row.depth, row.sampling_steps)).or_default();
        speeds.extend(row.images_per_second);
    }
    let said: Vec<String> = alike
        .into_iter()
        .filter_map(|((depth, steps), speeds)| {
            let s = Spread::of(&speeds).filter(|s| s.max > UNEVEN * s.min)?;
            Some(format!(
                "{} to {} images/s with {depth} blocks and {steps} steps",
                short(s.min),
                short(s.max)
            ))
        })
        .collect();
    (!said.is_empty()).then(|| {
        format!(
            "Speeds are uneven, though rows of equal depth and steps do the same work: {}. Something else ran on the machine: \
             smaller differences in speed mean nothing.",
            said.join("; ")
        )
    })
}
