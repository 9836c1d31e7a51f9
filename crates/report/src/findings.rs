//! What the numbers show, said by fixed rules, so that the report cannot flatter.
//!
//! The rules: two numbers within 1 % are a tie. A difference that is no larger than the whole spread
//! (largest less smallest) of the random masks is named as such and not called a win: another
//! random draw moves the number as far. "Better than random" without reserve means better than every
//! random mask, a tie with the best of them excluded. A model whose loss is not a number has diverged, and
//! is never better than anything, whatever FID its samples have. A speed-up counts only against dense sampling with fewer steps at the same speed.

mod measure;
mod rules;

use crate::correlation::rank_correlation;
use crate::groups::{Group, groups};
use crate::svg::short;
use measure::{fine_tuned, other_masks};
use rules::{Order, best, compare, compare_outright, loss, order, rows, unscored};

use crate::results::{Recovery, ResultRow, Results};

/// The word in front of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The numbers say so.
    Yes,
    /// They say the contrary.
    No,
    /// They leave it open.
    Unclear,
    /// There is no number to answer it.
    Unknown,
}

impl Verdict {
    /// For people.
    pub fn word(self) -> &'static str {
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
            "Does depth matter: is the dense teacher better than the best recovered student?",
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
    let learned = if verdicts.iter().all(|v| *v == Verdict::Unknown) {
        "There are no numbers to compare the learned masks with random ones.".into()
    } else if wins == verdicts.len() {
        "In this run the learned masks recover better than every random mask.".into()
    } else if wins > 0 {
        format!(
            "In this run {wins} of {} learned masks recover better than every random mask; the others do not.",
            verdicts.len()
        )
    } else if verdicts.contains(&Verdict::Unclear) {
        "In this run the learned masks do not clearly win: none recovers better than every random mask.".into()
    } else {
        "In this run the learned masks do not win: none recovers better than the median random mask.".into()
    };
    [Some(learned), depth_in_a_sentence(results)]
        .into_iter()
        .flatten()
        .collect::<Vec<String>>()
        .join(" ")
}

fn depth_in_a_sentence(results: &Results) -> Option<String> {
    let verdicts: Vec<Verdict> = depth(results).into_iter().map(|a| a.0).collect();
    let text = if verdicts.is_empty() || verdicts.contains(&Verdict::Unknown) {
        return None;
    } else if verdicts.iter().all(|v| *v == Verdict::Yes) {
        "Depth matters: the dense teacher is better than the best recovered student."
    } else if verdicts.contains(&Verdict::No) {
        "Depth does not matter here: the dense teacher is worse than a recovered student."
    } else {
        "It is not clear that depth matters: the best recovered student comes close to the dense teacher."
    };
    Some(text.into())
}

/// What every reader has to know before the numbers.
pub(crate) fn caveats(results: &Results) -> Vec<String> {
    let samples = results.sample_count.map_or("few".into(), |n| n.to_string());
    let reference = results
        .reference_count
        .map_or("the".into(), |n| n.to_string());
    let repeated = |g: &Group<'_>| g.first().criterion != "random" && g.rows.len() > 1;
    let run = if groups(&results.rows).iter().any(repeated) {
        "seed of a row is one run"
    } else {
        "row is one run with one seed"
    };
    let mut list = vec![
        format!(
            "FID, IS, precision, recall and KID are computed on the features of a small classifier ({}), not on Inception: \
             they compare the rows of this report with each other and with nothing else.",
            results.features
        ),
        format!(
            "Each {run}, {samples} samples against {reference} reference images. FID is biased upwards with so \
             few samples, equally for every row."
        ),
        "Held-out loss: the teacher's training loss on held-out images, with the same random draws for every row; it varies less \
         than FID."
            .into(),
        "A difference within 1 % is called a tie, and one within the spread of the random masks is not called a win.".into(),
    ];
    if results.family == "MAR" {
        list.push(
            "Steps of a MAR are its iterations, in each of which the network runs once; every token's own diffusion takes the same \
             steps in every row, in a denoiser that no mask touches, so that half the depth saves less than half the time."
                .into(),
        );
    }
    list.extend(measure::patterns(results));
    list.push(measure::budget(results));
    list.extend(measure::uneven_speeds(results));
    list.extend(
        results
            .warnings
            .iter()
            .map(|w| format!("The evaluator warns: {w}.").replace("..", ".")),
    );
    let unmeasured = |r: &ResultRow| match &r.failed {
        Some(f) => Some(format!(
            "{} could not be measured, because `{}` failed: {}.",
            r.name,
            f.stage,
            f.error.trim().trim_end_matches('.').replace('\n', "; ")
        )),
        None => r.diverged().then(|| {
            format!(
                "{} diverged: its held-out loss is not a number, and its scores are not shown.",
                r.name
            )
        }),
    };
    list.extend(results.rows.iter().filter_map(unmeasured));
    list
}

