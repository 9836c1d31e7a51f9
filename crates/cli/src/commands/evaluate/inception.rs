//! Features of Inception-v3: FID as everybody means it.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::fid::{
    self, FeatureSet, Gaussian, ImageSet, Inception, Known, KnownReference, Npz, Options,
    Provenance, ReferenceSet, StoredStatistics, Weights,
};
use tinyfusion::train::Stop;

use crate::destination::check_destination;
use crate::output::{complain, progress_bar};

/// What `evaluate --weights` was asked for.
pub(super) struct Settings<'a> {
    pub(super) reference: &'a Path,
    pub(super) samples: &'a [PathBuf],
    pub(super) weights: &'a Path,
    pub(super) cache: Option<&'a Path>,
    pub(super) options: Options,
}

/// The report of `evaluate`.
pub(super) fn report(settings: &Settings<'_>, stop: &Stop) -> Result<Value> {
    let Settings { options, .. } = settings;
    let network = Network::open(settings.weights, settings.cache, stop)?;
    // Whatever headers, counts and hashes tell is refused here, before the network runs for hours.
    let samples = Input::open_all(settings.samples)?;
    let count = samples.iter().map(Input::len).sum();
    enough("samples", count, options)?;
    let reference = network.reference(settings.reference, options)?;
    let samples = samples
        .into_iter()
        .map(|input| network.look_up(input))
        .collect::<Result<Vec<_>>>()?;
    let known: Vec<Known<'_>> = samples.iter().map(Set::known).collect();
    let mut said = fid::check(&reference.known(), &known, options)?;
    said.splice(0..0, network.warning());
    for set in reference.images.iter().chain(&samples) {
        said.extend(set.provenance.warnings.iter().cloned());
    }
    said.dedup();
    warn(&said);

    let name = reference.name;
    let reference = ReferenceSet {
        statistics: reference.statistics,
        features: reference
            .images
            .map(|set| network.features(set))
            .transpose()?,
    };
    let samples = network.joined(samples)?;
    let bar = progress_bar("metrics", 1);
    let found = fid::compare(&reference, &samples, options)
        .map_err(|e| anyhow::Error::from(e).context(format!("{name} against the samples")))?;
    bar.finish();

    let mut warnings = found.metrics.warnings.clone();
    warnings.splice(0..0, network.warning());
    warn(warnings.iter().filter(|warning| !said.contains(warning)));
    let m = &found.metrics;
    Ok(json!({
        "fid": m.fid,
        "sfid": found.sfid,
        "inception_score": m.inception_score,
        "inception_score_std": m.inception_score_std,
        "precision": m.precision,
        "recall": m.recall,
        "kid": m.kid,
        "kid_std": m.kid_std,
        "label": m.fid_label(),
        "frechet": m.frechet,
        "features": "Inception-v3 2015-12-05, pool_3",
        "preprocessing": fid::PREPROCESSING,
        "distances": "exact (ADM's published precision and recall are of float16 distances)",
        "config": m.config,
        "weights": settings.weights,
        "weights_sha256": network.sha256,
        "weights_known_as": network.known,
        "reference": settings.reference,
        "reference_count": m.n_reference,
        "reference_image_count": m.n_reference_features,
        "reference_provenance": reference.statistics.as_ref().map(|s| &s.provenance),
        "reference_images": reference.features.as_ref().map(|f| &f.provenance),
        "samples": settings.samples,
        "sample_count": m.n_samples,
        "sample_images": samples.provenance,
        "tinyfusion": env!("CARGO_PKG_VERSION"),
        "warnings": warnings,
    }))
}

/// Too few images are a mistake in what was asked for, and `--force` the way out.
fn enough(what: &str, count: usize, options: &Options) -> Result<()> {
    Ok(fid::check_count(what, count, options.force).map_err(|e| Error::usage(e.to_string()))?)
}

/// On standard error: they are in the report too, but a number is easily quoted without it.
pub(crate) fn warn<'a>(warnings: impl IntoIterator<Item = &'a String>) {
    for warning in warnings {
        complain(format_args!("warning: {warning}"));
    }
}

/// Images to run, or features that were kept.
pub(crate) enum Input {
    Images(ImageSet),
    Features(PathBuf, FeatureSet),
}

impl Input {
    fn open(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|e| e == "safetensors") {
            return Ok(Self::Features(path.to_path_buf(), FeatureSet::read(path)?));
        }
        Ok(Self::Images(ImageSet::open(path)?))
    }

    pub(crate) fn open_all(paths: &[PathBuf]) -> Result<Vec<Self>> {
        paths.iter().map(|path| Self::open(path)).collect()
    }

    fn len(&self) -> usize {
        match self {
            Self::Images(images) => images.len(),
            Self::Features(_, features) => features.len(),
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Images(images) => images.path(),
            Self::Features(path, _) => path,
        }
    }
}

