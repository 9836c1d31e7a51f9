//! The learned masks against every rival, over seeds.

use std::collections::BTreeMap;

use crate::findings::Verdict;
use crate::groups::{Group, groups};
use crate::measure::Measure;
use crate::results::ResultRow;
use crate::statistics::{Paired, holm};
use crate::svg::short;

/// What is tested: quality after recovery.
const TESTED: [Measure; 2] = [Measure::Fid, Measure::HeldOutLoss];
/// A corrected p from here on is within noise.
const LEVEL: f64 = 0.05;

/// A learned mask against one rival by one measure.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Name of the learned group.
    pub learned: String,
    /// Name of the rival.
    pub rival: String,
    /// What is compared.
    pub measure: Measure,
    /// The test of learned − rival over the repetitions that both have; none for fewer than two, or without noise.
    pub test: Option<Paired>,
    /// p after Holm's correction over the learned group's rivals by this measure.
    pub corrected: Option<f64>,
    /// Whether learned is better.
    pub verdict: Verdict,
    /// All of it in a sentence.
    pub text: String,
    /// Repetitions that were left out, and why there was no test, if there was none.
    remark: String,
}

/// The columns of [`Comparison::cells`].
pub(crate) const COLUMNS: [&str; 7] = [
    "learned",
    "against",
    "by",
    "difference",
    "95 % CI",
    "p",
    "is learned better?",
];

impl Comparison {
    /// A line of a table.
    pub(crate) fn cells(&self) -> [String; 7] {
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "–".into());
        let interval = self.test.map(|t| t.interval);
        let verdict = self.verdict.word();
        [
            self.learned.clone(),
            self.rival.clone(),
            self.measure.name().into(),
            or_none(self.test.map(|t| signed(t.difference))),
            or_none(interval.map(|(low, high)| format!("{} to {}", signed(low), signed(high)))),
            or_none(
                self.corrected
                    .map(|p| short_p(p).trim_start_matches("= ").into()),
            ),
            match self.remark.as_str() {
                "" => verdict.into(),
                remark => format!("{verdict}: {remark}"),
            },
        ]
    }
}

/// With a sign that is not taken for a dash.
fn signed(x: f64) -> String {
    let sign = if x < 0.0 { "−" } else { "+" };
    format!("{sign}{}", short(x.abs()))
}

/// Every learned group against the other criteria's groups that were recovered in the same way to the same depth.
///
/// Where a rival has several rows in a repetition, as random masks do, their mean is its number there. Empty where no
/// learned group has more than one repetition: one seed cannot be tested.
pub fn comparisons(rows: &[ResultRow]) -> Vec<Comparison> {
    let groups = groups(rows);
    let learned = groups.iter().filter(|g| {
        let seeds = |measure| repetitions(g, measure).len();
        g.first().criterion == "learned" && TESTED.into_iter().any(|m| seeds(m) > 1)
    });
    let mut all = Vec::new();
    for group in learned {
        let rivals: Vec<&Group<'_>> = groups.iter().filter(|g| is_rival(group, g)).collect();
        for measure in TESTED {
            let pairs: Vec<Pairs> = rivals
                .iter()
                .map(|r| Pairs::of(group, r, measure))
                .collect();
            let tests: Vec<Option<Paired>> = pairs.iter().map(|p| Paired::of(&p.both)).collect();
            let mut corrected =
                holm(&tests.iter().flatten().map(|t| t.p).collect::<Vec<_>>()).into_iter();
            for ((rival, pairs), test) in rivals.iter().zip(&pairs).zip(tests) {
                // A rival of which nothing was measured is not compared by this measure.
                if pairs.measured {
                    let corrected = test.and_then(|_| corrected.next());
                    all.push(compare(group, rival, measure, pairs, test, corrected));
                }
            }
        }
    }
    all
}

/// Whether the difference between two groups can be laid to their criteria.
fn is_rival(learned: &Group<'_>, other: &Group<'_>) -> bool {
    let (a, b) = (learned.first(), other.first());
    !["learned", "dense"].contains(&b.criterion.as_str())
        && a.recovery_label() == b.recovery_label()
        && (a.depth, a.sampling_steps) == (b.depth, b.sampling_steps)
        && (a.budget_steps, a.samples_seen) == (b.budget_steps, b.samples_seen)
        && a.x == b.x
}

