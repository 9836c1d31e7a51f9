//! What the rows were measured with, where it limits what they show.

use std::collections::BTreeMap;

use super::rules::rows;
use crate::aggregate::Spread;
use crate::class::{same_mask, same_work};
use crate::results::{Recovery, ResultRow, Results};
use crate::svg::short;

/// A sentence about a mask of another pattern than the random `masks` have that it is compared with.
pub(super) fn other_masks(row: &ResultRow, masks: &[&ResultRow]) -> Option<String> {
    let (own, random) = (row.pattern.as_deref()?, masks.first()?.pattern.as_deref()?);
    (own != random).then(|| {
        format!(" The random masks are drawn from {random}, this one from another set, {own}.")
    })
}

/// That the control of some learned masks is one of another pattern.
pub(super) fn patterns(results: &Results) -> Option<String> {
    let mut random: Vec<&str> = Vec::new();
    for row in rows(results, "random", Recovery::FineTuning) {
        let pattern = row.pattern.as_deref().filter(|p| !random.contains(p));
        random.extend(pattern);
    }
    let mut others: Vec<&str> = Vec::new();
    for row in rows(results, "learned", Recovery::FineTuning) {
        let new = |p: &&str| !random.contains(p) && !others.contains(p);
        let other = row.pattern.as_deref().filter(new);
        others.extend(other);
    }
    let random = (!random.is_empty()).then(|| random.join(" and "))?;
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

/// The row of the same mask that was recovered without a teacher, with the same budget.
pub(super) fn fine_tuned<'a>(kd: &ResultRow, results: &'a Results) -> Option<&'a ResultRow> {
    let tuned =
        |r: &&ResultRow| r.recovery == Recovery::FineTuning && same_mask(kd, r) && same_work(kd, r);
    results.rows.iter().find(tuned)
}

/// Rows that do the same work are equally fast, but for what else ran on the machine.
const UNEVEN: f64 = 1.1;

/// That the speeds of rows with the same work differ.
pub(super) fn uneven_speeds(results: &Results) -> Option<String> {
    let mut alike: BTreeMap<(usize, u64, u64), Vec<f64>> = BTreeMap::new();
    for row in &results.rows {
        let speeds = alike
            .entry((row.depth, row.parameters, row.sampling_steps))
            .or_default();
        speeds.extend(row.images_per_second);
    }
    let said: Vec<String> = alike
        .into_iter()
        .filter_map(|((depth, _, steps), speeds)| {
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
            "Speeds are uneven, though rows of equal size and steps do the same work: {}. Something else ran on the machine: \
             smaller differences in speed mean nothing.",
            said.join("; ")
        )
    })
}
