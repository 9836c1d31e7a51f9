//! What `evaluate` and `stats` are given, and the network that its images go through.

use std::path::{Path, PathBuf};

use anyhow::Result;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::fid::{
    self, FeatureSet, Gaussian, ImageSet, Inception, Keep, Known, Npz, Provenance, Sink,
    StatisticsSums, StoredStatistics, Weights, Work,
};
use tinyfusion::train::Stop;

use crate::destination::check_destination;
use crate::output::{self, progress_bar};

/// The array of images in ADM's files.
const IMAGES: &str = "arr_0";

/// On standard error: they are in the report too, but a number is easily quoted without it.
pub(crate) fn warn<'a>(warnings: impl IntoIterator<Item = &'a String>) {
    for warning in warnings {
        output::warn(format_args!("{warning}"));
    }
}

/// What a path holds, as far as headers tell.
pub(crate) struct Input {
    path: PathBuf,
    pub(crate) statistics: Option<StoredStatistics>,
    rows: Option<Rows>,
}

/// Images to run, or features that were kept.
enum Rows {
    Images(ImageSet),
    Features(FeatureSet),
}

impl Input {
    /// By ADM's rule statistics go before images. `rows`: whether images beside statistics are needed, too.
    pub(crate) fn open(path: &Path, rows: bool) -> Result<Self> {
        Self::read(path, |npz| {
            let statistics = StoredStatistics::read(npz)?;
            let images = npz.has(IMAGES) && rows;
            Ok((images || statistics.is_none(), statistics))
        })
    }

    /// To make statistics of: where there are images, statistics beside them are of others and left aside.
    pub(crate) fn to_count(path: &Path) -> Result<Self> {
        Self::read(path, |npz| match npz.has(IMAGES) {
            true => Ok((true, None)),
            false => {
                let statistics = StoredStatistics::read(npz)?;
                Ok((statistics.is_none(), statistics))
            }
        })
    }

    /// `look` tells of an .npz whether its images are wanted, and its statistics.
    fn read(
        path: &Path,
        look: impl Fn(&mut Npz) -> Result<(bool, Option<StoredStatistics>)>,
    ) -> Result<Self> {
        let mut input = Self {
            path: path.to_path_buf(),
            statistics: None,
            rows: None,
        };
        let mut wanted = true;
        if path.extension().is_some_and(|e| e == "safetensors") {
            input.rows = Some(Rows::Features(FeatureSet::read(path)?));
            return Ok(input);
        }
        if path.is_file() {
            (wanted, input.statistics) = look(&mut Npz::open(path)?)?;
        }
        if wanted {
            let images = ImageSet::open(path)?;
            input.path = images.path().to_path_buf();
            input.rows = Some(Rows::Images(images));
        }
        Ok(input)
    }

    /// Images whose features are there or will be.
    pub(crate) fn rows(&self) -> usize {
        match &self.rows {
            Some(Rows::Images(images)) => images.len(),
            Some(Rows::Features(features)) => features.len(),
            None => 0,
        }
    }
}

/// What a path holds, hashed and looked up in the cache: all that is known without the network.
pub(crate) struct Shard {
    pub(crate) name: String,
    pub(crate) statistics: Option<StoredStatistics>,
    pub(crate) set: Option<Set>,
    /// SHA-256 of the file, or over the files of a folder.
    pub(crate) sha256: String,
}

impl Shard {
    /// What is to be checked of it as a part of statistics.
    pub(crate) fn known(&self) -> Option<Known<'_>> {
        if let Some(set) = &self.set {
            return Some(set.known());
        }
        let statistics = self.statistics.as_ref()?;
        Some(Known {
            name: &self.name,
            provenance: statistics.provenance.as_ref()?,
            count: statistics.pool.n()? as usize,
        })
    }
}

/// Images or features of a shard.
pub(crate) struct Set {
    name: String,
    provenance: Provenance,
    count: usize,
    content: Content,
}

