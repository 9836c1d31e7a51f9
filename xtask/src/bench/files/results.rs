//! What was measured: the content of `bench-files.json`.

use std::collections::BTreeMap;

use serde::Serialize;
use tinyfusion_report::Machine;

use super::super::results::Spread;
use super::super::worker::Facts;
use super::tasks::{Goal, Who};

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
    pub(crate) versions: BTreeMap<String, String>,
    pub(crate) threads: usize,
    pub(crate) rounds: usize,
    /// Best rate of a large f32 product by any contender, in operations per second.
    pub(crate) peak_flops_per_second: f64,
    /// Best rate of a large copy by any contender, bytes read and written per second.
    pub(crate) bandwidth_bytes_per_second: f64,
    pub(crate) tasks: Vec<TaskResult>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct TaskResult {
    pub(crate) name: String,
    pub(crate) unit: Unit,
    /// Time of a repetition of ours at the machine's limits.
    pub(crate) floor_seconds: f64,
    /// Cores that other programs used meanwhile; none where it is not told.
    pub(crate) cores_of_others: Option<f64>,
    /// The first is ours.
    pub(crate) contenders: Vec<ContenderResult>,
}

/// What amounts are counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Unit {
    Bytes,
    Images,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct ContenderResult {
    pub(crate) name: String,
    pub(crate) who: Who,
    pub(crate) command: String,
    /// What a repetition handles.
    pub(crate) amount: f64,
    /// Of every timed repetition, in order: the i-th of all contenders belong to one round.
    pub(crate) seconds: Vec<f64>,
    pub(crate) spread: Spread,
    /// Amount over the median.
    pub(crate) per_second: f64,
    /// Where operations are what it does.
    pub(crate) flops_per_second: Option<f64>,
    /// Share of the floor's time for this amount; none for one that does other work.
    pub(crate) of_floor: Option<f64>,
    /// Its time over ours for the same amount, round by round; none for ours.
    pub(crate) over_ours: Option<Spread>,
    /// Memory of the process before its first repetition.
    pub(crate) ready_rss_bytes: Option<u64>,
    pub(crate) peak_rss_bytes: u64,
    /// Largest difference from our output, relative to the largest value.
    pub(crate) difference: Option<f64>,
    #[serde(flatten)]
    pub(crate) facts: Facts,
    pub(crate) goals: Vec<GoalResult>,
}

/// What was hoped for and what came.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct GoalResult {
    pub(crate) of: &'static str,
    pub(crate) goal: f64,
    /// None where the system does not tell.
    pub(crate) found: Option<f64>,
    /// Whether `goal` is the least (or else the most).
    pub(crate) at_least: bool,
    pub(crate) met: bool,
}

/// Compares everyone with the first, and judges. `goals` are those of the contenders, in their order.
pub(crate) fn judge(contenders: &mut [ContenderResult], goals: &[Vec<Goal>]) {
    let Some(ours) = contenders.first().cloned() else {
        return;
    };
    for (i, (c, goals)) in contenders.iter_mut().zip(goals).enumerate() {
        if i > 0 {
            let same_amount = ours.amount / c.amount;
            let pairs = c.seconds.iter().zip(&ours.seconds);
            let ratios: Vec<f64> = pairs.map(|(a, b)| a / b * same_amount).collect();
            c.over_ours = Some(Spread::of(&ratios));
        }
        c.goals = goals.iter().map(|goal| judged(*goal, c, &ours)).collect();
    }
}

