//! Workers that step in turn, so that a machine that drifts hurts all of them alike.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::load;
use super::worker::Worker;

/// How often, and how long between two steps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rhythm {
    /// Untimed rounds.
    pub(crate) warm_ups: usize,
    pub(crate) rounds: usize,
    /// The threads of the one before may still spin.
    pub(crate) pause: Duration,
}

/// What was measured.
pub(crate) struct Timed {
    /// Of every worker, in their order.
    pub(crate) seconds: Vec<Vec<f64>>,
    /// Cores that other programs used, on average over the timed rounds; none where it is not told.
    pub(crate) others: Option<f64>,
}

/// Every worker steps once in each round; `tick` hears which share is over.
pub(crate) fn take(workers: &mut [Worker], rhythm: Rhythm, tick: impl Fn(f64)) -> Result<Timed> {
    let used = |workers: &[Worker]| load::others(workers.iter().map(Worker::id));
    let total = ((rhythm.warm_ups + rhythm.rounds) * workers.len()) as f64;
    let mut seconds = vec![Vec::with_capacity(rhythm.rounds); workers.len()];
    let (mut done, mut start, mut before) = (0.0, Instant::now(), None);
    for round in 0..rhythm.warm_ups + rhythm.rounds {
        if round == rhythm.warm_ups {
            start = Instant::now();
            before = used(workers);
        }
        for (worker, seconds) in workers.iter_mut().zip(&mut seconds) {
            std::thread::sleep(rhythm.pause);
            let took = worker.step()?;
            if round >= rhythm.warm_ups {
                seconds.push(took);
            }
            done += 1.0;
            tick(done / total);
        }
    }
    let used = used(workers)
        .zip(before)
        .map(|(after, before)| after - before);
    let others = used.map(|s| (s / start.elapsed().as_secs_f64()).max(0.0));
    Ok(Timed { seconds, others })
}
