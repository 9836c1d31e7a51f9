use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use candle_core::DType;
use half::f16;
use serde_json::json;
use tinyfusion_core::{Error, LatentBatch, Result};

use super::{CLASSES_KEY, LatentType};

/// Writes a file for [`PackedLatents`](super::PackedLatents) batch by batch.
///
/// The data go to `NAME.partial` beside the file; [`finish`](Self::finish) syncs and renames it, so
/// that under its own name the file is always whole. Dropped unfinished, it leaves nothing behind.
#[derive(Debug)]
pub struct LatentWriter {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    kind: LatentType,
    shape: [usize; 3],
    samples: usize,
    classes: usize,
    /// Where the labels go: in front of the latents, because they have the stricter alignment.
    labels_at: u64,
    labels: Vec<i64>,
    /// After a failed write nobody knows how much of it is in the file.
    broken: bool,
    finished: bool,
}

impl LatentWriter {
    /// Begins a file of exactly `samples` latents of `shape` (C, H, W), with labels in `0..classes`.
    pub fn create(
        path: impl AsRef<Path>,
        samples: usize,
        shape: [usize; 3],
        classes: usize,
        kind: LatentType,
    ) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let [c, h, w] = shape;
        let size = [samples, c, h, w, kind.bytes()]
            .into_iter()
            .try_fold(1usize, usize::checked_mul);
        let (Some(size @ 1..), 1.., Some(file_name)) = (size, classes, path.file_name()) else {
            return Err(Error::usage(format!(
                "cannot write {samples} latents of shape {shape:?} with {classes} classes to {}: expected at \
                 least one of each and a file name",
                path.display()
            )));
        };
        let labels = samples * 8;
        let mut header = serde_json::to_vec(&json!({
            "__metadata__": { CLASSES_KEY: classes.to_string() },
            "y": { "dtype": "I64", "shape": [samples], "data_offsets": [0, labels] },
            "x": { "dtype": kind.name(), "shape": [samples, c, h, w], "data_offsets": [labels, labels + size] },
        }))
        .map_err(|e| Error::file(&path, e))?;
        // The format wants data aligned to 8 bytes and allows spaces after the header.
        header.resize(header.len().next_multiple_of(8), b' ');

        let partial = partial_of(&path, file_name);
        let file = File::create(&partial)
            .map_err(|e| Error::file(&partial, format!("cannot be created: {e}")))?;
        let mut writer = Self {
            path,
            partial,
            file: BufWriter::with_capacity(1 << 20, file),
            kind,
            shape,
            samples,
            classes,
            labels_at: 8 + header.len() as u64,
            labels: Vec::with_capacity(samples),
            broken: false,
            finished: false,
        };
        let begun = writer.begin(&header);
        writer.noting(begun)?;
        Ok(writer)
    }

    /// Appends a batch: x (B, C, H, W) with finite values, y (B,).
    ///
    /// # Errors
    /// If the batch does not fit what [`create`](Self::create) announced, or writing fails; the file
    /// cannot be finished then.
    pub fn push(&mut self, batch: &LatentBatch) -> Result<()> {
        self.usable()?;
        let (b, c, h, w) = batch.x.dims4()?;
        if [c, h, w] != self.shape || batch.y.dims() != [b] {
            return Err(Error::usage(format!(
                "a batch x {:?}, y {:?} does not fit latents of shape {:?}",
                batch.x.dims(),
                batch.y.dims(),
                self.shape
            )));
        }
        if self.labels.len() + b > self.samples {
            return Err(Error::usage(format!(
                "{} is announced with {} samples; this batch would make it {}",
                self.path.display(),
                self.samples,
                self.labels.len() + b
            )));
        }
        let labels = batch.y.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        if let Some(label) = labels
            .iter()
            .find(|&&l| l < 0 || l as usize >= self.classes)
        {
            return Err(Error::usage(format!(
                "label {label}, expected 0..{}",
                self.classes
            )));
        }
        let values = batch
            .x
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()?; // (B·C·H·W,)
        let mut bytes = Vec::with_capacity(values.len() * self.kind.bytes());
        for value in values {
            // Judged as stored: a finite f32 may be infinite in f16.
            let stored = match self.kind {
                LatentType::F32 => value,
                LatentType::F16 => f16::from_f32(value).to_f32(),
            };
            if !stored.is_finite() {
                return Err(Error::usage(format!(
                    "a latent holds {value}, which is not finite as {}",
                    self.kind.name()
                )));
            }
            match self.kind {
                LatentType::F32 => bytes.extend_from_slice(&value.to_le_bytes()),
                LatentType::F16 => bytes.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
            }
        }
        let written = self.file.write_all(&bytes);
        self.noting(written)?;
        self.labels.extend(labels);
        Ok(())
    }

    /// Completes the file and gives it its name.
    ///
    /// # Errors
    /// If fewer samples were pushed than announced, or writing fails.
    pub fn finish(mut self) -> Result<()> {
        self.usable()?;
        if self.labels.len() != self.samples {
            return Err(Error::usage(format!(
                "{} is announced with {} samples, but got {}",
                self.path.display(),
                self.samples,
                self.labels.len()
            )));
        }
        let ended = self.end();
        self.noting(ended)?;
        self.finished = true;
        Ok(())
    }

    fn begin(&mut self, header: &[u8]) -> io::Result<()> {
        self.file.write_all(&(header.len() as u64).to_le_bytes())?;
        self.file.write_all(header)?;
        // The labels are known only at the end; their place is kept free.
        io::copy(
            &mut io::Read::take(io::repeat(0), self.samples as u64 * 8),
            &mut self.file,
        )?;
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.labels_at))?;
        let labels: Vec<u8> = self.labels.iter().flat_map(|l| l.to_le_bytes()).collect();
        self.file.write_all(&labels)?;
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        give_name(&self.partial, &self.path)
    }

    fn usable(&self) -> Result<()> {
        if self.broken {
            return Err(Error::file(
                &self.partial,
                "an earlier write failed; begin the file anew",
            ));
        }
        Ok(())
    }

    fn noting<T>(&mut self, outcome: io::Result<T>) -> Result<T> {
        self.broken |= outcome.is_err();
        outcome.map_err(|e| Error::file(&self.partial, format!("cannot be written: {e}")))
    }
}

/// Where `path` is written until it is whole.
fn partial_of(path: &Path, file_name: &OsStr) -> PathBuf {
    let mut name = file_name.to_os_string();
    name.push(".partial");
    path.with_file_name(name)
}

/// Renames a file that is whole and synced, and makes the new name itself durable.
fn give_name(partial: &Path, path: &Path) -> io::Result<()> {
    fs::rename(partial, path)?;
    // A file system that cannot sync a folder still has the file.
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    if let Ok(folder) = File::open(folder.unwrap_or(Path::new("."))) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// Writes a small file so that either the old or the new one stands under its name.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let partial = partial_of(path, path.file_name().unwrap_or_default());
    let mut file = File::create(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    give_name(&partial, path)
}

impl Drop for LatentWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Nobody is left to tell if even this fails; the name says that the file is partial.
            let _ = fs::remove_file(&self.partial);
        }
    }
}
