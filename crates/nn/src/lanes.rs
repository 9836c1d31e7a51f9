use std::any::Any;
use std::sync::Mutex;

use candle_core::Device;
use rayon::{ThreadPool, ThreadPoolBuilder};
use tinyfusion_core::{Error, Result};

/// Thread pools on which independent pieces of work run side by side, each with its share of the cores.
///
/// Much of a small model's pass is memory-bound single-threaded work inside candle, so two half batches on
/// two cores beat one whole batch that forks at every operation.
#[derive(Debug)]
pub struct Lanes {
    pools: Vec<ThreadPool>,
    /// What the work computes on.
    device: Device,
}

impl Lanes {
    /// At most `most` lanes, and no more than the current pool has threads.
    pub fn new(most: usize) -> Result<Self> {
        let cores = rayon::current_num_threads();
        let lanes = most.clamp(1, cores);
        let pool = || {
            ThreadPoolBuilder::new()
                .num_threads((cores / lanes).max(1))
                // candle sorts the graph by recursion: deep networks need room.
                .stack_size(64 << 20)
                .build()
                .map_err(|e| Error::run(format!("no worker threads: {e}")))
        };
        Ok(Self {
            pools: (0..lanes).map(|_| pool()).collect::<Result<_>>()?,
            device: Device::Cpu,
        })
    }

    /// The same for work on `device`: a GPU's context is made that of each thread, which candle leaves to the calls that
    /// copy, allocate or launch and needs before.
    #[must_use]
    pub fn on(self, device: &Device) -> Self {
        Self {
            device: device.clone(),
            ..self
        }
    }

    /// `work` on every item, results in the order of the items. After an error or a panic no further item is begun, and
    /// the first error in that order is returned.
    pub fn run<I: Send, R: Send>(
        &self,
        items: Vec<I>,
        work: impl Fn(I) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        let queue = Mutex::new(items.into_iter().enumerate());
        let results = Mutex::new(Vec::new());
        let take = || queue.lock().ok()?.next();
        std::thread::scope(|scope| {
            for pool in &self.pools {
                let (take, work, results, queue) = (&take, &work, &results, &queue);
                scope.spawn(move || {
                    pool.install(|| {
                        while let Some((at, item)) = take() {
                            let work = std::panic::AssertUnwindSafe(|| {
                                bind(&self.device)?;
                                work(item)
                            });
                            let result = std::panic::catch_unwind(work)
                                .unwrap_or_else(|panic| Err(panicked(&*panic)));
                            if result.is_err()
                                && let Ok(mut queue) = queue.lock()
                            {
                                queue.by_ref().for_each(drop);
                            }
                            if let Ok(mut results) = results.lock() {
                                results.push((at, result));
                            }
                        }
                    });
                });
            }
        });
        let mut results = results
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        results.sort_by_key(|(at, _)| *at);
        results.into_iter().map(|(_, result)| result).collect()
    }
}

#[cfg_attr(not(feature = "cuda"), allow(clippy::unnecessary_wraps))]
fn bind(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        use candle_core::cuda_backend::WrapErr;
        cuda.cuda_stream().context().bind_to_thread().w()?;
    }
    let _ = device;
    Ok(())
}

fn panicked(payload: &(dyn Any + Send)) -> Error {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    Error::run(format!("a worker thread panicked: {text}"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items() {
        for lanes in [1, 2, 7] {
            let squares = Lanes::new(lanes)
                .unwrap()
                .run((0..50).collect(), |i: usize| Ok(i * i))
                .unwrap();
            assert_eq!(squares, (0..50).map(|i| i * i).collect::<Vec<_>>());
        }
        assert!(
            Lanes::new(0)
                .unwrap()
                .run(Vec::<u8>::new(), Ok)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn the_first_error_ends_the_work() {
        let begun = AtomicUsize::new(0);
        let work = |i: usize| {
            begun.fetch_add(1, Relaxed);
            if i == 3 {
                Err(Error::run("the third"))
            } else {
                Ok(())
            }
        };
        let error = Lanes::new(1)
            .unwrap()
            .run((0..1000).collect(), work)
            .unwrap_err();
        assert_eq!(error.to_string(), "the third");
        assert_eq!(begun.load(Relaxed), 4);
        let panics = |i: usize| {
            if i == 1 {
                panic!("no such class: 11")
            } else {
                Ok(())
            }
        };
        let error = Lanes::new(2).unwrap().run(vec![0, 1], panics).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a worker thread panicked: no such class: 11"
        );
    }
}
