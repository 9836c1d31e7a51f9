use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rayon::prelude::*;

use crate::input::{Batch, Unread};
use crate::{Error, FeatureSet, ImageFeatures, ImageSet, Inception, Keep, Provenance, Result};

/// What takes the features of images, one image after the other in the order of the set.
pub trait Sink {
    /// Takes those of the next image; they are finite.
    ///
    /// # Errors
    /// Ends the extraction.
    fn take(&mut self, features: &ImageFeatures) -> Result<()>;
}

/// How [`extract_into`] works; no setting changes a result.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// Images handed to the threads at a time; without it 32, or four for every thread.
    pub batch: Option<usize>,
    /// Is told how many images are done.
    pub progress: &'a (dyn Fn(usize) + Sync),
    /// Ends the work early.
    pub stop: &'a (dyn Fn() -> bool + Sync),
}

impl std::fmt::Debug for Work<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work")
            .field("batch", &self.batch)
            .finish_non_exhaustive()
    }
}

impl Default for Work<'_> {
    fn default() -> Self {
        Self {
            batch: None,
            progress: &|_| (),
            stop: &|| false,
        }
    }
}

/// All features of `images`, in memory: 20 KB an image. Where statistics are all that is wanted, or not every metric,
/// use [`extract_into`].
///
/// `provenance` is that of `images` and of the weights of `net`; `progress` is told how many images are done; `stop`
/// ends the work early.
///
/// # Errors
/// When an image cannot be read (all such files are listed), a feature is not finite, or `stop` said so (`None`).
pub fn extract(
    net: &Inception,
    images: &ImageSet,
    provenance: Provenance,
    progress: &(dyn Fn(usize) + Sync),
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Option<FeatureSet>> {
    let mut set = FeatureSet::new(provenance, Keep::ALL, images.len());
    let work = Work {
        batch: None,
        progress,
        stop,
    };
    let done = extract_into(net, images, &mut set, &work)?;
    Ok(done.then_some(set))
}

/// Runs every image of `images` through `net`, one image per thread, and hands its features to `sink`. Returns whether
/// all were run: `false` if [`Work::stop`] said so.
///
/// # Errors
/// When an image cannot be read (all such files are listed), a feature is not finite, or the sink fails.
pub fn extract_into(
    net: &Inception,
    images: &ImageSet,
    sink: &mut dyn Sink,
    work: &Work<'_>,
) -> Result<bool> {
    let size = images.size();
    let bytes = size[0] * size[1] * 3;
    let stopped = AtomicBool::new(false);
    let mut failures: Vec<Unread> = Vec::new();
    let mut taken = 0;
    let batch = work
        .batch
        .unwrap_or(32.max(4 * rayon::current_num_threads()));
    images
        .for_each_batch(batch, &mut |batch| {
            let ask = || {
                if (work.stop)() {
                    stopped.store(true, Relaxed);
                }
                stopped.load(Relaxed)
            };
            // After a file that cannot be read the others are only decoded, so that all such files are listed.
            let broken = !failures.is_empty();
            let one = |pixels: std::result::Result<&[u8], Unread>| match pixels {
                Err(failure) => Some(Err(failure)),
                Ok(_) if broken => None,
                Ok(pixels) => Some(Ok(net.features(pixels, size))),
            };
            let found: Vec<_> = match &batch {
                Batch::Pixels(pixels) => pixels
                    .par_chunks_exact(bytes)
                    .with_max_len(1)
                    .map(|pixels| if ask() { None } else { one(Ok(pixels)) })
                    .collect(),
                Batch::Files(files) => files
                    .clone()
                    .into_par_iter()
                    .with_max_len(1)
                    .map(|index| {
                        if ask() {
                            return None;
                        }
                        let pixels = images.decode(index);
                        one(pixels.as_deref().map_err(Clone::clone))
                    })
                    .collect(),
            };
            for found in found.into_iter().flatten() {
                match found {
                    Err(failure) => failures.push(failure),
                    // What follows a file that cannot be read would stand at the wrong place.
                    Ok(_) if !failures.is_empty() || stopped.load(Relaxed) => {}
                    Ok(features) => {
                        check_finite(&features, images, taken)?;
                        sink.take(&features)?;
                        taken += 1;
                    }
                }
            }
            (work.progress)(taken);
            if stopped.load(Relaxed) {
                return Err(Error::file(images.path(), "interrupted"));
            }
            Ok(())
        })
        .or_else(|error| {
            if stopped.load(Relaxed) {
                Ok(())
            } else {
                Err(error)
            }
        })?;
    // Whatever comes next on these threads may need the memory.
    rayon::broadcast(|_| crate::network::forget_spares());
    if stopped.load(Relaxed) {
        return Ok(false);
    }
    images.unreadable(&failures)?;
    Ok(true)
}

fn check_finite(features: &ImageFeatures, images: &ImageSet, index: usize) -> Result<()> {
    let ImageFeatures {
        pool,
        spatial,
        logits,
    } = features;
    let all = pool.iter().chain(spatial).chain(logits);
    match all.into_iter().find(|v| !v.is_finite()) {
        None => Ok(()),
        Some(value) => Err(Error::file(
            images.path(),
            format!("the network makes {value} of image {index}; the weights are damaged"),
        )),
    }
}
