//! The learned masks against random ones and the oracle, where no seeds allow a test.

use super::Verdict;
use super::measure::other_masks;
use super::rules::{Order, best, compare, loss, order, rows, unscored};
use crate::aggregate::control;
use crate::class::comparable;
use crate::results::{Recovery, ResultRow, Results};
use crate::svg::short;

/// By FID after the same fine-tuning.
pub(super) fn learned_against_median(results: &Results) -> Vec<(Verdict, String)> {
    let answer = |row: &ResultRow| -> Option<(Verdict, String)> {
        let (random, masks) = control(row, results, comparable)?;
        let spread = random.fid?;
        let Some(fid) = row.score() else {
            return Some(unscored(row));
        };
        let numbers = format!(
            "FID {} for {} against a median of {} ({} to {}, {} masks)",
            short(fid),
            row.name,
            short(spread.median),
            short(spread.min),
            short(spread.max),
            random.count
        );
        let (verdict, text) = match order(fid, spread.median) {
            // A tie with the best random mask is no win over it.
            Order::Better if order(fid, spread.min) == Order::Better => (Verdict::Yes, numbers),
            Order::Better if fid < spread.min => (
                Verdict::Unclear,
                format!("better than the median, but a tie with the best random mask: {numbers}"),
            ),
            Order::Better => (
                Verdict::Unclear,
                format!(
                    "better than the median, but inside the spread of the random masks: {numbers}"
                ),
            ),
            Order::Tie => (Verdict::Unclear, format!("a tie: {numbers}")),
            Order::Worse => (
                Verdict::No,
                format!("the learned mask does not win: {numbers}"),
            ),
        };
        let loss = random.held_out_loss.map_or(String::new(), |l| {
            format!(
                "; held-out loss {} against {} ({} to {})",
                loss(row),
                short(l.median),
                short(l.min),
                short(l.max)
            )
        });
        let other = other_masks(row, &masks).unwrap_or_default();
        Some((verdict, format!("{text}{loss}.{other}")))
    };
    rows(results, "learned", Recovery::FineTuning)
        .filter_map(answer)
        .collect()
}

/// How many of the comparable random masks it beats.
pub(super) fn learned_against_every(results: &Results) -> Vec<(Verdict, String)> {
    let answer = |row: &ResultRow| {
        let (_, masks) = control(row, results, comparable)?;
        let best = best(masks.iter().copied())?;
        let random: Vec<f64> = masks.iter().filter_map(|r| r.score()).collect();
        let Some(fid) = row.score() else {
            return Some(unscored(row));
        };
        let beaten = random
            .iter()
            .filter(|r| order(fid, **r) == Order::Better)
            .count();
        let verdict = if beaten == random.len() {
            Verdict::Yes
        } else {
            Verdict::No
        };
        let text = format!(
            "{} (FID {}) beats {beaten} of {}; the best random mask is {} (FID {}).",
            row.name,
            short(fid),
            random.len(),
            best.name,
            best.score().map_or("none".into(), short)
        );
        let other = other_masks(row, &masks).unwrap_or_default();
        Some((verdict, text + &other))
    };
    rows(results, "learned", Recovery::FineTuning)
        .filter_map(answer)
        .collect()
}

/// Every oracle with the learned masks that are comparable with it.
pub(super) fn learned_against_oracle(results: &Results) -> Vec<(Verdict, String)> {
    let mut answers = Vec::new();
    for recovery in [Recovery::FineTuning, Recovery::MaskedKd] {
        for learned in rows(results, "learned", recovery) {
            let oracle = rows(results, "oracle", recovery).find(|o| comparable(learned, o));
            answers.extend(oracle.map(|oracle| compare(learned, oracle, results)));
        }
    }
    answers
}
