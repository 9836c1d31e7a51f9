use crate::check::{Known, check_shards};
use crate::extract::Sink;
use crate::statistics::CHUNK;
use crate::{
    Accumulator, Error, FeatureMatrix, FeatureSet, ImageFeatures, Provenance, Result,
    StoredStatistics,
};

/// Statistics of images that stream by: a [`Sink`] of [`extract_into`](crate::extract_into) whose memory does not grow
/// with their number (84 MB).
///
/// Features are summed in blocks of a fixed number of rows, in the order of the images, whatever batches they come in.
/// So shards that go through one of these after the other give what the whole set would, bit for bit. Statistics that
/// were finished elsewhere [`merge`](Self::merge) to rounding: 1e-12 of the largest entry, as the tests demand; the
/// number of images stays exact.
#[derive(Debug, Clone)]
pub struct StatisticsSums {
    pool: Rows,
    /// Of sFID, if it is wanted and every part had it.
    spatial: Option<Rows>,
    origin: Origin,
}

#[derive(Debug, Clone)]
enum Origin {
    /// Nothing was added yet.
    Nothing,
    /// One set of statistics that does not say where it is from.
    Unknown,
    Known(Provenance),
}

/// Sums of features, and the rows that do not fill a block yet.
#[derive(Debug, Clone)]
struct Rows {
    sums: Accumulator,
    waiting: Vec<f32>, // (< CHUNK, D)
    columns: usize,
}

impl Rows {
    fn new(columns: usize) -> Result<Self> {
        Ok(Self {
            sums: Accumulator::new(columns)?,
            waiting: Vec::with_capacity(CHUNK * columns),
            columns,
        })
    }

    fn take(&mut self, row: &[f32]) -> Result<()> {
        self.waiting.extend_from_slice(row);
        if self.waiting.len() >= CHUNK * self.columns {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let rows = self.waiting.len() / self.columns;
        if rows > 0 {
            let block = FeatureMatrix::new(&self.waiting, rows, self.columns)?;
            self.sums.push(block)?;
            self.waiting.clear();
        }
        Ok(())
    }

    fn merge(&mut self, other: &crate::Statistics) -> Result<()> {
        self.flush()?;
        self.sums.merge(&Accumulator::from_statistics(other)?)
    }
}

impl Sink for StatisticsSums {
    fn take(&mut self, features: &ImageFeatures) -> Result<()> {
        self.pool.take(&features.pool)?;
        match &mut self.spatial {
            Some(rows) => rows.take(&features.spatial),
            None => Ok(()),
        }
    }
}

impl StatisticsSums {
    /// Nothing yet; `spatial`: whether the statistics of sFID are wanted too.
    pub fn new(spatial: bool) -> Result<Self> {
        Ok(Self {
            pool: Rows::new(ImageFeatures::POOL)?,
            spatial: spatial
                .then(|| Rows::new(ImageFeatures::SPATIAL))
                .transpose()?,
            origin: Origin::Nothing,
        })
    }

    /// The images that come next are a shard of this origin.
    ///
    /// # Errors
    /// When they are of another network, preprocessing or size than those before.
    pub fn begin(&mut self, provenance: &Provenance) -> Result<()> {
        match &mut self.origin {
            Origin::Nothing => self.origin = Origin::Known(provenance.clone()),
            Origin::Unknown => return Err(unknown()),
            Origin::Known(ours) => {
                let known = |name, provenance| Known {
                    name,
                    provenance,
                    count: 0,
                };
                check_shards(&known("a shard", ours), &[known("another", provenance)])?;
                ours.append(provenance);
            }
        }
        Ok(())
    }

    /// Adds a shard whose features are there.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub fn add(&mut self, features: &FeatureSet) -> Result<()> {
        self.begin(&features.provenance)?;
        if !features.has_spatial() {
            self.spatial = None;
        }
        for row in features.pool()?.iter() {
            self.pool.take(row)?;
        }
        if let Some(rows) = &mut self.spatial {
            for row in features.spatial()?.iter() {
                rows.take(row)?;
            }
        }
        Ok(())
    }

    /// Adds a shard of which only the statistics are there.
    ///
    /// # Errors
    /// When they do not say over how many images they were taken, or, beside other shards, of which network they are;
    /// otherwise as [`begin`](Self::begin).
    pub fn merge(&mut self, statistics: &StoredStatistics) -> Result<()> {
        match (&statistics.provenance, &self.origin) {
            (Some(provenance), _) => self.begin(provenance)?,
            (None, Origin::Nothing) => self.origin = Origin::Unknown,
            (None, _) => return Err(unknown()),
        }
        self.pool.merge(&statistics.pool)?;
        match (&mut self.spatial, &statistics.spatial) {
            (Some(rows), Some(spatial)) => rows.merge(spatial)?,
            _ => self.spatial = None,
        }
        Ok(())
    }

    /// Number of images so far.
    pub fn n(&self) -> u64 {
        self.pool.sums.n() + (self.pool.waiting.len() / self.pool.columns) as u64
    }

    /// The statistics of all that was added (at least two images).
    pub fn finish(mut self) -> Result<StoredStatistics> {
        self.pool.flush()?;
        let spatial = self.spatial.map(|mut rows| {
            rows.flush()?;
            rows.sums.finish()
        });
        Ok(StoredStatistics {
            pool: self.pool.sums.finish()?,
            spatial: spatial.transpose()?,
            provenance: match self.origin {
                Origin::Known(provenance) => Some(provenance),
                Origin::Nothing | Origin::Unknown => None,
            },
            warnings: Vec::new(),
        })
    }
}

fn unknown() -> Error {
    Error::Refused(
        "one of the statistics does not say which network and resize made it, so it cannot be put together with others; only those of `tinyfusion stats` can".into(),
    )
}
