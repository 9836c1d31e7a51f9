//! One task: its contenders in turn, and what their times mean.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use super::super::cases::Limits;
use super::super::measure::Outcome;
use super::super::results::Spread;
use super::super::turns::{self, Rhythm};
use super::super::worker::{Last, Worker};
use super::results::{ContenderResult, TaskResult, Unit, judge};
use super::tasks::{Amount, Contender, Floor, Task};
use super::{Lab, PAUSE, WARM_UPS};

impl Lab {
    pub(super) fn compare(
        &self,
        task: &Task,
        limits: Limits,
        tick: impl Fn(f64),
        versions: &mut BTreeMap<String, String>,
    ) -> Result<TaskResult> {
        let (outcomes, others) = match task.fresh {
            true => self.anew(task, tick)?,
            false => self.in_turn(task, tick)?,
        };
        let flops = match task.floor {
            Floor::Flops => Some(
                outcomes[0]
                    .last
                    .facts
                    .flops
                    .context("ours did not tell its operations")?,
            ),
            Floor::Bytes(_) => None,
        };
        let amounts = task
            .contenders
            .iter()
            .map(|c| amount(&c.amount))
            .collect::<Result<Vec<_>>>()?;
        let floor_seconds = match (task.floor, flops) {
            (Floor::Bytes(each), _) => each * amounts[0] / limits.bandwidth,
            (Floor::Flops, flops) => flops.unwrap_or(0.0) / limits.flops,
        };
        let mut contenders = Vec::new();
        for ((c, outcome), amount) in task.contenders.iter().zip(outcomes).zip(&amounts) {
            versions.extend(outcome.versions.clone());
            check_difference(c, outcome.last.difference, task.tolerance)?;
            let spread = Spread::of(&outcome.seconds);
            contenders.push(ContenderResult {
                name: c.name.clone(),
                who: c.who,
                command: outcome.command,
                amount: *amount,
                seconds: outcome.seconds,
                spread,
                per_second: amount / spread.median,
                flops_per_second: flops.map(|f| f / spread.median),
                of_floor: c
                    .same_work
                    .then(|| floor_seconds / amounts[0] * amount / spread.median),
                over_ours: None,
                ready_rss_bytes: outcome.ready_rss_bytes,
                peak_rss_bytes: outcome.last.peak_rss_bytes,
                difference: outcome.last.difference,
                facts: outcome.last.facts,
                goals: Vec::new(),
            });
        }
        let goals: Vec<_> = task.contenders.iter().map(|c| c.goals.clone()).collect();
        judge(&mut contenders, &goals);
        Ok(TaskResult {
            name: task.name.clone(),
            unit: match task.contenders[0].amount {
                Amount::File(_) => Unit::Bytes,
                Amount::Images(_) => Unit::Images,
            },
            floor_seconds,
            cores_of_others: others,
            contenders,
        })
    }

    /// One process for each contender, which repeats.
    fn in_turn(&self, task: &Task, tick: impl Fn(f64)) -> Result<(Vec<Outcome>, Option<f64>)> {
        let started = task.contenders.iter().map(|c| self.start(task, c));
        let mut workers = started.collect::<Result<Vec<_>>>()?;
        let rhythm = Rhythm {
            warm_ups: WARM_UPS,
            rounds: self.rounds,
            pause: PAUSE,
        };
        let timed = turns::take(&mut workers, rhythm, tick)?;
        let all = workers.into_iter().zip(&task.contenders).zip(timed.seconds);
        let outcomes = all.map(|((worker, c), seconds)| self.end(worker, c, seconds));
        Ok((outcomes.collect::<Result<_>>()?, timed.others))
    }

