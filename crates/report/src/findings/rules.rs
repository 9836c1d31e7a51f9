//! The rules by which two rows are compared.

use super::Verdict;
use crate::aggregate::{Spread, control};
use crate::class::{comparable, same_work};
use crate::results::{Recovery, ResultRow, Results};
use crate::svg::short;

/// Two numbers are a tie if they differ by no more than this part of the larger.
const TIE: f64 = 0.01;

/// Lower is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Better,
    Tie,
    Worse,
}

pub(super) fn order(a: f64, b: f64) -> Order {
    if (a - b).abs() <= TIE * a.abs().max(b.abs()) {
        Order::Tie
    } else if a < b {
        Order::Better
    } else {
        Order::Worse
    }
}

/// The answer about a row that has no score: a method that diverges does not win.
pub(super) fn unscored(row: &ResultRow) -> (Verdict, String) {
    let name = &row.name;
    match &row.failed {
        _ if row.diverged() => (Verdict::No, format!("{name} diverged.")),
        Some(f) => (Verdict::Unknown, format!("{name}: `{}` failed.", f.stage)),
        None => (Verdict::Unknown, format!("{name} has no FID.")),
    }
}

/// The row's held-out loss, for people.
pub(super) fn loss(row: &ResultRow) -> String {
    row.held_out_loss.map_or("none".into(), short)
}

/// What a difference between two rows is held against.
#[derive(Clone, Copy)]
enum Noise {
    /// The spread of random masks of the same work: another draw moves the number as far.
    Spread(f64),
    /// There are no such masks: how far another draw would move the number is not known.
    Unknown,
    /// Nothing is drawn on one side.
    Outright,
}

/// Whether row a is better than row b by FID, with the held-out loss beside it.
///
/// The spread of the random masks of the same size and budget is the noise of choosing a mask: a difference between two masks
/// within it is not clear.
pub(super) fn compare(a: &ResultRow, b: &ResultRow, results: &Results) -> (Verdict, String) {
    let alike = control(a, results, comparable).or_else(|| control(a, results, same_work));
    let spread = alike.and_then(|(random, _)| random.fid).map(Spread::width);
    compare_within(a, b, spread.map_or(Noise::Unknown, Noise::Spread))
}

/// As [`compare`] where no mask was chosen on one side, as for the dense teacher: the spread says nothing there.
pub(super) fn compare_outright(a: &ResultRow, b: &ResultRow) -> (Verdict, String) {
    compare_within(a, b, Noise::Outright)
}

fn compare_within(a: &ResultRow, b: &ResultRow, noise: Noise) -> (Verdict, String) {
    let (x, y) = match (a.score(), b.score()) {
        (Some(x), Some(y)) => (x, y),
        (None, _) => return unscored(a),
        // To be better than nothing is no answer.
        (_, None) => return (Verdict::Unknown, unscored(b).1),
    };
    let fids = format!(
        "FID {} for {} against {} for {}",
        short(x),
        a.name,
        short(y),
        b.name
    );
    let unclear = match noise {
        Noise::Spread(s) if (x - y).abs() <= s => Some(format!(
            "by less than the spread of the random masks ({})",
            short(s)
        )),
        Noise::Unknown => Some("without comparable random masks or seeds to tell noise by".into()),
        _ => None,
    };
    let (verdict, text) = match (order(x, y), unclear) {
        (Order::Tie, _) => (Verdict::Unclear, format!("a tie: {fids}")),
        (Order::Better, None) => (Verdict::Yes, fids),
        (Order::Worse, None) => (Verdict::No, fids),
        (Order::Better, Some(but)) => (Verdict::Unclear, format!("better, but {but}: {fids}")),
        (Order::Worse, Some(but)) => (Verdict::Unclear, format!("worse, but {but}: {fids}")),
    };
    (
        verdict,
        format!("{text}; held-out loss {} against {}.", loss(a), loss(b)),
    )
}

/// The rows of a criterion with a recovery.
pub(super) fn rows<'a>(
    results: &'a Results,
    criterion: &'a str,
    recovery: Recovery,
) -> impl Iterator<Item = &'a ResultRow> {
    results
        .rows
        .iter()
        .filter(move |r| r.criterion == criterion && r.recovery == recovery)
}

/// The row of least FID among those that may be judged by it.
pub(super) fn best<'a>(rows: impl Iterator<Item = &'a ResultRow>) -> Option<&'a ResultRow> {
    rows.filter_map(|r| Some((r.score()?, r)))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, row)| row)
}
