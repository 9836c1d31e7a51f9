//! Features of Inception-v3: FID as everybody means it.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};
use tinyfusion::core::Error;
use tinyfusion::fid::{self, Keep, KnownSide, Options, Side, StatisticsSums, StoredStatistics};
use tinyfusion::train::Stop;

use super::network::{Input, Network, Set, Shard, warn};
use super::scores;
use crate::output::progress_bar;

/// Images whose features are kept where their statistics would do: the distance is then of the features themselves,
/// which is exact at any rank, and cheaper. Beyond, the covariance has full rank, and memory would grow.
const IN_MEMORY: usize = 4096;

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
    let wants_rows = options.config.needs_rows();
    let wants_images = wants_rows || options.config.inception_score.is_some();
    let inputs = settings
        .samples
        .iter()
        .map(|path| Input::open(path, wants_images))
        .collect::<Result<Vec<_>>>()?;
    enough("samples", &inputs, options)?;
    let input = Input::open(settings.reference, wants_rows)?;
    enough("reference images", std::slice::from_ref(&input), options)?;
    let reference = Content::of(vec![network.look_up(input, options.sfid)?], options)?;
    let shards = inputs.into_iter();
    let samples = shards
        .map(|input| network.look_up(input, options.sfid))
        .collect::<Result<Vec<_>>>()?;
    let samples = Content::of(samples, options)?;
    let checked = fid::check(&reference.known(), &samples.known(), options).map_err(asked)?;
    let mut said = checked.warnings;
    said.splice(0..0, network.warning());
    warn(&said);

    let options = checked.options;
    let rows = options.config.needs_rows();
    let logits = options.config.inception_score.is_some();
    let (name, hashes) = (reference.name.clone(), samples.hashes.clone());
    let reference_hash = reference.hashes.join("+");
    let reference = reference.run(&network, &options, rows, false)?;
    let samples = samples.run(&network, &options, rows || logits, logits)?;
    let bar = progress_bar("metrics", 1);
    let found = fid::compare(&reference, &samples, &options)
        .map_err(|e| anyhow::Error::from(e).context(format!("{name} against the samples")))?;
    bar.finish();

    // What was said before the run, and what the numbers say.
    let new = |warning: &&String| !said.contains(warning);
    let more: Vec<String> = found.metrics.warnings.iter().filter(new).cloned().collect();
    warn(&more);
    said.extend(more);
    let provenance = |side: &Side| {
        let images = side.features.as_ref().map(|f| f.provenance.clone());
        images.or_else(|| side.statistics.as_ref()?.provenance.clone())
    };
    let m = &found.metrics;
    let mut report = scores(m);
    report.extend([
        ("sfid".into(), json!(found.sfid)),
        ("features".into(), json!("Inception-v3 2015-12-05, pool_3")),
        ("preprocessing".into(), json!(fid::PREPROCESSING)),
        (
            "distances".into(),
            json!("exact (ADM's published precision and recall are of float16 distances)"),
        ),
        ("weights".into(), json!(settings.weights)),
        ("weights_sha256".into(), json!(network.weights().sha256())),
        (
            "weights_content_sha256".into(),
            json!(network.weights().content_sha256()),
        ),
        ("weights_known_as".into(), json!(network.weights().known())),
        ("reference".into(), json!(settings.reference)),
        ("reference_sha256".into(), json!(reference_hash)),
        (
            "reference_provenance".into(),
            json!(reference.statistics.as_ref().map(|s| &s.provenance)),
        ),
        (
            "reference_images".into(),
            json!(reference.features.as_ref().map(|f| &f.provenance)),
        ),
        ("samples".into(), json!(settings.samples)),
        ("samples_sha256".into(), json!(hashes)),
        ("sample_images".into(), json!(provenance(&samples))),
        ("tinyfusion".into(), json!(env!("CARGO_PKG_VERSION"))),
        ("warnings".into(), json!(said)),
    ]);
    Ok(Value::Object(report))
}

/// Too few images are a mistake in what was asked for, and `--force` the way out.
fn enough(what: &str, inputs: &[Input], options: &Options) -> Result<()> {
    // How many stand behind statistics is looked at with them.
    if inputs.iter().any(|input| input.statistics.is_some()) {
        return Ok(());
    }
    let count = inputs.iter().map(Input::rows).sum();
    fid::check_count(what, count, options.force).map_err(asked)
}

/// What another command line would mend is an error of this one.
fn asked(error: fid::Error) -> anyhow::Error {
    match error {
        fid::Error::TooFewImages(_) => Error::usage(error.to_string()).into(),
        fid::Error::Impossible(_) => Error::usage(format!("--metrics: {error}")).into(),
        other => other.into(),
    }
}

/// A side before its images went through the network.
struct Content {
    name: String,
    statistics: Option<StoredStatistics>,
    sets: Vec<Set>,
    hashes: Vec<String>,
}

impl Content {
    /// The shards of one set: all with statistics, or none.
    fn of(shards: Vec<Shard>, options: &Options) -> Result<Self> {
        let name = match &shards[..] {
            [one] => one.name.clone(),
            _ => "the samples".to_owned(),
        };
        let hashes = shards.iter().map(|shard| shard.sha256.clone()).collect();
        let with = shards.iter().filter(|s| s.statistics.is_some()).count();
        if with > 0 && with < shards.len() {
            return Err(Error::usage(
                "some of the samples are statistics and some images; put them together first: `tinyfusion stats` takes both",
            )
            .into());
        }
        // Rows of some shards only would be of another set.
        let whole = shards.iter().all(|shard| shard.set.is_some());
        let statistics = match with {
            0 => None,
            1 => shards[0].statistics.clone(),
            _ => {
                let mut sums = StatisticsSums::new(options.sfid)?;
                for shard in &shards {
                    if let Some(statistics) = &shard.statistics {
                        sums.merge(statistics)
                            .map_err(|e| Error::file(&shard.name, e))?;
                    }
                }
                Some(sums.finish()?)
            }
        };
        let sets = shards.into_iter().filter_map(|shard| shard.set);
        Ok(Self {
            name,
            statistics,
            sets: if whole { sets.collect() } else { Vec::new() },
            hashes,
        })
    }

    fn known(&self) -> KnownSide<'_> {
        KnownSide {
            name: &self.name,
            statistics: self.statistics.as_ref(),
            images: self.sets.iter().map(Set::known).collect(),
        }
    }

    /// Runs what is needed: features of single images (`rows`, with `logits`), or statistics.
    fn run(
        self,
        network: &Network<'_>,
        options: &Options,
        rows: bool,
        logits: bool,
    ) -> Result<Side> {
        let Self {
            name,
            statistics,
            sets,
            ..
        } = self;
        if sets.is_empty() || (statistics.is_some() && !rows) {
            return Ok(Side {
                statistics,
                features: None,
            });
        }
        let spatial = options.sfid && statistics.is_none();
        let count: usize = sets.iter().map(|set| set.known().count).sum();
        if !rows && !network.keeps() && count > IN_MEMORY {
            let shard = |set| Shard {
                name: name.clone(),
                statistics: None,
                set: Some(set),
                sha256: String::new(),
            };
            let shards = sets.into_iter().map(shard).collect();
            return Ok(network.statistics(shards, spatial)?.into());
        }
        let keep = Keep { spatial, logits };
        Ok(Side {
            statistics,
            features: Some(network.joined(sets, keep)?),
        })
    }
}
