//! Features of Inception-v3: FID as everybody means it.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::fid::{
    self, FeatureSet, ImageSet, Inception, Npz, Options, Provenance, ReferenceSet,
    StoredStatistics, Weights,
};
use tinyfusion::train::Stop;

use crate::output::progress_bar;

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
    // Too few samples are refused before the network runs for hours; what needs the reference's provenance comes after it.
    let sets = settings
        .samples
        .iter()
        .map(|path| Input::open(path))
        .collect::<Result<Vec<_>>>()?;
    let count: usize = sets.iter().map(Input::len).sum();
    fid::check_count("samples", count, options.force).map_err(|e| Error::usage(e.to_string()))?;
    let reference = network.reference(settings.reference, options)?;
    let mut samples: Option<FeatureSet> = None;
    for set in sets {
        let features = network.features(set)?;
        match &mut samples {
            None => samples = Some(features),
            Some(all) => all.append(&features)?,
        }
    }
    let Some(samples) = samples else {
        return Err(Error::usage("no samples were given").into());
    };
    let bar = progress_bar("metrics", 1);
    let found = fid::compare(&reference, &samples, options)?;
    bar.finish();

    let mut warnings = found.metrics.warnings.clone();
    if network.known.is_none() {
        warnings.insert(
            0,
            format!(
                "the weights (SHA-256 {}) are none of the known public files: the numbers compare with published ones only if they hold the same values",
                network.sha256
            ),
        );
    }
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

/// Images to run, or features that were kept.
pub(crate) enum Input {
    Images(ImageSet),
    Features(FeatureSet),
}

impl Input {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|e| e == "safetensors") {
            return Ok(Self::Features(FeatureSet::read(path)?));
        }
        Ok(Self::Images(ImageSet::open(path)?))
    }

    fn len(&self) -> usize {
        match self {
            Self::Images(images) => images.len(),
            Self::Features(features) => features.len(),
        }
    }
}

/// Inception with its weights, loaded when the first images need it.
pub(crate) struct Network<'a> {
    net: std::cell::OnceCell<Inception>,
    weights: Weights,
    pub(crate) sha256: String,
    pub(crate) known: Option<&'static str>,
    cache: Option<&'a Path>,
    stop: &'a Stop,
}

impl<'a> Network<'a> {
    pub(crate) fn open(weights: &Path, cache: Option<&'a Path>, stop: &'a Stop) -> Result<Self> {
        if let Some(folder) = cache {
            std::fs::create_dir_all(folder).map_err(|e| {
                Error::file(folder, format!("cannot be made a folder of features: {e}"))
            })?;
        }
        let weights = Weights::read(weights)?;
        weights.check_inception()?;
        Ok(Self {
            net: std::cell::OnceCell::new(),
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

    /// Statistics and images of a reference, as far as the metrics need them.
    fn reference(&self, path: &Path, options: &Options) -> Result<ReferenceSet> {
        let mut reference = ReferenceSet::default();
        let npz = path.is_file() && path.extension().is_none_or(|e| e != "safetensors");
        if npz {
            let mut file = Npz::open(path)?;
            reference.statistics = StoredStatistics::read(&mut file)?;
            let rows_needed =
                options.config.precision_recall.is_some() || options.config.kid.is_some();
            if reference.statistics.is_some() && !(rows_needed && file.has("arr_0")) {
                return Ok(reference);
            }
        }
        reference.features = Some(self.features(Input::open(path)?)?);
        Ok(reference)
    }

    /// The features of `input`, from the cache if they are there.
    pub(crate) fn features(&self, input: Input) -> Result<FeatureSet> {
        let images = match input {
            Input::Features(features) => return Ok(features),
            Input::Images(images) => images,
        };
        let provenance = Provenance::of(&images, &self.sha256)?;
        let kept = self
            .cache
            .map(|folder| folder.join(format!("{}.safetensors", &provenance.cache_key()[..32])));
        if let Some(path) = kept.as_ref().filter(|path| path.is_file()) {
            tracing::info!(
                "features of {} from {}",
                images.path().display(),
                path.display()
            );
            return Ok(FeatureSet::read(path)?);
        }
        let net = self.net()?;
        let bar = progress_bar("features", images.len() as u64);
        let done = |n: usize| bar.set(n as u64, String::new());
        let features = fid::extract(net, &images, provenance, &done, &|| self.stop.requested())?;
        bar.finish();
        let features = features.ok_or(Error::Stopped)?;
        if let Some(path) = &kept {
            write_atomic(path, |f| features.write(f))?;
        }
        Ok(features)
    }
}