/// A set whose images were hashed and looked up in the cache: all that is known without the network.
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

/// A reference before its images went through the network.
struct Reference {
    name: String,
    statistics: Option<StoredStatistics>,
    images: Option<Set>,
}

impl Reference {
    fn known(&self) -> KnownReference<'_> {
        KnownReference {
            name: &self.name,
            statistics: self.statistics.as_ref(),
            images: self.images.as_ref().map(Set::known),
        }
    }
}

/// Inception with its weights, loaded when the first images need it.
pub(crate) struct Network<'a> {
    net: std::cell::OnceCell<Inception>,
    weights: Weights,
    /// The weight file in messages.
    name: String,
    pub(crate) sha256: String,
    pub(crate) known: Option<&'static str>,
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
            sha256: weights.sha256().to_owned(),
            known: weights.known(),
            weights,
            cache,
            stop,
        })
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
        self.known.is_none().then(|| {
            format!(
                "the weights (SHA-256 {}) are none of the known public files: the numbers compare with published ones only if they hold the same values",
                self.sha256
            )
        })
    }

    /// Statistics and images of a reference, as far as the metrics need them.
    fn reference(&self, path: &Path, options: &Options) -> Result<Reference> {
        let mut reference = Reference {
            name: path.display().to_string(),
            statistics: None,
            images: None,
        };
        let npz = path.is_file() && path.extension().is_none_or(|e| e != "safetensors");
        if npz {
            let mut file = Npz::open(path)?;
            reference.statistics = StoredStatistics::read(&mut file)?;
            if let Some(statistics) = &reference.statistics {
                if let Some(provenance) = &statistics.provenance {
                    provenance.check_weights(&reference.name, &self.name, &self.sha256)?;
                }
                // No covariance at all is found by taking it apart, which costs seconds.
                let spatial = statistics.spatial.as_ref().filter(|_| options.sfid);
                for part in [Some(&statistics.pool), spatial].into_iter().flatten() {
                    Gaussian::from_statistics(part).map_err(|e| Error::file(path, e))?;
                }
                if !(options.config.needs_reference_rows() && file.has("arr_0")) {
                    return Ok(reference);
                }
            }
        }
        let input = Input::open(path)?;
        if reference.statistics.is_none() {
            enough("reference images", input.len(), options)?;
        }
        reference.images = Some(self.look_up(input)?);
        Ok(reference)
    }

    /// Hashes the images of `input` and looks their features up in the cache.
    pub(crate) fn look_up(&self, input: Input) -> Result<Set> {
        let (name, count) = (input.path().display().to_string(), input.len());
        let images = match input {
            Input::Features(_, features) => {
                let provenance = features.provenance.clone();
                provenance.check_weights(&name, &self.name, &self.sha256)?;
                return Ok(Set {
                    name,
                    provenance,
                    count,
                    content: Content::Features(features),
                });
            }
            Input::Images(images) => images,
        };
        let provenance = Provenance::of(&images, &self.sha256)?;
        let key = provenance.cache_key();
        let kept = self
            .cache
            .map(|folder| folder.join(format!("{}.safetensors", &key[..32])));
        let content = match &kept {
            Some(path) if path.is_file() => {
                tracing::info!("features of {name} from {}", path.display());
                Content::Features(kept_features(path, &key, count)?)
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

    /// The features of `set`: kept ones, or the network runs.
    fn features(&self, set: Set) -> Result<FeatureSet> {
        let (images, kept) = match set.content {
            Content::Features(features) => return Ok(features),
            Content::Images(images, kept) => (images, kept),
        };
        let net = self.net()?;
        let bar = progress_bar("features", images.len() as u64);
        let done = |n: usize| bar.set(n as u64, String::new());
        let stop = || self.stop.requested();
        let features = fid::extract(net, &images, set.provenance, &done, &stop)?;
        bar.finish();
        let features = features.ok_or(Error::Stopped)?;
        if let Some(path) = &kept {
            write_atomic(path, |f| features.write(f))?;
        }
        Ok(features)
    }

    /// The features of all shards, in their order.
    pub(crate) fn joined(&self, sets: Vec<Set>) -> Result<FeatureSet> {
        let mut all: Option<FeatureSet> = None;
        for set in sets {
            let features = self.features(set)?;
            match &mut all {
                None => all = Some(features),
                Some(all) => all.append(&features)?,
            }
        }
        all.ok_or_else(|| Error::usage("no images were given").into())
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