/// The mean over a group's rows of each repetition; none where one of them has no number.
fn repetitions(group: &Group<'_>, measure: Measure) -> BTreeMap<u64, Option<f64>> {
    let mut all: BTreeMap<u64, Vec<Option<f64>>> = BTreeMap::new();
    for row in &group.rows {
        all.entry(row.repetition())
            .or_default()
            .push(measure.of(row));
    }
    let mean = |values: Vec<Option<f64>>| {
        let n = values.len() as f64;
        values.into_iter().sum::<Option<f64>>().map(|sum| sum / n)
    };
    all.into_iter()
        .map(|(seed, values)| (seed, mean(values)))
        .collect()
}

/// The numbers of two groups by repetition.
struct Pairs {
    /// Learned and rival, where both have a number.
    both: Vec<(f64, f64)>,
    /// Repetitions that both ran, but for which one has no number, and whose fault it is.
    lost: Vec<String>,
    /// Whether either has any number.
    measured: bool,
}

impl Pairs {
    fn of(learned: &Group<'_>, rival: &Group<'_>, measure: Measure) -> Self {
        let (a, b) = (repetitions(learned, measure), repetitions(rival, measure));
        let (mut both, mut lost) = (Vec::new(), Vec::new());
        for (seed, a) in &a {
            match (a, b.get(seed)) {
                (Some(a), Some(Some(b))) => both.push((*a, *b)),
                (None, Some(_)) => lost.push(format!("{seed} ({} has no number)", learned.name)),
                (Some(_), Some(None)) => {
                    lost.push(format!("{seed} ({} has no number)", rival.name));
                }
                (_, None) => {}
            }
        }
        Self {
            both,
            lost,
            measured: a.values().any(Option::is_some) || b.values().any(Option::is_some),
        }
    }
}

fn compare(
    learned: &Group<'_>,
    rival: &Group<'_>,
    measure: Measure,
    pairs: &Pairs,
    test: Option<Paired>,
    corrected: Option<f64>,
) -> Comparison {
    let (name, a, b) = (measure.name(), &learned.name, &rival.name);
    let untested = match pairs.both.len() {
        n if n < 2 => format!("{} in common, no test", seeds(n)),
        n => format!(
            "the same difference in {}, no noise to test it by",
            seeds(n)
        ),
    };
    let (verdict, text, untested) = match (test, corrected) {
        (Some(test), Some(p)) => {
            let (verdict, text) = judge(measure, a, b, test, p);
            (verdict, text, None)
        }
        _ => {
            let text = format!("{name}: {a} against {b}: {untested}.");
            (Verdict::Unknown, text, Some(untested))
        }
    };
    let lost = match &pairs.lost[..] {
        [] => None,
        lost => Some(format!(
            "left out, without a number: seed {}",
            lost.join(", ")
        )),
    };
    let remarks: Vec<String> = untested.into_iter().chain(lost.clone()).collect();
    let lost = lost.map_or(String::new(), |lost| format!(" L{}.", &lost[1..]));
    Comparison {
        learned: a.clone(),
        rival: b.clone(),
        measure,
        test,
        corrected,
        verdict,
        text: text + &lost,
        remark: remarks.join("; "),
    }
}

fn seeds(n: usize) -> String {
    match n {
        0 => "no seed".into(),
        1 => "1 seed".into(),
        n => format!("{n} seeds"),
    }
}

fn judge(measure: Measure, learned: &str, rival: &str, test: Paired, p: f64) -> (Verdict, String) {
    let Paired {
        n,
        difference,
        interval,
        ..
    } = test;
    let better = (difference < 0.0) == measure.lower_is_better();
    // Said of the size of the difference, so that the interval has its sign.
    let (low, high) = if difference < 0.0 {
        (-interval.1, -interval.0)
    } else {
        interval
    };
    let numbers = format!(
        "by {} (95 % CI {} to {}, p {}, {})",
        short(difference.abs()),
        short(low),
        short(high),
        short_p(p),
        seeds(n)
    );
    let name = measure.name();
    let direction = if better { "better" } else { "worse" };
    if p < LEVEL {
        let verdict = if better { Verdict::Yes } else { Verdict::No };
        let loses = if better { "" } else { ": learned loses" };
        return (
            verdict,
            format!("{name}: {learned} is {direction} than {rival} {numbers}{loses}."),
        );
    }
    (
        Verdict::Unclear,
        format!("{name}: {learned} is {direction} than {rival} {numbers}: within noise."),
    )
}

fn short_p(p: f64) -> String {
    if p < 0.001 {
        "< 0.001".into()
    } else {
        format!("= {p:.3}")
    }
}

/// What the tests are, for below them.
pub const NOTE: &str = "Paired t-tests over seeds, two-sided; p is corrected by Holm's method over the rivals of a learned mask, \
the confidence interval (CI) is not. A difference with p of 0.05 or more is within noise. With two or three seeds only a large \
difference can be told from noise.";

#[cfg(test)]
mod tests;
