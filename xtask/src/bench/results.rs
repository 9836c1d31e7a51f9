//! What was measured: the content of `bench.json`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::preset::{Contender, Goals, Kind};
use tinyfusion_report::Machine;

/// Everything.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
    /// Of PyTorch and what it runs on.
    pub(crate) versions: BTreeMap<String, String>,
    pub(crate) threads: usize,
    pub(crate) rounds: usize,
    /// Best rate of a large f32 product by any contender, in operations per second.
    pub(crate) peak_flops_per_second: f64,
    /// Best rate of a large copy by any contender, bytes read and written per second.
    pub(crate) bandwidth_bytes_per_second: f64,
    /// The two measurements behind them.
    pub(crate) probes: Vec<CaseResult>,
    pub(crate) cases: Vec<CaseResult>,
    pub(crate) scaling: Vec<ScalingResult>,
}

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct CaseResult {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) model: String,
    pub(crate) batch: usize,
    /// How its files were made.
    pub(crate) commands: Vec<String>,
    /// Operations that cannot be left out.
    pub(crate) least_flops: f64,
    /// Their time at the machine's peak; none for the probes.
    pub(crate) floor_seconds: Option<f64>,
    /// Cores that other programs used meanwhile; none where it is not told.
    pub(crate) cores_of_others: Option<f64>,
    pub(crate) contenders: Vec<ContenderResult>,
    pub(crate) comparisons: Vec<Comparison>,
    pub(crate) goals: Vec<GoalResult>,
}

/// One contender of a case.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ContenderResult {
    pub(crate) contender: Contender,
    pub(crate) command: String,
    /// Of every timed step, in order: the i-th of all contenders belong to one round.
    pub(crate) seconds: Vec<f64>,
    pub(crate) spread: Spread,
    /// Operations that this contender's way of doing it takes.
    pub(crate) flops: f64,
    pub(crate) flops_per_second: f64,
    /// Share of the machine's peak; none for the probes.
    pub(crate) of_peak: Option<f64>,
    /// Memory of the process with everything loaded, before its first step.
    pub(crate) ready_rss_bytes: Option<u64>,
    pub(crate) peak_rss_bytes: u64,
    /// Largest difference from our output, relative to the largest value.
    pub(crate) difference: Option<f64>,
}

/// A contender against ours.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Comparison {
    pub(crate) with: Contender,
    /// Ratio of the times within each round: the other's over ours, but ours over half the depth's.
    pub(crate) time: Spread,
    /// Our peak memory over the other's.
    pub(crate) memory: f64,
}

/// What was hoped for and what came.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct GoalResult {
    pub(crate) with: Contender,
    /// `time` (at least) or `memory` (at most).
    pub(crate) of: &'static str,
    pub(crate) goal: f64,
    pub(crate) found: f64,
    pub(crate) met: bool,
}

/// One kind of step over the values of one size.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ScalingResult {
    pub(crate) kind: Kind,
    pub(crate) model: String,
    /// The size that changes.
    pub(crate) over: &'static str,
    /// Cores that other programs used meanwhile; none where it is not told.
    pub(crate) cores_of_others: Option<f64>,
    pub(crate) points: Vec<ScalingPoint>,
}

/// One value of the size.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ScalingPoint {
    pub(crate) value: usize,
    pub(crate) spread: Spread,
    pub(crate) flops: f64,
    pub(crate) bytes: f64,
    /// Time of the operations at the machine's peak (on one thread, at its share of the peak).
    pub(crate) compute_floor_seconds: f64,
    /// Time of the bytes at the machine's bandwidth.
    pub(crate) memory_floor_seconds: f64,
    pub(crate) peak_rss_bytes: u64,
}

/// Of repeated measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) largest: f64,
    pub(crate) lower_quartile: f64,
    pub(crate) upper_quartile: f64,
}

impl Spread {
    /// Of at least one value; of none everything is not a number.
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        // Linear between the neighbours, as most programs have it.
        let at = |share: f64| {
            let place = share * sorted.len().saturating_sub(1) as f64;
            let get = |i: f64| sorted.get(i as usize).copied().unwrap_or(f64::NAN);
            let (low, high) = (get(place.floor()), get(place.ceil()));
            low + (high - low) * place.fract()
        };
        Self {
            median: at(0.5),
            least: at(0.0),
            largest: at(1.0),
            lower_quartile: at(0.25),
            upper_quartile: at(0.75),
        }
    }

    /// Of a over b, pair by pair.
    fn of_ratio(a: &[f64], b: &[f64]) -> Self {
        let ratios: Vec<f64> = a.iter().zip(b).map(|(a, b)| a / b).collect();
        Self::of(&ratios)
    }
}

