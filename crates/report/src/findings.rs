//! What the numbers show, said by fixed rules, so that the report cannot flatter.
//!
//! Only comparable rows meet (see [`crate::class`]), and of several seeds of a method their mean. Where a study has tests of its
//! own over seeds, those are summed up in the place of the single questions about the learned mask.
//!
//! The rules: two numbers within 1 % are a tie. A difference that is no larger than the whole spread
//! (largest less smallest) of the random masks is named as such and not called a win: another
//! random draw moves the number as far. "Better than random" without reserve means better than every
//! random mask, a tie with the best of them excluded. A model whose loss is not a number has diverged, and
//! is never better than anything, whatever FID its samples have. A speed-up counts only against dense sampling with fewer steps at the same speed.

mod learned;
mod means;
mod measure;
mod recoveries;
mod rules;
mod tested;

use crate::class::{classes, same_work};
use crate::groups::{Group, groups};
use crate::svg::short;
use learned::{learned_against_every, learned_against_median, learned_against_oracle};
use means::means;
use recoveries::{calibration, distillation};
use rules::{Order, best, compare_outright, order, unscored};
use tested::{summed_up, tests, tests_in_a_sentence};

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

/// Every finding, in the report's order. A study leaves out the questions that it has no rows for.
pub(crate) fn findings(results: &Results) -> Vec<Finding> {
    let one = &means(results);
    let tests = tests(results);
    let recoveries_tested =
        !tests.is_empty() && results.against().iter().any(|a| a.column == "recovery");
    let mut all = if tests.is_empty() {
        let learned = learned_against_median(one);
        let every = learned_against_every(one);
        // Better than the median outside of the spread is better than every one: where there are many, once is enough.
        let every = if results.study.is_some() && every.len() > MANY {
            Vec::new()
        } else {
            every
        };
        vec![
            (
                "Does the learned mask beat the median random mask?",
                learned,
            ),
            ("Does it beat every random mask?", every),
            (
                "Does it beat the oracle (BK-SDM)?",
                learned_against_oracle(one),
            ),
        ]
    } else {
        let question = if results.against().is_empty() {
            "Does the learned mask beat its rivals?"
        } else {
            "Is anything better than the baseline?"
        };
        vec![(question, summed_up(&tests, !results.against().is_empty()))]
    };
    all.extend([
        (
            "Does masked distillation recover better than plain fine-tuning?",
            // A study that tests its recoveries has answered it.
            if recoveries_tested {
                Vec::new()
            } else {
                distillation(results)
            },
        ),
        (
            "Is a pruned model better than the dense one with fewer steps at equal speed?",
            fewer_steps(one),
        ),
        (
            "Does depth matter: is the dense teacher better than the best recovered student?",
            depth(one),
        ),
        (
            "Does the loss before recovery predict the quality after it?",
            calibration(results),
        ),
    ]);
    all.into_iter()
        .filter(|(_, answers)| results.study.is_none() || !answers.is_empty())
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
    let said: Vec<String> = [
        first_sentence(results),
        depth_in_a_sentence(&means(results)),
    ]
    .into_iter()
    .flatten()
    .collect();
    if said.is_empty() {
        "Every method has a single seed in this run: which differences are noise is not known."
            .into()
    } else {
        said.join(" ")
    }
}

/// What the experiment asks in the first place.
fn first_sentence(results: &Results) -> Option<String> {
    if let Some(said) = tests_in_a_sentence(&tests(results), results) {
        return Some(said);
    }
    let verdicts: Vec<Verdict> = learned_against_median(&means(results))
        .into_iter()
        .map(|a| a.0)
        .collect();
    // A study that draws no random masks does not ask for them.
    if results.study.is_some() && results.random.is_empty() {
        return None;
    }
    let wins = verdicts.iter().filter(|v| **v == Verdict::Yes).count();
    Some(if verdicts.iter().all(|v| *v == Verdict::Unknown) {
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
    })
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
        match results.on_inception() {
            true => format!("FID, sFID, IS, precision, recall and KID are computed on {}.", results.features),
            false => format!(
                "FID, IS, precision, recall and KID are computed on the features of a small classifier ({}), not on \
                 Inception: they compare the rows of this report with each other and with nothing else.",
                results.features
            ),
        },
        format!(
            "Each {run}, {samples} samples against {reference} reference images. FID is biased upwards with few \
             samples, equally for every row."
        ),
        evaluation(results),
        "Held-out loss: the teacher's training loss on held-out images, with the same random draws for every row; it varies less \
         than FID."
            .into(),
        "A difference within 1 % is called a tie, and one within the spread of the comparable random masks (same size, sampling steps \
         and budget) is not called a win."
            .into(),
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

/// What the deviation and the tests do not know of.
fn evaluation(results: &Results) -> String {
    let seeds = groups(&results.rows).iter().any(|g| g.rows.len() > 1);
    let spread = if seeds {
        "± is the standard deviation over seeds of search and recovery, for random masks over the masks. "
    } else {
        ""
    };
    format!(
        "{spread}Every row is scored once, on one set of samples from the same sampling seed: what another set of samples would change \
         is {}.",
        if seeds { "not in it" } else { "not known" }
    )
}

/// More answers than this to one question are summed up.
const MANY: usize = 6;

/// A control counts as equally fast from this part of the speed on.
const AS_FAST: f64 = 0.95;

fn fewer_steps<'a>(results: &'a Results) -> Vec<(Verdict, String)> {
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
    // Of the learned masks in a class the best stands for the others where there are many.
    let learned: Vec<&ResultRow> = (results.rows.iter())
        .filter(|r| r.criterion == "learned")
        .collect();
    let pruned = if learned.len() > MANY {
        let best_of = |class: Vec<&'a ResultRow>| best(class.iter().copied());
        let classes = classes(learned, same_work);
        classes.into_iter().filter_map(best_of).collect()
    } else {
        learned
    };
    let best_other = best(
        results
            .rows
            .iter()
            .filter(|r| !["learned", "dense"].contains(&r.criterion.as_str())),
    );
    pruned.into_iter().chain(best_other).map(answer).collect()
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

#[cfg(test)]
mod tests;
