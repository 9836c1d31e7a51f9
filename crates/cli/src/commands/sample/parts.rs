//! Samples that are drawn already, while others are still to come.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{Device, Tensor};
use serde_json::{Map, Value};
use tinyfusion::checkpoint::{DTypePolicy, Metadata, load, remove_partials, save, write_atomic};
use tinyfusion::core::{Error, Result, StateDict};

/// The folder of the parts in that of the run.
const FOLDER: &str = "parts";
/// What the parts were drawn under.
const SETTINGS: &str = "settings.json";
/// Name of the tensor in a part.
const TENSOR: &str = "x";
/// Settings that change no sample.
const OF_THE_WAY: [&str; 4] = ["model", "batch_size", "grid_columns", "pngs"];

/// Batches of samples, a file each, until all of them are there.
pub(super) struct Parts {
    folder: PathBuf,
    /// What they are drawn under, until the first part is kept.
    unwritten: Mutex<Option<String>>,
    /// Numbers of all samples.
    all: Range<usize>,
    /// Those of the parts that were there, ascending.
    there: Vec<Range<usize>>,
}

impl Parts {
    /// Begins the parts of the samples `all` in `out`, or goes on with those of the same settings.
    pub(super) fn open(
        out: &Path,
        all: Range<usize>,
        settings: &Map<String, Value>,
    ) -> Result<Self> {
        let folder = out.join(FOLDER);
        let path = folder.join(SETTINGS);
        let mut parts = Self {
            folder,
            unwritten: Mutex::new(None),
            all,
            there: Vec::new(),
        };
        if let Ok(text) = std::fs::read_to_string(&path) {
            let found = serde_json::from_str(&text).map_err(|e| Error::file(&path, e))?;
            if let Some(key) = differs(&found, settings) {
                let say =
                    |of: &Map<String, Value>| of.get(key).map_or("none".into(), Value::to_string);
                return Err(Error::usage(format!(
                    "{}: samples of other settings wait there ({key} {}, asked for: {}); use another folder, or remove \
                     this one",
                    parts.folder.display(),
                    say(&found),
                    say(settings)
                )));
            }
            remove_partials(&parts.folder)?;
            parts.there = parts.found()?;
        } else {
            // Nothing is made before something is drawn: a mistake leaves no folder behind.
            let text = Value::Object(settings.clone()).to_string();
            parts.unwritten = Mutex::new(Some(text));
        }
        Ok(parts)
    }

    /// The batches that are still to be drawn, of `size` samples or less.
    pub(super) fn missing(&self, size: usize) -> Vec<Range<usize>> {
        let mut batches = Vec::new();
        let mut next = self.all.start;
        let ends = std::iter::once(self.all.end..self.all.end);
        for there in self.there.iter().cloned().chain(ends) {
            while next < there.start {
                let end = (next + size).min(there.start);
                batches.push(next..end);
                next = end;
            }
            next = there.end;
        }
        batches
    }

    /// Keeps the samples `numbers`.
    pub(super) fn save(&self, numbers: Range<usize>, batch: &Tensor) -> Result<()> {
        self.begin()?;
        let mut tensors = StateDict::new();
        tensors.insert(TENSOR, batch.contiguous()?);
        let name = format!("{:08}-{:08}.safetensors", numbers.start, numbers.end);
        save(
            self.folder.join(name),
            &tensors,
            &Metadata::new(),
            DTypePolicy::Keep,
        )?;
        Ok(())
    }

    /// Makes the folder, once.
    fn begin(&self) -> Result<()> {
        let mut unwritten = self
            .unwritten
            .lock()
            .map_err(|_| Error::run("another batch panicked"))?;
        let Some(text) = unwritten.as_ref() else {
            return Ok(());
        };
        std::fs::create_dir_all(&self.folder).map_err(|e| Error::file(&self.folder, e))?;
        write_atomic(self.folder.join(SETTINGS), |f| f.write_all(text.as_bytes()))?;
        *unwritten = None;
        Ok(())
    }

    /// Hands out all samples in order: (B, C, H, W).
    pub(super) fn each(&self, mut visit: impl FnMut(&Tensor) -> Result<()>) -> Result<()> {
        for numbers in self.found()? {
            let name = format!("{:08}-{:08}.safetensors", numbers.start, numbers.end);
            let path = self.folder.join(name);
            let part = load(&path, &Device::Cpu)?.tensors;
            let x = part.require(TENSOR).map_err(|e| Error::file(&path, e))?;
            if x.dim(0)? != numbers.len() {
                return Err(Error::file(
                    &path,
                    format!("holds {:?}, not {} samples", x.dims(), numbers.len()),
                ));
            }
            visit(x)?;
        }
        Ok(())
    }

