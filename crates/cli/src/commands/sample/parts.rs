//! Samples that are drawn already, while others are still to come.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{Device, Tensor};
use serde_json::{Map, Value};
use tinyfusion::checkpoint::{
    DTypePolicy, Metadata, inspect, load, remove_partials, save, write_atomic,
};
use tinyfusion::core::{Error, Result, StateDict};

use crate::output::warn;

/// The folder of the parts in that of the run.
const FOLDER: &str = "parts";
/// What the parts were drawn under.
const SETTINGS: &str = "settings.json";
/// Name of the tensor in a part.
const TENSOR: &str = "x";
/// Settings that change no sample.
const OF_THE_WAY: [&str; 4] = ["model", "batch_size", "grid_columns", "pngs"];

/// What the numbers of the samples were computed in.
pub(super) const DTYPE: &str = "dtype";

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
                return Err(Error::usage(format!(
                    "{}: samples of other settings wait there ({key} {}, asked for: {}); use another folder, or remove \
                     this one",
                    parts.folder.display(),
                    setting(&found, key),
                    setting(settings, key)
                )));
            }
            remove_partials(&parts.folder)?;
            parts.remove_damaged()?;
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
        save(
            self.file(&numbers),
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
        let found = self.found()?;
        let mut next = self.all.start;
        for numbers in &found {
            if numbers.start == next {
                next = numbers.end;
            }
        }
        if next != self.all.end {
            return Err(Error::file(
                &self.folder,
                format!("the part from sample {next} on is gone; run the same command again"),
            ));
        }
        for numbers in found {
            let path = self.file(&numbers);
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

    /// Whether there are parts in `out` that a run has left.
    pub(super) fn wait_in(out: &Path) -> bool {
        out.join(FOLDER).join(SETTINGS).is_file()
    }

    /// Removes what a run left that was killed between its last file and this.
    pub(super) fn remove_from(out: &Path) -> Result<()> {
        match Self::wait_in(out) {
            true => remove(&out.join(FOLDER)),
            false => Ok(()),
        }
    }

    fn file(&self, numbers: &Range<usize>) -> PathBuf {
        let name = format!("{:08}-{:08}.safetensors", numbers.start, numbers.end);
        self.folder.join(name)
    }

    /// Removes parts that are not what their names say, a cut one say: they are drawn again.
    fn remove_damaged(&self) -> Result<()> {
        for numbers in self.found()? {
            let path = self.file(&numbers);
            let what = match inspect(&path) {
                Ok(part)
                    if part
                        .tensors
                        .iter()
                        .any(|t| t.shape.first() == Some(&numbers.len())) =>
                {
                    continue;
                }
                Ok(_) => Error::file(&path, format!("does not hold {} samples", numbers.len())),
                Err(error) => error,
            };
            warn(format_args!("{what}; these samples are drawn again"));
            std::fs::remove_file(&path).map_err(|e| Error::file(&path, e))?;
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
        .find(|key| setting(a, key) != setting(b, key))
}

/// One of the settings, for comparing and for showing. Samples that name no type of numbers are of f32.
pub(super) fn setting(all: &Map<String, Value>, key: &str) -> String {
    match all.get(key) {
        Some(value) => value.to_string(),
        None if key == DTYPE => Value::from("f32").to_string(),
        None => "none".into(),
    }
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
        // What names no type of numbers is of f32.
        let of_type = |dtype: &str| {
            let mut all = settings(0, 8);
            all.insert(DTYPE.into(), dtype.into());
            Parts::open(out.path(), 0..4, &all)
        };
        of_type("f32").unwrap();
        let error = of_type("bf16").err().unwrap().to_string();
        assert!(
            error.contains("dtype \"f32\", asked for: \"bf16\""),
            "{error}"
        );
        parts.save(1..3, &batch(1..3)).unwrap();
        parts.save(2..4, &batch(2..4)).unwrap();
        let error = Parts::open(out.path(), 0..4, &settings(0, 8))
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("do not fit together"), "{error}");
    }

    #[test]
    fn a_part_that_is_gone_or_cut_is_noticed() {
        let out = tempfile::tempdir().unwrap();
        let parts = Parts::open(out.path(), 0..6, &settings(0, 2)).unwrap();
        for numbers in parts.missing(2) {
            parts.save(numbers.clone(), &batch(numbers)).unwrap();
        }
        let last = out
            .path()
            .join(FOLDER)
            .join("00000004-00000006.safetensors");
        let whole = std::fs::read(&last).unwrap();
        // Another process took it away.
        for gone in [&last, &parts.file(&(2..4)), &parts.file(&(0..2))] {
            let kept = std::fs::read(gone).unwrap();
            std::fs::remove_file(gone).unwrap();
            let error = parts.each(|_| Ok(())).unwrap_err().to_string();
            assert!(error.contains("is gone"), "{error}");
            std::fs::write(gone, kept).unwrap();
        }
        std::fs::write(&last, &whole[..whole.len() - 1]).unwrap();
        let parts = Parts::open(out.path(), 0..6, &settings(0, 2)).unwrap();
        assert_eq!(parts.missing(2).as_slice(), std::slice::from_ref(&(4..6)));
        // Named as if it held more.
        std::fs::rename(parts.file(&(2..4)), parts.file(&(2..5))).unwrap();
        let parts = Parts::open(out.path(), 0..6, &settings(0, 2)).unwrap();
        assert_eq!(parts.missing(2), [2..4, 4..6]);
    }
}
