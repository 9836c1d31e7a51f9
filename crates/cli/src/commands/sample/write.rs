//! The files of a run whose samples are all there.

use std::fs;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde_json::{Map, Value};
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::data::grid;

use super::classes::Classes;
use super::npz::NpzWriter;
use super::parts::{Parts, differs};
use crate::output::say;

const NPZ: &str = "samples.npz";
const RECORD: &str = "sample.json";

/// Whether `out` holds the samples of these settings already, with all that is asked for.
pub(super) fn is_done(out: &Path, settings: &Map<String, Value>) -> Result<bool> {
    let Ok(text) = fs::read_to_string(out.join(RECORD)) else {
        return Ok(false);
    };
    let Ok(Value::Object(mut there)) = serde_json::from_str::<Value>(&text) else {
        return Ok(false);
    };
    for of_the_run in ["seconds", "images_per_second"] {
        there.remove(of_the_run);
    }
    let same = |key: &str| there.get(key) == settings.get(key);
    Ok(out.join(NPZ).is_file()
        && differs(&there, settings).is_none()
        && same("grid_columns")
        && same("pngs"))
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
        self.npz()?;
        if let Some(columns) = self.grid_columns {
            self.grid(columns)?;
        }
        if self.pngs {
            self.pngs()?;
        }
        let speed = (drawn > 0).then(|| drawn as f64 / seconds);
        let mut record = settings;
        record.insert("seconds".into(), seconds.into());
        record.insert("images_per_second".into(), speed.into());
        write_atomic(self.out.join(RECORD), |f| {
            f.write_all(format!("{:#}\n", Value::Object(record)).as_bytes())
        })?;
        let what = match self.grid_columns {
            Some(_) => "images",
            None => "latents (pictures need --vae)",
        };
        let speed = speed.map_or("all drawn before".into(), |s| format!("{s:.1} a second"));
        let (out, count) = (self.out.display(), self.numbers.len());
        Ok(say!("{out}: {count} {what}, {speed}")?)
    }

    /// samples.npz: arr_0 of images (N, H, W, C) u8 or of latents (N, C, H, W) f32, and arr_1 of labels (N,).
    fn npz(&self) -> Result<()> {
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
                    true => npz.array("arr_0", "|u1", &[count, h, w, c]),
                    false => npz.array("arr_0", "<f4", &[count, c, h, w]),
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
        scratch.persist(&path).map_err(|e| failed(e.error))?;
        Ok(())
    }

    /// grid.png: the first images, ten rows at most.
    fn grid(&self, columns: usize) -> Result<()> {
        let shown = self.numbers.len().min(columns.saturating_mul(10));
        let mut first: Vec<Tensor> = Vec::new();
        let mut left = shown;
        self.parts.each(|x| {
            let rows = left.min(x.dim(0)?);
            if rows > 0 {
                first.push(x.narrow(0, 0, rows)?);
                left -= rows;
            }
            Ok(())
        })?;
        let picture = grid(&Tensor::cat(&first, 0)?, columns, 1)?;
        write_png(&self.out.join("grid.png"), &picture)
    }

    /// images/00000012.png, by the number of the image.
    fn pngs(&self) -> Result<()> {
        let folder = self.out.join("images");
        fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, e))?;
        let mut number = self.numbers.start;
        let mut pending: Vec<(usize, Tensor)> = Vec::new();
        self.parts.each(|x| {
            for i in 0..x.dim(0)? {
                pending.push((number, x.narrow(0, i, 1)?));
                number += 1;
            }
            let one = |(number, x): (usize, Tensor)| -> Result<()> {
                write_png(&folder.join(format!("{number:08}.png")), &grid(&x, 1, 0)?)
            };
            std::mem::take(&mut pending)
                .into_par_iter()
                .try_for_each(one)
                .map_err(|e| Error::run(format!("{e:#}")))
        })?;
        Ok(())
    }
}

fn write_png(path: &Path, picture: &image::RgbImage) -> Result<()> {
    let mut bytes = io::Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, image::ImageFormat::Png)
        .map_err(|e| Error::file(path, e))?;
    Ok(write_atomic(path, |f| f.write_all(bytes.get_ref()))?)
}
