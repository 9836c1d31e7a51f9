use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Deserialize, Serialize};

use crate::extract::Sink;
use crate::provenance::FORMAT;
use crate::{
    Error, FeatureMatrix, ImageFeatures, Known, Provenance, Result, Statistics, check_shards,
};

/// Key of a feature file's metadata.
const METADATA: &str = "tinyfusion_fid";

/// Which features a [`FeatureSet`] keeps besides those of FID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// Those of sFID: as much memory again as those of FID.
    pub spatial: bool,
    /// The logits of the Inception Score: half as much.
    pub logits: bool,
}

impl Keep {
    /// Everything, as a feature file has it.
    pub const ALL: Self = Self {
        spatial: true,
        logits: true,
    };
}

/// The network's features of a set of images.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureSet {
    /// Where they come from.
    pub provenance: Provenance,
    n: usize,
    pool: Vec<f32>,            // (N, 2048)
    spatial: Option<Vec<f32>>, // (N, 2023)
    logits: Option<Vec<f32>>,  // (N, 1008)
}

impl Sink for FeatureSet {
    fn take(&mut self, features: &ImageFeatures) -> Result<()> {
        self.pool.extend_from_slice(&features.pool);
        if let Some(spatial) = &mut self.spatial {
            spatial.extend_from_slice(&features.spatial);
        }
        if let Some(logits) = &mut self.logits {
            logits.extend_from_slice(&features.logits);
        }
        self.n += 1;
        Ok(())
    }
}

impl FeatureSet {
    /// Nothing yet, with room for `images` of what `keep` says: a [`Sink`] of [`extract_into`](crate::extract_into).
    pub fn new(provenance: Provenance, keep: Keep, images: usize) -> Self {
        let room = |columns: usize| Vec::with_capacity(images.saturating_mul(columns));
        Self {
            provenance,
            n: 0,
            pool: room(ImageFeatures::POOL),
            spatial: keep.spatial.then(|| room(ImageFeatures::SPATIAL)),
            logits: keep.logits.then(|| room(ImageFeatures::LOGITS)),
        }
    }

    /// Makes room for more images, so that appending them copies nothing that is here.
    pub fn reserve(&mut self, images: usize) {
        let room = |values: &mut Vec<f32>, columns: usize| {
            values.reserve_exact(images.saturating_mul(columns));
        };
        room(&mut self.pool, ImageFeatures::POOL);
        if let Some(values) = &mut self.spatial {
            room(values, ImageFeatures::SPATIAL);
        }
        if let Some(values) = &mut self.logits {
            room(values, ImageFeatures::LOGITS);
        }
    }

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
    ///
    /// # Errors
    /// When they were not kept.
    pub fn spatial(&self) -> Result<FeatureMatrix<'_>> {
        let kept = self.spatial.as_ref().ok_or_else(|| not_kept("spatial"))?;
        FeatureMatrix::new(kept, self.n, ImageFeatures::SPATIAL)
    }

    /// The logits of the Inception Score, without bias (N × 1008).
    ///
    /// # Errors
    /// When they were not kept.
    pub fn logits(&self) -> Result<FeatureMatrix<'_>> {
        let kept = self.logits.as_ref().ok_or_else(|| not_kept("logits"))?;
        FeatureMatrix::new(kept, self.n, ImageFeatures::LOGITS)
    }

    /// Whether the features of sFID were kept.
    pub(crate) fn has_spatial(&self) -> bool {
        self.spatial.is_some()
    }

    /// Mean and covariance for FID and, where its features were kept, for sFID.
    pub fn statistics(&self) -> Result<(Statistics, Option<Statistics>)> {
        let spatial = self
            .has_spatial()
            .then(|| Statistics::of(self.spatial()?))
            .transpose()?;
        Ok((Statistics::of(self.pool()?)?, spatial))
    }

    /// Puts the images of `other` behind these: what is computed of shards in their order is what would be computed
    /// of the whole set, bit for bit. Features that one of the two did not keep are kept no longer.
    ///
    /// # Errors
    /// When the two were made with different weights or preprocessing, or of images of different sizes.
    pub fn append(&mut self, other: &Self) -> Result<()> {
        check_shards(&self.known("a shard"), &[other.known("another")])?;
        self.provenance.append(&other.provenance);
        self.pool.extend_from_slice(&other.pool);
        for (ours, theirs) in [
            (&mut self.spatial, &other.spatial),
            (&mut self.logits, &other.logits),
        ] {
            match (ours.as_mut(), theirs) {
                (Some(ours), Some(theirs)) => ours.extend_from_slice(theirs),
                _ => *ours = None,
            }
        }
        self.n += other.n;
        Ok(())
    }

    /// Writes a `.safetensors` with `pool`, `spatial`, `logits` and their provenance.
    ///
    /// # Errors
    /// When a part was not kept, or `out` fails.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let stored = Stored {
            format: FORMAT,
            provenance: self.provenance.clone(),
        };
        let part = |kept: &'_ Option<Vec<f32>>, name| match kept {
            Some(_) => Ok(()),
            None => Err(io::Error::other(not_kept(name).to_string())),
        };
        part(&self.spatial, "spatial")?;
        part(&self.logits, "logits")?;
        let parts: [(&str, &[f32], usize); 3] = [
            (
                "logits",
                self.logits.as_deref().unwrap_or_default(),
                ImageFeatures::LOGITS,
            ),
            ("pool", &self.pool, ImageFeatures::POOL),
            (
                "spatial",
                self.spatial.as_deref().unwrap_or_default(),
                ImageFeatures::SPATIAL,
            ),
        ];
        let mut at = 0;
        let tensors = parts.map(|(name, values, columns)| {
            let end = at + size_of_val(values);
            let info = TensorInfo {
                dtype: Dtype::F32,
                shape: vec![self.n, columns],
                data_offsets: (std::mem::replace(&mut at, end), end),
            };
            (name.to_owned(), info)
        });
        let metadata = HashMap::from([(METADATA.to_owned(), serde_json::to_string(&stored)?)]);
        let header = Metadata::new(Some(metadata), tensors.to_vec()).map_err(io::Error::other)?;
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, values, _) in parts {
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
        let header: Metadata = serde_json::from_slice(head.get(8..).unwrap_or_default())
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
            if info.dtype != Dtype::F32 {
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
            spatial: Some(part("spatial", ImageFeatures::SPATIAL)?),
            logits: Some(part("logits", ImageFeatures::LOGITS)?),
        })
    }
}

/// The metadata of a feature file.
#[derive(Serialize, Deserialize)]
struct Stored {
    format: u32,
    provenance: Provenance,
}

fn not_kept(name: &str) -> Error {
    Error::Config(format!(
        "the features `{name}` were not kept; ask for them when the images are run"
    ))
}
