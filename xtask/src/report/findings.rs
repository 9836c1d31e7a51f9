//! What the numbers show, said by fixed rules, so that the report cannot flatter.
//!
//! The rules: two numbers within 1 % are a tie. A difference that is no larger than the whole spread
//! (largest less smallest) of the random masks is named as such and not called a win: another
//! random draw moves the number as far. "Better than random" without reserve means better than every
//! random mask. A speed-up counts only against dense sampling with fewer steps at the same speed.

use super::correlation::rank_correlation;
use super::svg::short;
use crate::reproduce::{Recovery, ResultRow, Results};

/// The word in front of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Yes,
    No,
    Unclear,
    /// There is no number to answer it.
    Unknown,
}

impl Verdict {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Yes => "Yes",
            Self::No => "No",
            Self::Unclear => "Not clear",
            Self::Unknown => "No answer",
        }
    }
}

/// A question and what the numbers say to it.
#[derive(Debug, Clone)]
pub(crate) struct Finding {
    pub(crate) question: &'static str,
    pub(crate) answers: Vec<(Verdict, String)>,
}

/// Two numbers are a tie if they differ by no more than this part of the larger.
const TIE: f64 = 0.01;

/// Every finding, in the report's order.
pub(crate) fn findings(results: &Results) -> Vec<Finding> {
    let all = [
        (
            "Does the learned mask beat the median random mask?",
            learned_against_median(results),
        ),
        (
            "Does it beat every random mask?",
            learned_against_every(results),
        ),
        (
            "Does it beat the oracle (BK-SDM)?",
            learned_against_oracle(results),
        ),
        (
            "Does masked distillation recover better than plain fine-tuning?",
            distillation(results),
        ),
        (
            "Is a pruned model better than the dense one with fewer steps at equal speed?",
            fewer_steps(results),
        ),
        (
            "Does depth matter: is the dense teacher better than the best half?",
            depth(results),
        ),
        (
            "Does the loss before recovery predict the quality after it?",
            calibration(results),
        ),
    ];
    all.into_iter()
        .map(|(question, answers)| Finding {
            question,
            answers: if answers.is_empty() {
                vec![(Verdict::Unknown, "the rows for it are missing.".into())]
            } else {
                answers
            },
        })
        .collect()
}

/// Below this many samples per row the numbers only show that the path works.
const ENOUGH_SAMPLES: u64 = 200;

/// The answer in one sentence.
pub(crate) fn headline(results: &Results) -> String {
    if results.sample_count.is_some_and(|n| n < ENOUGH_SAMPLES) {
        return "This run is too small for its numbers to mean anything: it shows that the path works.".into();
    }
    let verdicts: Vec<Verdict> = learned_against_median(results)
        .into_iter()
        .map(|a| a.0)
        .collect();
    let wins = verdicts.iter().filter(|v| **v == Verdict::Yes).count();
    if verdicts.is_empty() {
        "There are no numbers to compare the learned masks with random ones.".into()
    } else if wins == verdicts.len() {
        "In this run the learned masks recover better than every random mask.".into()
    } else if wins > 0 {
        format!(
            "In this run {wins} of {} learned masks recover better than every random mask; the others do not.",
            verdicts.len()
        )
    } else if verdicts.contains(&Verdict::Unclear) {
        "In this run the learned masks do not clearly win: none is outside the spread of the random masks.".into()
    } else {
        "In this run the learned masks do not win: the median random mask recovers better.".into()
    }
}

/// What every reader has to know before the numbers.
pub(crate) fn caveats(results: &Results) -> Vec<String> {
    let samples = results.sample_count.map_or("few".into(), |n| n.to_string());
    let reference = results
        .reference_count
        .map_or("the".into(), |n| n.to_string());
    let mut list = vec![
        format!(
            "FID, IS, precision, recall and KID are computed on the features of a small classifier ({}), not on Inception: \
             they compare the rows of this report with each other and with nothing else.",
            results.features
        ),
        format!(
            "Each row is one run with one seed, {samples} samples against {reference} reference images. FID is biased upwards with so \
             few samples, equally for every row."
        ),
        "Held-out loss: mean squared error of the predicted noise with the same images, timesteps and noise for every row; \
         it varies less than FID."
            .into(),
        "A difference within 1 % is called a tie, and one within the spread of the random masks is not called a win.".into(),
    ];
    list.extend(
        results
            .warnings
            .iter()
            .map(|w| format!("The evaluator warns: {w}.").replace("..", ".")),
    );
    list
}