enum Content {
    /// To run, and where to keep the features.
    Images(ImageSet, Option<PathBuf>),
    Features(FeatureSet),
}

impl Set {
    pub(crate) fn known(&self) -> Known<'_> {
        Known {
            name: &self.name,
            provenance: &self.provenance,
            count: self.count,
        }
    }
}

/// Inception with its weights, loaded when the first images need it.
pub(crate) struct Network<'a> {
    net: std::cell::OnceCell<Inception>,
    weights: Weights,
    /// The weight file in messages.
    name: String,
    cache: Option<&'a Path>,
    stop: &'a Stop,
}

impl<'a> Network<'a> {
    pub(crate) fn open(weights: &Path, cache: Option<&'a Path>, stop: &'a Stop) -> Result<Self> {
        if let Some(folder) = cache {
            std::fs::create_dir_all(folder).map_err(|e| {
                Error::file(
                    folder,
                    format!("--cache: cannot be made a folder of features: {e}"),
                )
            })?;
            check_destination("--cache", &folder.join("features"), [])?;
        }
        let name = weights.display().to_string();
        let weights = Weights::read(weights)?;
        weights.check_inception()?;
        Ok(Self {
            net: std::cell::OnceCell::new(),
            name,
            weights,
            cache,
            stop,
        })
    }

    pub(crate) fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Whether features are kept, for which all of them have to be there.
    pub(crate) fn keeps(&self) -> bool {
        self.cache.is_some()
    }

    fn net(&self) -> Result<&Inception> {
        if let Some(net) = self.net.get() {
            return Ok(net);
        }
        let net = Inception::new(&self.weights)?;
        Ok(self.net.get_or_init(|| net))
    }

    /// Said of a weight file that nobody knows.
    pub(crate) fn warning(&self) -> Option<String> {
        self.weights.known().is_none().then(|| {
            format!(
                "the weights (SHA-256 {}) are none of the known public files: the numbers compare with published ones only if they hold the same values",
                self.weights.sha256()
            )
        })
    }

    /// Checks the statistics of `input`, hashes its images, and looks their features up in the cache. `spatial`: whether
    /// the statistics of sFID matter.
    pub(crate) fn look_up(&self, input: Input, spatial: bool) -> Result<Shard> {
        let Input {
            path,
            statistics,
            rows,
        } = input;
        let name = path.display().to_string();
        if let Some(statistics) = &statistics {
            if let Some(provenance) = &statistics.provenance {
                provenance.check_weights(&name, &self.name, &self.weights)?;
            }
            // No covariance at all is found by taking it apart, which costs seconds.
            let spatial = statistics.spatial.as_ref().filter(|_| spatial);
            for part in [Some(&statistics.pool), spatial].into_iter().flatten() {
                Gaussian::from_statistics(part).map_err(|e| Error::file(&path, e))?;
            }
        }
        let set = rows
            .map(|rows| self.look_up_rows(name.clone(), rows))
            .transpose()?;
        let feature_file = path.extension().is_some_and(|e| e == "safetensors");
        let sha256 = match &set {
            Some(set) if !feature_file => set.provenance.images_sha256.clone(),
            _ => fid::file_sha256(&path)?,
        };
        Ok(Shard {
            name,
            statistics,
            set,
            sha256,
        })
    }

    fn look_up_rows(&self, name: String, rows: Rows) -> Result<Set> {
        let images = match rows {
            Rows::Features(features) => {
                let provenance = features.provenance.clone();
                provenance.check_weights(&name, &self.name, &self.weights)?;
                return Ok(Set {
                    name,
                    provenance,
                    count: features.len(),
                    content: Content::Features(features),
                });
            }
            Rows::Images(images) => images,
        };
        let count = images.len();
        let provenance = Provenance::of_weights(&images, &self.weights)?;
        let key = provenance.cache_key();
        let kept = self
            .cache
            .map(|folder| folder.join(format!("{}.safetensors", &key[..32])));
        let content = match &kept {
            Some(path) if path.is_file() => {
                tracing::info!("features of {name} from {}", path.display());
                let mut features = kept_features(path, &key, count)?;
                // Of the images as they lie here: what is warned of may have changed since, and the example's name.
                features.provenance = provenance.clone();
                Content::Features(features)
            }
            _ => Content::Images(images, kept),
        };
        Ok(Set {
            name,
            provenance,
            count,
            content,
        })
    }

