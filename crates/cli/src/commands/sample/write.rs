//! The files of a run whose samples are all there.

use std::fs;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde_json::{Map, Value};
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::data::grid;

use super::classes::Classes;
use super::finished::{BYTES, IMAGES_PER_SECOND, NPZ, RECORD, SECONDS};
use super::npz::{IMAGES, NpzWriter, each_image};
use super::parts::Parts;
use crate::output::say;

const GRID: &str = "grid.png";
/// Entries of the record.
const COLUMNS: &str = "grid_columns";
const PNGS: &str = "pngs";

/// Where samples are taken from.
#[derive(Clone, Copy)]
enum From {
    Parts,
    /// Of a finished run, whose samples are images.
    Npz,
}

/// What is to be written of the samples.
pub(super) struct Files<'a> {
    pub(super) out: &'a Path,
    pub(super) parts: &'a Parts,
    pub(super) classes: &'a Classes,
    pub(super) numbers: Range<usize>,
    /// Columns of the grid, of samples that are images.
    pub(super) grid_columns: Option<usize>,
    pub(super) pngs: bool,
}

impl Files<'_> {
    /// Writes samples.npz, the pictures and, last, the record; `drawn` of the samples took `seconds`.
    pub(super) fn write(
        &self,
        settings: Map<String, Value>,
        drawn: usize,
        seconds: f64,
    ) -> Result<()> {
        let bytes = self.npz()?;
        if let Some(columns) = self.grid_columns {
            self.grid(columns, From::Parts)?;
        }
        if self.pngs {
            self.pngs(From::Parts)?;
        }
        let speed = (drawn > 0).then(|| drawn as f64 / seconds);
        let mut record = settings;
        record.insert(SECONDS.into(), seconds.into());
        record.insert(IMAGES_PER_SECOND.into(), speed.into());
        record.insert(BYTES.into(), bytes.into());
        self.record(record)?;
        let what = match self.grid_columns {
            Some(_) => "images",
            None => "latents (pictures need --vae)",
        };
        let speed = speed.map_or("all drawn before".into(), |s| format!("{s:.1} a second"));
        let (out, count) = (self.out.display(), self.numbers.len());
        Ok(say!("{out}: {count} {what}, {speed}")?)
    }

    /// Adds the pictures that a finished run lacks, from its samples.npz; `record` is that of the run.
    pub(super) fn complete(&self, mut record: Map<String, Value>) -> Result<()> {
        let out = self.out.display();
        let grid = self.grid_columns.filter(|columns| {
            record.get(COLUMNS) != Some(&(*columns).into()) || !self.out.join(GRID).is_file()
        });
        let pngs = self.pngs && !self.numbers.clone().all(|i| self.png(i).is_file());
        if grid.is_none() && !pngs {
            return Ok(say!("{out}: all is there already")?);
        }
        if let Some(columns) = grid {
            self.grid(columns, From::Npz)?;
            record.insert(COLUMNS.into(), columns.into());
        }
        if pngs {
            self.pngs(From::Npz)?;
            record.insert(PNGS.into(), true.into());
        }
        self.record(record)?;
        Ok(say!(
            "{out}: all is drawn already; pictures of the {} images are written",
            self.numbers.len()
        )?)
    }

    fn record(&self, record: Map<String, Value>) -> Result<()> {
        Ok(write_atomic(self.out.join(RECORD), |f| {
            f.write_all(format!("{:#}\n", Value::Object(record)).as_bytes())
        })?)
    }

    /// Hands out all samples in order: (B, C, H, W).
    fn each(
        &self,
        from: From,
        visit: impl FnMut(&Tensor) -> tinyfusion::core::Result<()>,
    ) -> Result<()> {
        match from {
            From::Parts => self.parts.each(visit)?,
            From::Npz => each_image(&self.out.join(NPZ), self.numbers.len(), visit)?,
        }
        Ok(())
    }

    /// samples.npz: arr_0 of images (N, H, W, C) u8 or of latents (N, C, H, W) f32, and arr_1 of labels (N,).
    /// Its size in bytes.
    fn npz(&self) -> Result<u64> {
        let path = self.out.join(NPZ);
        // A writer that can seek, which that of other files cannot.
        let mut scratch = tempfile::Builder::new();
        scratch.prefix(".samples-").suffix(".partial");
        // The library's default is private to the user; samples follow the umask like other files.
        #[cfg(unix)]
        scratch.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let scratch = scratch
            .tempfile_in(self.out)
            .map_err(|e| Error::file(self.out, e))?;
        let failed = |e: io::Error| Error::file(&path, e);
        let mut npz = NpzWriter::new(BufWriter::new(scratch.as_file()));
        let mut begun = false;
        self.parts.each(|x| {
            let (_, c, h, w) = x.dims4()?;
            let count = self.numbers.len();
            let pixels = x.dtype() == DType::U8;
            if !begun {
                match pixels {
                    true => npz.array(IMAGES, "|u1", &[count, h, w, c]),
                    false => npz.array(IMAGES, "<f4", &[count, c, h, w]),
                }
                .map_err(failed)?;
                begun = true;
            }
            let bytes = match pixels {
                true => x.permute((0, 2, 3, 1))?.flatten_all()?.to_vec1::<u8>()?,
                false => {
                    let values = x.flatten_all()?.to_vec1::<f32>()?;
                    values.into_iter().flat_map(f32::to_le_bytes).collect()
                }
            };
            npz.write_all(&bytes).map_err(failed)
        })?;
        let labels = self.numbers.clone().map(|i| i64::from(self.classes.of(i)));
        let labels: Vec<u8> = labels.flat_map(i64::to_le_bytes).collect();
        npz.array("arr_1", "<i8", &[self.numbers.len()])
            .and_then(|()| npz.write_all(&labels))
            .and_then(|()| npz.finish()?.flush())
            .and_then(|()| scratch.as_file().sync_all())
            .map_err(failed)?;
        let bytes = scratch.as_file().metadata().map_err(failed)?.len();
        scratch.persist(&path).map_err(|e| failed(e.error))?;
        Ok(bytes)
    }

    /// grid.png: the first images, ten rows at most.
    fn grid(&self, columns: usize, from: From) -> Result<()> {
        let shown = self.numbers.len().min(columns.saturating_mul(10));
        let mut first: Vec<Tensor> = Vec::new();
        let mut left = shown;
        self.each(from, |x| {
            let rows = left.min(x.dim(0)?);
            if rows > 0 {
                first.push(x.narrow(0, 0, rows)?);
                left -= rows;
            }
            Ok(())
        })?;
        let picture = grid(&Tensor::cat(&first, 0)?, columns, 1)?;
        write_png(&self.out.join(GRID), &picture)
    }

    /// images/00000012.png, by the number of the image.
    fn png(&self, number: usize) -> PathBuf {
        self.out.join("images").join(format!("{number:08}.png"))
    }

    fn pngs(&self, from: From) -> Result<()> {
        let folder = self.out.join("images");
        fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, e))?;
        let mut number = self.numbers.start;
        self.each(from, |x| {
            let first = number;
            number += x.dim(0)?;
            let one = |i: usize| -> Result<()> {
                write_png(&self.png(first + i), &grid(&x.narrow(0, i, 1)?, 1, 0)?)
            };
            (0..x.dim(0)?)
                .into_par_iter()
                .try_for_each(one)
                .map_err(|e| Error::run(format!("{e:#}")))
        })
    }
}

fn write_png(path: &Path, picture: &image::RgbImage) -> Result<()> {
    let mut bytes = io::Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, image::ImageFormat::Png)
        .map_err(|e| Error::file(path, e))?;
    Ok(write_atomic(path, |f| f.write_all(bytes.get_ref()))?)
}