/// Lower is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Better,
    Tie,
    Worse,
}

fn order(a: f64, b: f64) -> Order {
    if (a - b).abs() <= TIE * a.abs().max(b.abs()) {
        Order::Tie
    } else if a < b {
        Order::Better
    } else {
        Order::Worse
    }
}

/// Whether row a is better than row b by FID, with the held-out loss beside it.
fn compare(a: &ResultRow, b: &ResultRow, results: &Results) -> (Verdict, String) {
    let (Some(x), Some(y)) = (a.fid, b.fid) else {
        return (
            Verdict::Unknown,
            format!("{} or {} has no FID.", a.name, b.name),
        );
    };
    let spread = results
        .random
        .as_ref()
        .and_then(|r| r.fid)
        .map(|s| s.width());
    let within = spread.filter(|s| (x - y).abs() <= *s);
    let fids = format!(
        "FID {} for {} against {} for {}",
        short(x),
        a.name,
        short(y),
        b.name
    );
    let (verdict, text) = match (order(x, y), within) {
        (Order::Tie, _) => (Verdict::Unclear, format!("a tie: {fids}")),
        (Order::Better, None) => (Verdict::Yes, fids),
        (Order::Worse, None) => (Verdict::No, fids),
        (direction, Some(spread)) => {
            let how = if direction == Order::Better {
                "better"
            } else {
                "worse"
            };
            let text = format!(
                "{how}, but by less than the spread of the random masks ({}): {fids}",
                short(spread)
            );
            (Verdict::Unclear, text)
        }
    };
    (
        verdict,
        format!(
            "{text}; held-out loss {} against {}.",
            short(a.held_out_loss),
            short(b.held_out_loss)
        ),
    )
}

fn rows<'a>(
    results: &'a Results,
    criterion: &'a str,
    recovery: Recovery,
) -> impl Iterator<Item = &'a ResultRow> {
    results
        .rows
        .iter()
        .filter(move |r| r.criterion == criterion && r.recovery == recovery)
}

fn learned_against_median(results: &Results) -> Vec<(Verdict, String)> {
    let answer = |row: &ResultRow| -> Option<(Verdict, String)> {
        let random = results.random.as_ref()?;
        let (fid, spread) = (row.fid?, random.fid?);
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
            Order::Better if fid < spread.min => (Verdict::Yes, numbers),
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
                short(row.held_out_loss),
                short(l.median),
                short(l.min),
                short(l.max)
            )
        });
        Some((verdict, format!("{text}{loss}.")))
    };
    rows(results, "learned", Recovery::FineTuning)
        .filter_map(answer)
        .collect()
}

fn learned_against_every(results: &Results) -> Vec<(Verdict, String)> {
    let random: Vec<(f64, &ResultRow)> = rows(results, "random", Recovery::FineTuning)
        .filter_map(|r| Some((r.fid?, r)))
        .collect();
    let Some((best, best_row)) = random.iter().min_by(|a, b| a.0.total_cmp(&b.0)) else {
        return Vec::new();
    };
    let answer = |row: &ResultRow| {
        let fid = row.fid?;
        let beaten = random
            .iter()
            .filter(|(r, _)| order(fid, *r) == Order::Better)
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
            best_row.name,
            short(*best)
        );
        Some((verdict, text))
    };
    rows(results, "learned", Recovery::FineTuning)
        .filter_map(answer)
        .collect()
}

fn learned_against_oracle(results: &Results) -> Vec<(Verdict, String)> {
    let mut answers = Vec::new();
    for recovery in [Recovery::FineTuning, Recovery::MaskedKd] {
        let Some(oracle) = rows(results, "oracle", recovery).next() else {
            continue;
        };
        answers.extend(
            rows(results, "learned", recovery).map(|learned| compare(learned, oracle, results)),
        );
    }
    answers
}

fn distillation(results: &Results) -> Vec<(Verdict, String)> {
    let pair = |kd: &ResultRow| {
        let ft = results.rows.iter().find(|r| {
            r.recovery == Recovery::FineTuning
                && r.criterion == kd.criterion
                && r.pattern == kd.pattern
                && r.seed == kd.seed
        })?;
        Some(compare(kd, ft, results))
    };
    results
        .rows
        .iter()
        .filter(|r| r.recovery == Recovery::MaskedKd)
        .filter_map(pair)
        .collect()
}