    /// Runs images into a sink.
    fn run(&self, images: &ImageSet, sink: &mut dyn Sink) -> Result<()> {
        let net = self.net()?;
        let bar = progress_bar("features", images.len() as u64);
        let work = Work {
            batch: None,
            progress: &|n| bar.set(n as u64, String::new()),
            stop: &|| self.stop.requested(),
        };
        let done = fid::extract_into(net, images, sink, &work)?;
        bar.finish();
        match done {
            true => Ok(()),
            false => Err(Error::Stopped.into()),
        }
    }

    /// The features of `set`: kept ones, or the network runs, with room for `room` images.
    fn features(&self, set: Set, keep: Keep, room: usize) -> Result<FeatureSet> {
        let (images, kept) = match set.content {
            Content::Features(features) => return Ok(features),
            Content::Images(images, kept) => (images, kept),
        };
        // A file of the cache serves every metric.
        let keep = if kept.is_some() { Keep::ALL } else { keep };
        let mut features = FeatureSet::new(set.provenance, keep, room.max(images.len()));
        self.run(&images, &mut features)?;
        if let Some(path) = &kept {
            write_atomic(path, |f| features.write(f))?;
        }
        Ok(features)
    }

    /// The features of all shards, in their order.
    pub(crate) fn joined(&self, sets: Vec<Set>, keep: Keep) -> Result<FeatureSet> {
        let total: usize = sets.iter().map(|set| set.count).sum();
        let mut all: Option<FeatureSet> = None;
        for set in sets {
            match &mut all {
                None => {
                    let mut first = self.features(set, keep, total)?;
                    first.reserve(total - first.len());
                    all = Some(first);
                }
                Some(all) => all.append(&self.features(set, keep, 0)?)?,
            }
        }
        all.ok_or_else(|| Error::usage("no images were given").into())
    }

    /// The statistics of all shards, in their order: of statistics, features and images, whose features stream by.
    pub(crate) fn statistics(&self, shards: Vec<Shard>, spatial: bool) -> Result<StoredStatistics> {
        let mut sums = StatisticsSums::new(spatial)?;
        for shard in shards {
            match (shard.set, &shard.statistics) {
                (Some(set), _) => match set.content {
                    Content::Images(images, None) => {
                        sums.begin(&set.provenance)?;
                        self.run(&images, &mut sums)?;
                    }
                    _ => sums.add(&self.features(set, Keep::ALL, 0)?)?,
                },
                (None, Some(statistics)) => sums
                    .merge(statistics)
                    .map_err(|e| Error::file(&shard.name, e))?,
                (None, None) => {}
            }
        }
        Ok(sums.finish()?)
    }
}

/// Features from the cache, which must be those that their name stands for.
fn kept_features(path: &Path, key: &str, count: usize) -> Result<FeatureSet> {
    let damaged = |what: &dyn std::fmt::Display| {
        Error::file(
            path,
            format!("{what}; delete this file of the cache, and the network runs again"),
        )
    };
    let features = FeatureSet::read(path)
        .map_err(|e| damaged(&e.to_string().replace(&format!("{}: ", path.display()), "")))?;
    if features.provenance.cache_key() != key || features.len() != count {
        return Err(damaged(&format!(
            "holds {} features of other images or weights than its name says, expected {count}",
            features.len()
        ))
        .into());
    }
    Ok(features)
}