/// Every contender against the first, which is ours.
pub(crate) fn compare(contenders: &[ContenderResult]) -> Vec<Comparison> {
    let Some((ours, others)) = contenders.split_first() else {
        return Vec::new();
    };
    let with = |other: &ContenderResult| Comparison {
        with: other.contender,
        time: if other.contender == Contender::Half {
            Spread::of_ratio(&ours.seconds, &other.seconds)
        } else {
            Spread::of_ratio(&other.seconds, &ours.seconds)
        },
        memory: ours.peak_rss_bytes as f64 / other.peak_rss_bytes as f64,
    };
    others.iter().map(with).collect()
}

/// The goals of the contenders that took part.
pub(crate) fn judge(goals: &Goals, comparisons: &[Comparison]) -> Vec<GoalResult> {
    let mut judged = Vec::new();
    for c in comparisons {
        let goal = match c.with {
            Contender::Ours => None,
            Contender::Half => goals.half,
            Contender::Eager => goals.eager,
            Contender::Compile => goals.compile,
        };
        judged.extend(goal.map(|goal| GoalResult {
            with: c.with,
            of: "time",
            goal,
            found: c.time.median,
            met: c.time.median >= goal,
        }));
        let goal = goals.memory.filter(|_| c.with == Contender::Eager);
        judged.extend(goal.map(|goal| GoalResult {
            with: c.with,
            of: "memory",
            goal,
            found: c.memory,
            met: c.memory <= goal,
        }));
    }
    judged
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn contender(contender: Contender, seconds: &[f64], memory: u64) -> ContenderResult {
        let spread = Spread::of(seconds);
        ContenderResult {
            contender,
            command: "run it".into(),
            seconds: seconds.to_vec(),
            spread,
            flops: 1e11,
            flops_per_second: 1e11 / spread.median,
            of_peak: Some(1e11 / spread.median / 2e11),
            ready_rss_bytes: Some(1 << 29),
            peak_rss_bytes: memory,
            difference: (contender == Contender::Eager).then_some(2e-6),
        }
    }

    /// A case that eager PyTorch loses in time and wins in memory, and a scaling.
    pub(crate) fn sample() -> Results {
        let contenders = vec![
            contender(Contender::Ours, &[1.0, 1.1, 0.9], 3 << 30),
            contender(Contender::Half, &[0.5, 0.55, 0.45], 2 << 30),
            contender(Contender::Eager, &[1.5, 1.65, 1.08], 4 << 30),
        ];
        let comparisons = compare(&contenders);
        let goals = Goals {
            eager: Some(1.25),
            half: Some(1.95),
            memory: Some(0.6),
            compile: None,
        };
        let spread = Spread::of(&[0.25]);
        let point = |value: usize| ScalingPoint {
            value,
            spread,
            flops: 1e10,
            bytes: 1e9,
            compute_floor_seconds: 0.05,
            memory_floor_seconds: 0.1,
            peak_rss_bytes: 1 << 30,
        };
        Results {
            machine: crate::machine::of_here("abc", true),
            versions: BTreeMap::from([("torch".into(), "2.15.0".into())]),
            threads: 2,
            rounds: 3,
            peak_flops_per_second: 2e11,
            bandwidth_bytes_per_second: 1e10,
            probes: Vec::new(),
            cases: vec![CaseResult {
                name: "forward <S>".into(),
                kind: Kind::Forward,
                model: "DiT-S/2".into(),
                batch: 8,
                commands: vec!["prepare it".into()],
                least_flops: 1e11,
                floor_seconds: Some(0.5),
                cores_of_others: Some(0.01),
                goals: judge(&goals, &comparisons),
                contenders,
                comparisons,
            }],
            scaling: vec![ScalingResult {
                kind: Kind::Forward,
                model: "DiT-S/2".into(),
                over: "depth",
                cores_of_others: None,
                points: vec![point(6), point(12)],
            }],
        }
    }

    #[test]
    fn a_spread_has_median_quartiles_and_ends() {
        let s = Spread::of(&[5.0, 1.0, 2.0, 4.0, 3.0]);
        assert_eq!((s.least, s.median, s.largest), (1.0, 3.0, 5.0));
        assert_eq!((s.lower_quartile, s.upper_quartile), (2.0, 4.0));
        assert_eq!(Spread::of(&[1.0, 2.0]).median, 1.5);
        assert!(Spread::of(&[]).median.is_nan());
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let results = sample();
        let [half, eager] = &results.cases[0].comparisons[..] else {
            panic!("two comparisons");
        };
        assert!((half.time.median - 2.0).abs() < 1e-12 && half.memory == 1.5);
        // The rounds' own ratios are 1.5, 1.5 and 1.2.
        assert!((eager.time.median - 1.5).abs() < 1e-12);
        assert!((eager.time.least - 1.2).abs() < 1e-12 && eager.memory == 0.75);
    }

    #[test]
    fn goals_are_judged_in_their_direction() {
        let results = sample();
        let judged: Vec<_> = results.cases[0]
            .goals
            .iter()
            .map(|g| (g.with, g.of, g.met))
            .collect();
        assert_eq!(
            judged,
            [
                (Contender::Half, "time", true),
                (Contender::Eager, "time", true),
                (Contender::Eager, "memory", false)
            ]
        );
    }
}