    /// A process for each repetition: memory that a program keeps from one to the next would spare it work that a user's program has to do.
    fn anew(&self, task: &Task, tick: impl Fn(f64)) -> Result<(Vec<Outcome>, Option<f64>)> {
        let once = Rhythm {
            warm_ups: 0,
            rounds: 1,
            pause: PAUSE,
        };
        let total = ((WARM_UPS + self.rounds) * task.contenders.len()) as f64;
        let mut outcomes: Vec<Option<Outcome>> = task.contenders.iter().map(|_| None).collect();
        let (mut others, mut waited, mut done) = (Some(0.0), 0.0, 0.0);
        for round in 0..WARM_UPS + self.rounds {
            for (c, all) in task.contenders.iter().zip(&mut outcomes) {
                let mut worker = [self.start(task, c)?];
                let timed = turns::take(&mut worker, once, |_| ())?;
                let seconds: Vec<f64> = timed.seconds.concat();
                let took: f64 = seconds.iter().sum();
                for worker in worker {
                    let new = self.end(worker, c, seconds.clone())?;
                    if round >= WARM_UPS {
                        others = others
                            .zip(timed.others)
                            .map(|(sum, cores)| sum + cores * took);
                        waited += took;
                        *all = Some(match all.take() {
                            Some(old) => joined(old, new),
                            None => new,
                        });
                    }
                }
                done += 1.0;
                tick(done / total);
            }
        }
        Ok((
            outcomes.into_iter().flatten().collect(),
            others.map(|sum| sum / waited),
        ))
    }

    fn end(&self, worker: Worker, c: &Contender, seconds: Vec<f64>) -> Result<Outcome> {
        Ok(Outcome {
            command: self.line(c.who, &c.words),
            seconds,
            versions: worker.versions.clone(),
            ready_rss_bytes: worker.ready_rss_bytes,
            last: worker.finish()?,
        })
    }
}

/// Repetitions of two processes as those of one: the larger memory, the larger difference.
fn joined(old: Outcome, new: Outcome) -> Outcome {
    // NaN is the largest here.
    let larger = |a: f64, b: f64| if a.total_cmp(&b).is_ge() { a } else { b };
    let difference = match (old.last.difference, new.last.difference) {
        (Some(a), Some(b)) => Some(larger(a, b)),
        (a, b) => a.or(b),
    };
    Outcome {
        seconds: [old.seconds, new.seconds].concat(),
        last: Last {
            peak_rss_bytes: old.last.peak_rss_bytes.max(new.last.peak_rss_bytes),
            difference,
            ..new.last
        },
        ..new
    }
}

fn amount(amount: &Amount) -> Result<f64> {
    Ok(match amount {
        Amount::File(path) => {
            let found = std::fs::metadata(path);
            found.with_context(|| format!("{}", path.display()))?.len() as f64
        }
        Amount::Images(n) => *n as f64,
    })
}

/// Whoever computes something else is no contender.
fn check_difference(c: &Contender, difference: Option<f64>, tolerance: f64) -> Result<()> {
    // NaN and none fail too.
    if c.compared && difference.is_none_or(|d| d.is_nan() || d > tolerance) {
        bail!(
            "the result of {} differs from ours by {difference:?} of the largest value; expected at most {tolerance:.0e}",
            c.name
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::super::worker::Facts;
    use super::super::tasks;
    use super::*;

    #[test]
    fn a_result_that_differs_or_is_missing_fails() {
        let task = &tasks::tasks(
            &tasks::tests::sizes(),
            Path::new("files"),
            Path::new("train"),
            2,
        )[0];
        let [ours, theirs, ..] = &task.contenders[..] else {
            panic!("two contenders");
        };
        check_difference(ours, None, 1e-9).unwrap();
        check_difference(theirs, Some(1e-12), 1e-9).unwrap();
        for wrong in [None, Some(1e-3), Some(f64::NAN)] {
            check_difference(theirs, wrong, 1e-9).unwrap_err();
        }
    }

    #[test]
    fn repetitions_of_processes_are_joined() {
        let outcome = |seconds: f64, peak, difference| Outcome {
            command: "run it".into(),
            seconds: vec![seconds],
            last: Last {
                peak_rss_bytes: peak,
                difference,
                facts: Facts::default(),
            },
            versions: BTreeMap::new(),
            ready_rss_bytes: Some(1),
        };
        let both = joined(outcome(1.0, 9, Some(f64::NAN)), outcome(2.0, 7, Some(1e-9)));
        assert_eq!(
            (both.seconds, both.last.peak_rss_bytes),
            (vec![1.0, 2.0], 9)
        );
        assert!(both.last.difference.is_some_and(f64::is_nan));
    }
}