    /// All was written elsewhere.
    pub(super) fn remove(self) -> Result<()> {
        remove(&self.folder)
    }

    /// Removes what a run left that was killed between its last file and this.
    pub(super) fn remove_from(out: &Path) -> Result<()> {
        let folder = out.join(FOLDER);
        if folder.join(SETTINGS).is_file() {
            remove(&folder)?;
        }
        Ok(())
    }

    /// The numbers of the parts in the folder, ascending and apart from each other.
    fn found(&self) -> Result<Vec<Range<usize>>> {
        let entries = std::fs::read_dir(&self.folder).map_err(|e| Error::file(&self.folder, e))?;
        let numbers = |name: &str| -> Option<Range<usize>> {
            let (start, end) = name.strip_suffix(".safetensors")?.split_once('-')?;
            Some(start.parse().ok()?..end.parse().ok()?)
        };
        let mut found: Vec<Range<usize>> = entries
            .filter_map(|e| numbers(e.ok()?.file_name().to_str()?))
            .collect();
        found.sort_by_key(|r| r.start);
        let sound = found
            .iter()
            .all(|r| r.start < r.end && r.start >= self.all.start && r.end <= self.all.end);
        if !sound || found.windows(2).any(|w| w[0].end > w[1].start) {
            return Err(Error::file(
                &self.folder,
                "holds parts that do not fit together; remove the folder",
            ));
        }
        Ok(found)
    }
}

/// A setting that decides samples and is not the same.
pub(super) fn differs<'a>(a: &'a Map<String, Value>, b: &'a Map<String, Value>) -> Option<&'a str> {
    let keys = a.keys().chain(b.keys()).map(String::as_str);
    keys.filter(|key| !OF_THE_WAY.contains(key))
        .find(|key| a.get(*key) != b.get(*key))
}

fn remove(folder: &Path) -> Result<()> {
    std::fs::remove_dir_all(folder).map_err(|e| Error::file(folder, e))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn settings(seed: u64, batch_size: u64) -> Map<String, Value> {
        let all = serde_json::json!({ "seed": seed, "batch_size": batch_size });
        all.as_object().unwrap().clone()
    }

    fn batch(numbers: Range<usize>) -> Tensor {
        let x: Vec<f32> = numbers.map(|i| i as f32).collect();
        let n = x.len();
        Tensor::from_vec(x, (n, 1, 1, 1), &Device::Cpu).unwrap()
    }

    #[test]
    fn what_is_missing_is_drawn_whatever_the_batch_size() {
        let out = tempfile::tempdir().unwrap();
        let parts = Parts::open(out.path(), 10..30, &settings(0, 8)).unwrap();
        assert_eq!(parts.missing(8), [10..18, 18..26, 26..30]);
        parts.save(18..26, &batch(18..26)).unwrap();
        let parts = Parts::open(out.path(), 10..30, &settings(0, 3)).unwrap();
        let missing = parts.missing(3);
        assert_eq!(missing, [10..13, 13..16, 16..18, 26..29, 29..30]);
        for numbers in missing {
            parts.save(numbers.clone(), &batch(numbers)).unwrap();
        }
        let mut all = Vec::new();
        parts
            .each(|x| {
                all.extend(x.flatten_all()?.to_vec1::<f32>()?);
                Ok(())
            })
            .unwrap();
        assert_eq!(all, (10..30).map(|i| i as f32).collect::<Vec<_>>());
        let parts = Parts::open(out.path(), 10..30, &settings(0, 3)).unwrap();
        assert!(parts.missing(8).is_empty());
        parts.remove().unwrap();
        assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
    }

    #[test]
    fn parts_of_other_settings_are_not_mixed() {
        let out = tempfile::tempdir().unwrap();
        let parts = Parts::open(out.path(), 0..4, &settings(0, 8)).unwrap();
        assert!(!out.path().join(FOLDER).exists(), "nothing is drawn yet");
        parts.save(0..1, &batch(0..1)).unwrap();
        let error = Parts::open(out.path(), 0..4, &settings(1, 8))
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("seed 0, asked for: 1"), "{error}");
        let parts = Parts::open(out.path(), 0..4, &settings(0, 8)).unwrap();
        parts.save(1..3, &batch(1..3)).unwrap();
        parts.save(2..4, &batch(2..4)).unwrap();
        let error = Parts::open(out.path(), 0..4, &settings(0, 8))
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("do not fit together"), "{error}");
    }
}
