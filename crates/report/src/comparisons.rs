//! Methods against their rivals over seeds: the learned masks, or what a study names as its baseline.

use std::collections::BTreeMap;

use crate::class::{comparable, same_mask, same_work};
use crate::findings::Verdict;
use crate::groups::{Group, groups};
use crate::measure::Measure;
use crate::results::{ResultRow, Results};
use crate::statistics::{Paired, holm};
use crate::study::{Against, cell};
use crate::svg::short;

/// What is tested: quality after recovery. The first one decides a verdict.
pub(crate) const TESTED: [Measure; 2] = [Measure::Fid, Measure::HeldOutLoss];
/// A corrected p from here on is within noise.
pub(crate) const LEVEL: f64 = 0.05;

/// A method against one rival by one measure.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Name of the group that is judged.
    pub method: String,
    /// Name of the rival.
    pub rival: String,
    /// What is compared.
    pub measure: Measure,
    /// The test of method − rival over the repetitions that both have; none for fewer than two, or without noise.
    pub test: Option<Paired>,
    /// p after Holm's correction over the family: the rivals of a learned mask, or all that is held against a baseline.
    pub corrected: Option<f64>,
    /// Whether the method is better.
    pub verdict: Verdict,
    /// All of it in a sentence.
    pub text: String,
    /// Repetitions that were left out, and why there was no test, if there was none.
    remark: String,
}

/// The columns of [`Comparison::cells`].
pub(crate) const COLUMNS: [&str; 7] = [
    "method",
    "against",
    "by",
    "difference",
    "95 % CI",
    "p",
    "is it better?",
];

impl Comparison {
    /// A line of a table.
    pub(crate) fn cells(&self) -> [String; 7] {
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "–".into());
        let interval = self.test.map(|t| t.interval);
        let verdict = self.verdict.word();
        [
            self.method.clone(),
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

/// Every method against its rivals.
///
/// A study that names what it compares with ([`crate::Study::against`]) has its other rows held against that; in every other
/// experiment the learned groups are held against the other criteria's. Either only against what is comparable: of the same
/// size (of the same parameters, where one is pruned in width), budget, sampling steps and x, recovered in the same way.
///
/// Where a rival has several rows in a repetition, as random masks do, their mean is its number there. Empty where no
/// group that is judged has more than one repetition: one seed cannot be tested.
pub fn comparisons(results: &Results) -> Vec<Comparison> {
    let groups = groups(&results.rows);
    let against = results.against();
    let families: Vec<Family<'_, '_>> = if against.is_empty() {
        groups.iter().map(|g| rivals(g, &groups)).collect()
    } else {
        against.iter().map(|a| baseline(a, &groups)).collect()
    };
    families.iter().flat_map(tested).collect()
}

/// Methods and their rivals whose tests are corrected together.
type Family<'g, 'a> = Vec<(&'g Group<'a>, &'g Group<'a>)>;

fn repeated(group: &Group<'_>) -> bool {
    TESTED.into_iter().any(|m| repetitions(group, m).len() > 1)
}

/// A learned group with the groups from which it differs in nothing but the criterion.
fn rivals<'g, 'a>(learned: &'g Group<'a>, groups: &'g [Group<'a>]) -> Family<'g, 'a> {
    let is_rival = |other: &&Group<'_>| {
        !["learned", "dense"].contains(&other.first().criterion.as_str())
            && comparable(learned.first(), other.first())
    };
    if learned.first().criterion != "learned" || !repeated(learned) {
        return Vec::new();
    }
    let rivals = groups.iter().filter(is_rival);
    rivals.map(|rival| (learned, rival)).collect()
}

/// Every group with the baselines from which it differs in nothing but the baseline's column.
fn baseline<'g, 'a>(against: &Against, groups: &'g [Group<'a>]) -> Family<'g, 'a> {
    let Against { column, value } = against;
    let is_baseline = |g: &&Group<'_>| cell(g.first(), column) == *value;
    let apart = |a: &Group<'_>, b: &Group<'_>| match column.as_str() {
        "recovery" => same_work(a.first(), b.first()) && same_masks(a, b),
        _ => comparable(a.first(), b.first()) && same_labels(a.first(), b.first(), column),
    };
    let methods = groups
        .iter()
        .filter(|g| g.first().criterion != "dense" && !is_baseline(g) && repeated(g));
    let with_baselines = |method| {
        let alike = groups
            .iter()
            .filter(is_baseline)
            .filter(move |b| apart(method, b));
        alike.map(move |b| (method, b))
    };
    methods.flat_map(with_baselines).collect()
}

/// Whether two groups recovered the same masks, as far as both have a repetition.
fn same_masks(a: &Group<'_>, b: &Group<'_>) -> bool {
    let partner = |x: &ResultRow| b.rows.iter().any(|y| same_mask(x, y));
    a.rows.iter().any(|x| partner(x))
}

/// Whether the labels that both rows have are equal, but for one.
fn same_labels(a: &ResultRow, b: &ResultRow, except: &str) -> bool {
    let same = |(label, value): (&String, &String)| {
        label == except || b.labels.get(label).is_none_or(|v| v == value)
    };
    a.labels.iter().all(same)
}