fn learned_against_median(results: &Results) -> Vec<(Verdict, String)> {
    let answer = |row: &ResultRow| -> Option<(Verdict, String)> {
        let random = results.random.as_ref()?;
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
        let other = other_masks(row, results).unwrap_or_default();
        Some((verdict, format!("{text}{loss}.{other}")))
    };
    rows(results, "learned", Recovery::FineTuning)
        .filter_map(answer)
        .collect()
}

fn learned_against_every(results: &Results) -> Vec<(Verdict, String)> {
    let random: Vec<(f64, &ResultRow)> = rows(results, "random", Recovery::FineTuning)
        .filter_map(|r| Some((r.score()?, r)))
        .collect();
    let Some((best, best_row)) = random.iter().min_by(|a, b| a.0.total_cmp(&b.0)) else {
        return Vec::new();
    };
    let answer = |row: &ResultRow| {
        let Some(fid) = row.score() else {
            return unscored(row);
        };
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
        let other = other_masks(row, results).unwrap_or_default();
        (verdict, text + &other)
    };
    rows(results, "learned", Recovery::FineTuning)
        .map(answer)
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
    let pair = |kd: &ResultRow| Some(compare(kd, fine_tuned(kd, results)?, results));
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
        .filter_map(|c| c.images_per_second)
        .max_by(f64::total_cmp)
    else {
        return Vec::new();
    };
    let answer = |row: &ResultRow| {
        let Some(speed) = row.images_per_second.filter(|_| row.score().is_some()) else {
            return unscored(row);
        };
        let as_fast = |c: &&ResultRow| c.images_per_second.is_some_and(|s| s >= AS_FAST * speed);
        let Some(control) = best(controls.iter().copied().filter(as_fast)) else {
            let text = format!(
                "no control is as fast as {} ({} images/s); the fastest has {}.",
                row.name,
                short(speed),
                short(fastest)
            );
            return (Verdict::Unknown, text);
        };
        let (verdict, text) = compare_outright(row, control);
        let speeds = format!(
            "{} and {} images/s",
            short(speed),
            short(control.images_per_second.unwrap_or(f64::NAN))
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

fn depth(results: &Results) -> Vec<(Verdict, String)> {
    let Some(dense) = results.rows.iter().find(|r| r.id == "dense") else {
        return Vec::new();
    };
    let students = || results.rows.iter().filter(|r| r.criterion != "dense");
    let answer = |student: &ResultRow| {
        let (verdict, text) = compare_outright(dense, student);
        let losses = dense.held_out_loss.zip(student.held_out_loss);
        // Both numbers have to say so.
        if verdict == Verdict::Yes && losses.is_none_or(|(a, b)| order(a, b) != Order::Better) {
            let text = format!("FID says so, the held-out loss does not: {text}");
            return (Verdict::Unclear, text);
        }
        (verdict, text)
    };
    // The best with the teacher's help, if it is another one, is the harder opponent.
    let tuned = best(students().filter(|r| r.recovery == Recovery::FineTuning));
    let any = best(students()).filter(|r| tuned.is_none_or(|t| t.id != r.id));
    tuned.into_iter().chain(any).map(answer).collect()
}

fn calibration(results: &Results) -> Vec<(Verdict, String)> {
    let points: Vec<(f64, f64)> = results
        .rows
        .iter()
        .filter(|r| r.recovery == Recovery::FineTuning)
        .filter_map(|r| Some((r.calibration_loss?, r.score()?)))
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