fn judged(goal: Goal, c: &ContenderResult, ours: &ContenderResult) -> GoalResult {
    let peak = |c: &ContenderResult| c.peak_rss_bytes as f64;
    let held = |c: &ContenderResult| Some(c.facts.open_files? + c.facts.mapped_files?);
    let (of, goal, found, at_least) = match goal {
        Goal::Time(goal) => ("time", goal, c.over_ours.map(|s| s.median), true),
        Goal::Memory(goal) => ("memory", goal, Some(peak(ours) / peak(c)), false),
        Goal::MemoryOfFile(goal) => ("memory over file", goal, Some(peak(c) / c.amount), false),
        Goal::FilesHeld(goal) => {
            let found = held(c).zip(c.facts.shards);
            let found = found.map(|(held, shards)| held as f64 / shards as f64);
            ("files held over shards", goal, found, false)
        }
    };
    let met = |f: f64| if at_least { f >= goal } else { f <= goal };
    GoalResult {
        of,
        goal,
        found,
        at_least,
        met: found.is_some_and(met),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn contender(name: &str, who: Who, amount: f64, seconds: &[f64]) -> ContenderResult {
        let spread = Spread::of(seconds);
        ContenderResult {
            name: name.into(),
            who,
            command: "run it".into(),
            amount,
            seconds: seconds.to_vec(),
            spread,
            per_second: amount / spread.median,
            flops_per_second: None,
            of_floor: Some(0.25),
            over_ours: None,
            ready_rss_bytes: Some(1 << 28),
            peak_rss_bytes: 1 << 30,
            difference: (who == Who::Python).then_some(1e-7),
            facts: Facts::default(),
            goals: Vec::new(),
        }
    }

    /// A file of a quarter of a GiB, which others load in half the time; and a loader twenty times as fast as the step.
    pub(crate) fn sample() -> Results {
        let file = f64::from(1 << 28);
        let mut load = vec![
            contender("tinyfusion", Who::Ours, file, &[2.0, 2.2, 1.8]),
            contender("torch.load", Who::Python, file, &[1.0, 1.1, 0.9]),
        ];
        judge(
            &mut load,
            &[
                vec![Goal::MemoryOfFile(1.2)],
                vec![Goal::Time(1.0), Goal::Memory(1.0)],
            ],
        );
        let mut loader = vec![
            contender("tinyfusion, shards", Who::Ours, 1000.0, &[1.0]),
            contender("training step", Who::Ours, 10.0, &[0.2]),
        ];
        loader[0].facts = Facts {
            shards: Some(4),
            open_files: Some(0),
            mapped_files: Some(4),
            ..Facts::default()
        };
        judge(
            &mut loader,
            &[vec![Goal::FilesHeld(1.0)], vec![Goal::Time(10.0)]],
        );
        let task = |name: &str, unit, contenders, others| TaskResult {
            name: name.into(),
            unit,
            floor_seconds: 0.5,
            cores_of_others: others,
            contenders,
        };
        Results {
            machine: crate::machine::of_here("abc", true),
            versions: BTreeMap::from([("torch".into(), "2.15.0".into())]),
            threads: 2,
            rounds: 3,
            peak_flops_per_second: 2e11,
            bandwidth_bytes_per_second: 1e10,
            tasks: vec![
                task("load a file", Unit::Bytes, load, Some(0.01)),
                task("latents", Unit::Images, loader, None),
            ],
        }
    }

    #[test]
    fn everyone_is_compared_with_ours_for_the_same_amount() {
        let results = sample();
        let [load, loader] = &results.tasks[..] else {
            panic!("two tasks");
        };
        assert!(load.contenders[0].over_ours.is_none());
        let over = |c: &ContenderResult| c.over_ours.unwrap().median;
        assert!((over(&load.contenders[1]) - 0.5).abs() < 1e-12);
        // 0.2 s for 10 images against 1 s for 1000.
        assert!((over(&loader.contenders[1]) - 20.0).abs() < 1e-9);
    }

    #[test]
    fn goals_are_judged_in_their_direction() {
        let results = sample();
        let judged: Vec<_> = results
            .tasks
            .iter()
            .flat_map(|t| &t.contenders)
            .flat_map(|c| &c.goals)
            .map(|g| (g.of, g.met))
            .collect();
        assert_eq!(
            judged,
            [
                ("memory over file", false),
                ("time", false),
                ("memory", true),
                ("files held over shards", true),
                ("time", true)
            ]
        );
    }

    #[test]
    fn what_the_system_does_not_tell_is_not_met() {
        let c = contender("tinyfusion", Who::Ours, 1.0, &[1.0]);
        let goal = super::judged(Goal::FilesHeld(1.0), &c, &c);
        assert!(goal.found.is_none() && !goal.met);
    }
}