/// A control counts as equally fast from this part of the speed on.
const AS_FAST: f64 = 0.95;

fn fewer_steps(results: &Results) -> Vec<(Verdict, String)> {
    let most = results
        .rows
        .iter()
        .filter(|r| r.criterion == "dense")
        .map(|r| r.sampling_steps)
        .max();
    let controls: Vec<&ResultRow> = results
        .rows
        .iter()
        .filter(|r| r.criterion == "dense" && Some(r.sampling_steps) != most)
        .collect();
    let Some(fastest) = controls
        .iter()
        .max_by(|a, b| a.images_per_second.total_cmp(&b.images_per_second))
    else {
        return Vec::new();
    };
    let answer = |row: &ResultRow| {
        let speed = row.images_per_second;
        let fair = controls
            .iter()
            .filter(|c| c.images_per_second >= AS_FAST * speed && c.fid.is_some());
        let Some(control) = fair.min_by(|a, b| {
            a.fid
                .unwrap_or(f64::MAX)
                .total_cmp(&b.fid.unwrap_or(f64::MAX))
        }) else {
            let text = format!(
                "no control is as fast as {} ({} images/s); the fastest has {}.",
                row.name,
                short(speed),
                short(fastest.images_per_second)
            );
            return (Verdict::Unknown, text);
        };
        let (verdict, text) = compare(row, control, results);
        let speeds = format!(
            "{} and {} images/s",
            short(speed),
            short(control.images_per_second)
        );
        (verdict, format!("{text} At {speeds}."))
    };
    let pruned = results.rows.iter().filter(|r| r.criterion == "learned");
    let best_other = best(
        results
            .rows
            .iter()
            .filter(|r| !["learned", "dense"].contains(&r.criterion.as_str())),
    );
    pruned.chain(best_other).map(answer).collect()
}

fn best<'a>(rows: impl Iterator<Item = &'a ResultRow>) -> Option<&'a ResultRow> {
    rows.filter(|r| r.fid.is_some()).min_by(|a, b| {
        a.fid
            .unwrap_or(f64::MAX)
            .total_cmp(&b.fid.unwrap_or(f64::MAX))
    })
}

fn depth(results: &Results) -> Vec<(Verdict, String)> {
    let Some(dense) = results.rows.iter().find(|r| r.id == "dense") else {
        return Vec::new();
    };
    let students = results
        .rows
        .iter()
        .filter(|r| r.criterion != "dense" && r.recovery == Recovery::FineTuning);
    let Some(student) = best(students) else {
        return Vec::new();
    };
    let (mut verdict, mut text) = compare(dense, student, results);
    // Both numbers have to say so.
    if verdict == Verdict::Yes && order(dense.held_out_loss, student.held_out_loss) != Order::Better
    {
        verdict = Verdict::Unclear;
        text = format!("FID says so, the held-out loss does not: {text}");
    }
    vec![(verdict, text)]
}

fn calibration(results: &Results) -> Vec<(Verdict, String)> {
    let points: Vec<(f64, f64)> = results
        .rows
        .iter()
        .filter(|r| r.recovery == Recovery::FineTuning)
        .filter_map(|r| Some((r.calibration_loss?, r.fid?)))
        .collect();
    let Some(rho) = rank_correlation(&points) else {
        return Vec::new();
    };
    // The 5 % point of Spearman's rho (two-sided) is about 1.96 / sqrt(n - 1).
    let needed = 1.96 / ((points.len() - 1) as f64).sqrt();
    let verdict = match rho {
        r if r >= needed => Verdict::Yes,
        r if r <= -needed => Verdict::No,
        _ => Verdict::Unclear,
    };
    let meaning = match verdict {
        Verdict::Yes => "masks that hurt less before recovery are also better after it",
        Verdict::No => "masks that hurt less before recovery are worse after it",
        _ => "no clear relation",
    };
    let text = format!(
        "{meaning}: rank correlation of {} between calibration loss and FID over {} fine-tuned masks (beyond ±{} it would be \
         unlikely by chance).",
        short(rho),
        points.len(),
        short(needed.min(1.0))
    );
    vec![(verdict, text)]
}

#[cfg(test)]
mod tests;
