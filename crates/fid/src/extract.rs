use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::check::same_network;
use crate::hash::sha256;
use crate::input::{Batch, Unread};
use crate::{
    Error, FeatureMatrix, ImageFeatures, ImageSet, Inception, Known, Result, Statistics,
    check_shards,
};

/// How images reach the network, as written beside everything that was computed from it.
pub const PREPROCESSING: &str = "uint8, TF1 bilinear to 299 x 299, (x - 128) / 128";

/// Key of a feature file's metadata, and the only value of its `format`.
const METADATA: &str = "tinyfusion_fid";
const FORMAT: u32 = 1;

/// Images handed to the threads at a time.
const BATCH: usize = 32;

/// Where features or statistics come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// SHA-256 of the images: of the `.npz`, or over all files of a folder; several shards are joined by `+`.
    pub images_sha256: String,
    /// SHA-256 of the weight file.
    pub weights_sha256: String,
    /// [`PREPROCESSING`] of whoever made them.
    pub preprocessing: String,
    /// (height, width) of the images.
    pub size: [usize; 2],
    /// Warnings about the images.
    pub warnings: Vec<String>,
}

/// The network's features of a set of images.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureSet {
    /// Where they come from.
    pub provenance: Provenance,
    n: usize,
    pool: Vec<f32>,    // (N, 2048)
    spatial: Vec<f32>, // (N, 2023)
    logits: Vec<f32>,  // (N, 1008)
}

/// Runs every image of `images` through `net`, one image per thread.
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
    let mut set = FeatureSet {
        provenance,
        n: 0,
        pool: Vec::new(),
        spatial: Vec::new(),
        logits: Vec::new(),
    };
    let size = images.size();
    let bytes = size[0] * size[1] * 3;
    let stopped = AtomicBool::new(false);
    let mut failures: Vec<Unread> = Vec::new();
    images
        .for_each_batch(BATCH.max(4 * rayon::current_num_threads()), &mut |batch| {
            let ask = || {
                if stop() {
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
                    Ok(features) => set.push(&features, images.path())?,
                }
            }
            progress(set.n);
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
    if stopped.load(Relaxed) {
        return Ok(None);
    }
    images.unreadable(&failures)?;
    Ok(Some(set))
}

impl FeatureSet {
    /// Number of images N.
    pub fn len(&self) -> usize {
        self.n
    }

    /// What [`check`](crate::check) wants to know of it.
    pub fn known<'a>(&'a self, name: &'a str) -> Known<'a> {
        Known {
            name,
            provenance: &self.provenance,
            count: self.n,
        }
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// The features of FID, precision, recall and KID (N × 2048).
    pub fn pool(&self) -> Result<FeatureMatrix<'_>> {
        FeatureMatrix::new(&self.pool, self.n, ImageFeatures::POOL)
    }

    /// The features of sFID (N × 2023).
    pub fn spatial(&self) -> Result<FeatureMatrix<'_>> {
        FeatureMatrix::new(&self.spatial, self.n, ImageFeatures::SPATIAL)
    }

    /// The logits of the Inception Score, without bias (N × 1008).
    pub fn logits(&self) -> Result<FeatureMatrix<'_>> {
        FeatureMatrix::new(&self.logits, self.n, ImageFeatures::LOGITS)
    }

    /// Mean and covariance for FID and for sFID.
    pub fn statistics(&self) -> Result<[Statistics; 2]> {
        Ok([
            Statistics::of(self.pool()?)?,
            Statistics::of(self.spatial()?)?,
        ])
    }

    fn push(&mut self, features: &ImageFeatures, path: &Path) -> Result<()> {
        if let Some(value) = features
            .pool
            .iter()
            .chain(&features.logits)
            .find(|v| !v.is_finite())
        {
            let n = self.n;
            return Err(Error::file(
                path,
                format!("the network makes {value} of image {n}; the weights are damaged"),
            ));
        }
        self.pool.extend_from_slice(&features.pool);
        self.spatial.extend_from_slice(&features.spatial);
        self.logits.extend_from_slice(&features.logits);
        self.n += 1;
        Ok(())
    }

    /// Puts the images of `other` behind these: what is computed of shards in their order is what would be computed
    /// of the whole set, bit for bit.
    ///
    /// # Errors
    /// When the two were made with different weights or preprocessing, or of images of different sizes.
    pub fn append(&mut self, other: &Self) -> Result<()> {
        let (ours, theirs) = (&self.provenance, &other.provenance);
        check_shards(&self.known("a shard"), &[other.known("another")])?;
        let joined = format!("{}+{}", ours.images_sha256, theirs.images_sha256);
        self.provenance.images_sha256 = joined;
        for warning in &theirs.warnings {
            if !self.provenance.warnings.contains(warning) {
                self.provenance.warnings.push(warning.clone());
            }
        }
        self.pool.extend_from_slice(&other.pool);
        self.spatial.extend_from_slice(&other.spatial);
        self.logits.extend_from_slice(&other.logits);
        self.n += other.n;
        Ok(())
    }

    fn parts(&self) -> [(&'static str, &[f32], usize); 3] {
        [
            ("logits", &self.logits, ImageFeatures::LOGITS),
            ("pool", &self.pool, ImageFeatures::POOL),
            ("spatial", &self.spatial, ImageFeatures::SPATIAL),
        ]
    }

    /// Writes a `.safetensors` with `pool`, `spatial`, `logits` and their provenance.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let stored = Stored {
            format: FORMAT,
            provenance: self.provenance.clone(),
        };
        let metadata = serde_json::json!({ METADATA: serde_json::to_string(&stored)? });
        let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), metadata)]);
        let mut at = 0;
        for (name, values, columns) in self.parts() {
            let end = at + size_of_val(values);
            let entry = serde_json::json!({ "dtype": "F32", "shape": [self.n, columns], "data_offsets": [at, end] });
            header.insert(name.to_owned(), entry);
            at = end;
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, values, _) in self.parts() {
            for values in values.chunks(1 << 16) {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                out.write_all(&bytes)?;
            }
        }
        Ok(())
    }

    /// Reads what [`write`](Self::write) has written.
    ///
    /// # Errors
    /// When the file is something else, damaged, or its features are not finite.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed = |message: String| {
            Error::file(
                path,
                format!("not a feature file of `tinyfusion stats`: {message}"),
            )
        };
        let unread = |e: io::Error| failed(e.to_string());
        let file = std::fs::File::open(path).map_err(unread)?;
        let length = file.metadata().map_err(unread)?.len();
        let mut file = BufReader::with_capacity(1 << 20, file);
        let mut head = Vec::new();
        (&mut file).take(8).read_to_end(&mut head).map_err(unread)?;
        let size = head
            .first_chunk()
            .map(|n| u64::from_le_bytes(*n))
            .filter(|&n| n <= 1 << 20);
        let size = size.ok_or_else(|| failed("no header of a .safetensors".into()))?;
        (&mut file)
            .take(size)
            .read_to_end(&mut head)
            .map_err(unread)?;
        let header: safetensors::tensor::Metadata =
            serde_json::from_slice(head.get(8..).unwrap_or_default())
                .map_err(|e| failed(e.to_string()))?;
        let stored: Stored = header
            .metadata()
            .as_ref()
            .and_then(|m| serde_json::from_str(m.get(METADATA)?).ok())
            .filter(|stored: &Stored| stored.format == FORMAT)
            .ok_or_else(|| failed(format!("no metadata `{METADATA}` of format {FORMAT}")))?;
        if length != 8 + size + header.data_len() as u64 {
            return Err(failed(format!(
                "{length} bytes, expected {}",
                8 + size + header.data_len() as u64
            )));
        }
        let mut parts = BTreeMap::new();
        for name in header.offset_keys() {
            let info = header
                .info(&name)
                .ok_or_else(|| failed(format!("`{name}`")))?;
            let count = (info.data_offsets.1 - info.data_offsets.0) / 4;
            if info.dtype != safetensors::Dtype::F32 {
                return Err(failed(format!(
                    "`{name}` is {:?}, expected F32",
                    info.dtype
                )));
            }
            let mut values = Vec::with_capacity(count);
            let mut left = count * 4;
            while left > 0 {
                let mut bytes = vec![0; left.min(1 << 20)];
                file.read_exact(&mut bytes).map_err(unread)?;
                values.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
                left -= bytes.len();
            }
            parts.insert(name, (info.shape.clone(), values));
        }
        let n = parts
            .get("pool")
            .and_then(|(shape, _)| shape.first().copied())
            .unwrap_or(0);
        let mut part = |name: &str, columns: usize| {
            let (shape, values) = parts
                .remove(name)
                .ok_or_else(|| failed(format!("no `{name}`")))?;
            if shape != [n, columns] || n == 0 {
                return Err(failed(format!(
                    "`{name}` is {shape:?}, expected [N, {columns}]"
                )));
            }
            FeatureMatrix::new(&values, n, columns)
                .map_err(|e| failed(format!("`{name}`: {e}")))?;
            Ok(values)
        };
        Ok(Self {
            provenance: stored.provenance,
            n,
            pool: part("pool", ImageFeatures::POOL)?,
            spatial: part("spatial", ImageFeatures::SPATIAL)?,
            logits: part("logits", ImageFeatures::LOGITS)?,
        })
    }
}

