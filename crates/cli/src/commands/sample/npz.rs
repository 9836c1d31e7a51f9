//! An `.npz` that is written piece by piece: fifty thousand images are ten gigabytes.

use std::io::{self, Seek, Write};
use std::path::Path;

use candle_core::{Device, Tensor};
use tinyfusion::core::{Error, Result};
use tinyfusion::fid::{self, Npz};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// The array of images or latents.
pub(super) const IMAGES: &str = "arr_0";

/// Writes arrays one after another, uncompressed, as `numpy.savez` does.
pub(super) struct NpzWriter<W: Write + Seek>(ZipWriter<W>);

impl<W: Write + Seek> NpzWriter<W> {
    pub(super) fn new(to: W) -> Self {
        Self(ZipWriter::new(to))
    }

    /// Begins an array; its values follow by [`Write`], in C order and little-endian.
    /// `descr` is numpy's name of their type: `|u1`, `<f4`, `<i8`.
    pub(super) fn array(&mut self, name: &str, descr: &str, shape: &[usize]) -> io::Result<()> {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .large_file(true);
        self.0
            .start_file(format!("{name}.npy"), options)
            .map_err(io::Error::other)?;
        let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
        let comma = if sizes.len() == 1 { "," } else { "" };
        let shape = format!("({}{comma})", sizes.join(", "));
        let mut header =
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
        // Magic, version, length and header end at a multiple of 64, so that the data can be mapped.
        const BEFORE: usize = 10;
        let total = (BEFORE + header.len() + 1).next_multiple_of(64);
        header.extend(std::iter::repeat_n(' ', total - BEFORE - header.len() - 1));
        header.push('\n');
        let length = u16::try_from(header.len()).map_err(io::Error::other)?;
        self.0.write_all(b"\x93NUMPY\x01\x00")?;
        self.0.write_all(&length.to_le_bytes())?;
        self.0.write_all(header.as_bytes())
    }

    pub(super) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// Ends the file.
    pub(super) fn finish(self) -> io::Result<W> {
        self.0.finish().map_err(io::Error::other)
    }
}

/// Hands out the `count` images of a finished samples.npz in order, some at a time: (B, 3, H, W) u8.
pub(super) fn each_image(
    path: &Path,
    count: usize,
    mut visit: impl FnMut(&Tensor) -> Result<()>,
) -> Result<()> {
    /// Images at a time: a batch of 256×256 is 12 MB.
    const BATCH: usize = 64;
    let mut npz = Npz::open(path).map_err(|e| Error::run(e.to_string()))?;
    let (found, [h, w]) = npz
        .image_shape(IMAGES)
        .map_err(|e| Error::run(e.to_string()))?;
    if found != count {
        return Err(Error::file(
            path,
            format!("holds {found} images, expected {count}; remove it to draw them again"),
        ));
    }
    // What `visit` says is no matter of the evaluation's: it is kept aside.
    let mut said = Ok(());
    let read = npz.for_each_batch(IMAGES, BATCH, &mut |bytes| {
        let shape = (bytes.len() / (h * w * 3), h, w, 3);
        said = Tensor::from_vec(bytes, shape, &Device::Cpu)
            .and_then(|x| x.permute((0, 3, 1, 2)))
            .map_err(Error::from)
            .and_then(|x| visit(&x));
        match &said {
            Ok(()) => Ok(()),
            Err(e) => Err(fid::Error::Config(e.to_string())),
        }
    });
    said?;
    read.map_err(|e| Error::run(e.to_string()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_evaluator_and_candle_read_it() {
        let file = tempfile::Builder::new().suffix(".npz").tempfile().unwrap();
        let mut npz = NpzWriter::new(io::BufWriter::new(file.reopen().unwrap()));
        npz.array("arr_0", "|u1", &[2, 1, 2, 3]).unwrap();
        npz.write_all(&[1, 2, 3, 4, 5, 6]).unwrap();
        npz.write_all(&[7, 8, 9, 10, 11, 12]).unwrap();
        npz.array("arr_1", "<i8", &[2]).unwrap();
        npz.write_all(&[5i64, -1].map(i64::to_le_bytes).concat())
            .unwrap();
        npz.finish().unwrap().flush().unwrap();

        let mut read = tinyfusion::fid::Npz::open(file.path()).unwrap();
        assert_eq!(read.image_shape("arr_0").unwrap(), (2, [1, 2]));
        assert_eq!(read.bytes("arr_0").unwrap().1, (1..13).collect::<Vec<u8>>());
        assert_eq!(read.integers("arr_1").unwrap(), (vec![2], vec![5, -1]));
        let arrays = candle_core::Tensor::read_npz(file.path()).unwrap();
        assert_eq!(arrays[0].1.dims(), [2, 1, 2, 3]);
    }
}