/// A family's tests, corrected among those of one measure.
fn tested(family: &Family<'_, '_>) -> Vec<Comparison> {
    let mut all = Vec::new();
    for measure in TESTED {
        let pairs: Vec<Pairs> = family
            .iter()
            .map(|(method, rival)| Pairs::of(method, rival, measure))
            .collect();
        let tests: Vec<Option<Paired>> = pairs.iter().map(|p| Paired::of(&p.both)).collect();
        let mut corrected =
            holm(&tests.iter().flatten().map(|t| t.p).collect::<Vec<_>>()).into_iter();
        for (((method, rival), pairs), test) in family.iter().zip(&pairs).zip(tests) {
            let corrected = test.and_then(|_| corrected.next());
            // A rival of which nothing was measured is not compared by this measure.
            if pairs.measured {
                all.push(compare(method, rival, measure, pairs, test, corrected));
            }
        }
    }
    all
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
    /// Method and rival, where both have a number.
    both: Vec<(f64, f64)>,
    /// Whether the method and whether the rival has no number in a repetition that it ran: who loses seeds does not win.
    incomplete: (bool, bool),
    /// Repetitions that both ran, but for which one has no number, and whose fault it is.
    lost: Vec<String>,
    /// Whether either has any number.
    measured: bool,
}

impl Pairs {
    fn of(method: &Group<'_>, rival: &Group<'_>, measure: Measure) -> Self {
        let (a, b) = (repetitions(method, measure), repetitions(rival, measure));
        let (mut both, mut lost) = (Vec::new(), Vec::new());
        for (seed, a) in &a {
            match (a, b.get(seed)) {
                (Some(a), Some(Some(b))) => both.push((*a, *b)),
                (None, Some(_)) => lost.push(format!("{seed} ({} has no number)", method.name)),
                (Some(_), Some(None)) => {
                    lost.push(format!("{seed} ({} has no number)", rival.name));
                }
                (_, None) => {}
            }
        }
        let incomplete = |all: &BTreeMap<u64, Option<f64>>| all.values().any(Option::is_none);
        Self {
            both,
            incomplete: (incomplete(&a), incomplete(&b)),
            lost,
            measured: a.values().any(Option::is_some) || b.values().any(Option::is_some),
        }
    }
}

fn compare(
    method: &Group<'_>,
    rival: &Group<'_>,
    measure: Measure,
    pairs: &Pairs,
    test: Option<Paired>,
    corrected: Option<f64>,
) -> Comparison {
    let (name, a, b) = (measure.name(), &method.name, &rival.name);
    let untested = match pairs.both.len() {
        n if n < 2 => format!("{} in common, no test", seeds(n)),
        n => format!(
            "the same difference in {}, no noise to test it by",
            seeds(n)
        ),
    };
    let (verdict, text, untested) = match (test, corrected) {
        (Some(test), Some(p)) => {
            let (verdict, text) = judge(measure, (a, b), test, p, pairs.incomplete);
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
        method: a.clone(),
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

fn judge(
    measure: Measure,
    (method, rival): (&str, &str),
    test: Paired,
    p: f64,
    incomplete: (bool, bool),
) -> (Verdict, String) {
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
    let direction = if better { "better" } else { "worse" };
    let numbers = format!(
        "{}: {method} is {direction} than {rival} by {} (95 % CI {} to {}, p {}, {})",
        measure.name(),
        short(difference.abs()),
        short(low),
        short(high),
        short_p(p),
        seeds(n)
    );
    let (verdict, end) = match (p < LEVEL, better, incomplete) {
        (false, ..) => (Verdict::Unclear, ": within noise"),
        // On the seeds that are left a method that diverges now and then must not look good.
        (_, true, (true, _)) | (_, false, (_, true)) => (
            Verdict::Unclear,
            ", but lost seeds: no win over the seeds that are left",
        ),
        (_, true, _) => (Verdict::Yes, ""),
        (_, false, _) => (Verdict::No, ": it loses"),
    };
    (verdict, format!("{numbers}{end}."))
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
or over all rows that are held against one baseline; the confidence interval (CI) is not corrected. A difference with p of 0.05 or \
more is within noise. With two or three seeds only a large difference can be told from noise. The noise is that of the seeds of search \
and recovery: every row is scored once, with one seed of sampling, and what other samples would change is in neither p nor CI.";

/// The heading of the tests.
pub(crate) fn heading(results: &Results) -> String {
    let against = results.against();
    let named: Vec<String> = against
        .iter()
        .map(|a| format!("{} {}", a.column, a.value))
        .collect();
    if named.is_empty() {
        "Learned against its rivals".into()
    } else {
        format!("Tested against the baseline: {}", named.join("; "))
    }
}

/// Why nothing is tested, where a reader would expect it; none where nothing is to be compared.
pub(crate) fn untested(results: &Results) -> Option<String> {
    let groups = groups(&results.rows);
    let students = || groups.iter().filter(|g| g.first().criterion != "dense");
    let against = results.against();
    let learned = || students().filter(|g| g.first().criterion == "learned");
    if against.is_empty() && learned().next().is_none() {
        return None;
    }
    // Random masks differ in their draw within one repetition: that is no second seed.
    if !students().any(repeated) {
        return Some(
            "Every method has a single seed here: which differences are noise cannot be tested."
                .into(),
        );
    }
    Some(match against {
        [] if learned().any(repeated) => {
            "No row of another criterion has the size, the recovery and the budget of a learned mask: there is nothing to test the \
             learned masks against."
                .into()
        }
        [] => "The learned masks have a single seed here: which differences are noise cannot be tested.".into(),
        _ => "No row differs from a baseline in nothing but the baseline's column: there is nothing to test.".into(),
    })
}

#[cfg(test)]
mod tests;