/// The metadata of a feature file.
#[derive(Serialize, Deserialize)]
struct Stored {
    format: u32,
    provenance: Provenance,
}

impl Provenance {
    /// Hashes `images`, to go through the network whose weight file has the given SHA-256.
    pub fn of(images: &ImageSet, weights_sha256: &str) -> Result<Self> {
        Ok(Self {
            images_sha256: images.sha256()?,
            weights_sha256: weights_sha256.to_owned(),
            preprocessing: PREPROCESSING.to_owned(),
            size: images.size(),
            warnings: images.warnings(),
        })
    }

    /// Name under which features of the same images and weights are kept: a hash of all that they depend on.
    pub fn cache_key(&self) -> String {
        let [h, w] = self.size;
        let Self {
            images_sha256,
            weights_sha256,
            preprocessing,
            ..
        } = self;
        sha256(
            format!("{FORMAT} {images_sha256} {weights_sha256} {preprocessing} {h} {w}").as_bytes(),
        )
    }

    /// `name` was computed with the weight file `weights` of the given SHA-256, and with our preprocessing.
    ///
    /// # Errors
    /// Otherwise, with both names.
    pub fn check_weights(&self, name: &str, weights: &str, sha256: &str) -> Result<()> {
        let ours = Self {
            images_sha256: String::new(),
            weights_sha256: sha256.to_owned(),
            preprocessing: PREPROCESSING.to_owned(),
            size: self.size,
            warnings: Vec::new(),
        };
        same_network((name, self), (weights, &ours))
    }
}
