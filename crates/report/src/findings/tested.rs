//! A study's tests over its seeds, summed up.

use super::Verdict;
use crate::comparisons::{Comparison, TESTED, comparisons};
use crate::measure::Measure;
use crate::results::Results;

/// A study's tests over its seeds; none for another experiment, and where there was nothing to test.
pub(super) fn tests(results: &Results) -> Vec<Comparison> {
    if results.study.is_none() {
        return Vec::new();
    }
    let all = comparisons(results);
    if all.iter().any(|c| c.test.is_some()) {
        all
    } else {
        Vec::new()
    }
}

/// How many comparisons were won, lost and left open.
struct Score {
    won: usize,
    lost: usize,
    of: usize,
}

impl Score {
    fn of(tests: &[&Comparison]) -> Self {
        let count = |verdict| tests.iter().filter(|c| c.verdict == verdict).count();
        Self {
            won: count(Verdict::Yes),
            lost: count(Verdict::No),
            of: tests.len(),
        }
    }

    fn verdict(&self) -> Verdict {
        match self {
            Self { won, of, .. } if won == of => Verdict::Yes,
            Self { won: 0, lost, .. } if *lost > 0 => Verdict::No,
            _ => Verdict::Unclear,
        }
    }
}

impl std::fmt::Display for Score {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { won, lost, of } = self;
        let open = of - won - lost;
        write!(
            f,
            "better than {won} of {of} rivals, worse than {lost}, not clear against {open}"
        )
    }
}

/// What the tests come to: for every learned method, or for all that was held against the baselines.
pub(super) fn summed_up(tests: &[Comparison], baselines: bool) -> Vec<(Verdict, String)> {
    if baselines {
        return TESTED
            .into_iter()
            .filter_map(|m| against_baselines(tests, m))
            .collect();
    }
    let mut methods: Vec<&str> = Vec::new();
    for test in tests {
        if !methods.contains(&test.method.as_str()) {
            methods.push(&test.method);
        }
    }
    let answer = |method: &str| {
        let by = |measure| {
            let own = |c: &&Comparison| c.method == method && c.measure == measure;
            let all: Vec<&Comparison> = tests.iter().filter(own).collect();
            (!all.is_empty()).then(|| (measure, Score::of(&all)))
        };
        let scores: Vec<(Measure, Score)> = TESTED.into_iter().filter_map(by).collect();
        let verdict = (scores.first()).map_or(Verdict::Unknown, |(_, s)| s.verdict());
        let said: Vec<String> = scores
            .iter()
            .map(|(measure, score)| format!("by {} {score}", measure.name()))
            .collect();
        (verdict, format!("{method}: {}.", said.join("; ")))
    };
    methods.into_iter().map(answer).collect()
}

/// Who is better and who is worse than the baseline by a measure.
fn against_baselines(tests: &[Comparison], measure: Measure) -> Option<(Verdict, String)> {
    let all: Vec<&Comparison> = tests.iter().filter(|c| c.measure == measure).collect();
    let score = Score::of(&all);
    let names = |verdict| -> String {
        let own = all.iter().filter(|c| c.verdict == verdict);
        let names: Vec<&str> = own.map(|c| c.method.as_str()).collect();
        match names.join("; ") {
            names if names.is_empty() => names,
            names => format!(" ({names})"),
        }
    };
    // One that is better is an answer: it is asked for any.
    let verdict = match score {
        Score { of: 0, .. } => return None,
        Score { won, .. } if won > 0 => Verdict::Yes,
        Score { lost, of, .. } if lost == of => Verdict::No,
        _ => Verdict::Unclear,
    };
    let Score { won, lost, of } = score;
    let text = format!(
        "by {}, {won} of {of} comparisons are won{}, {lost} lost{}, and {} not clear.",
        measure.name(),
        names(Verdict::Yes),
        names(Verdict::No),
        of - won - lost
    );
    Some((verdict, text))
}

/// The tests by FID; none without any.
pub(super) fn tests_in_a_sentence(tests: &[Comparison], results: &Results) -> Option<String> {
    let by_fid = tests.iter().filter(|c| c.measure == Measure::Fid);
    let fid: Vec<&Comparison> = by_fid.collect();
    let Score { won, lost, of } = Score::of(&fid);
    let who = if results.against().is_empty() {
        "the learned masks are better than their rival"
    } else {
        "the methods are better than their baseline"
    };
    (of > 0).then(|| {
        format!(
            "In this run {who} in {won} of {of} comparisons by FID, worse in {lost}, and not clearly apart in {} (paired tests over \
             seeds).",
            of - won - lost
        )
    })
}
