use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::fid::{self, Keep, Known};
use tinyfusion::train::Stop;

use super::evaluate::network::{Input, Network, Shard, warn};
use crate::destination::check_destination;
use crate::hub::Inputs;
use crate::output::say;

/// Reference statistics of images: the .npz that `evaluate` and ADM's evaluator read.
///
/// The file holds mu and sigma (FID), mu_s and sigma_s (sFID), the number of images, and where they come from: hashes
/// of images and weights, which `evaluate` compares. With an --out of .safetensors the features themselves are kept,
/// from which also precision, recall and KID can be computed. Several sets are shards of one, in the order given.
///
/// Features stream into sums in blocks of 1024 images, so memory does not grow with their number (unless they are kept),
/// and shards that are run in one command give the bits of the whole set. Statistics that were made apart (.npz with mu
/// and sigma, of `tinyfusion stats`) are put together, too: to rounding, 1e-12 of the largest entry.
///
/// Examples:
///   tinyfusion stats images/ --weights inception.pth -o ref.npz
///   tinyfusion stats part-0.npz part-1.npz --weights inception.pth -o features.safetensors
///   tinyfusion stats stats-0.npz stats-1.npz --weights inception.pth -o ref.npz
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Folders of PNG, JPEG or WebP images, .npz with arr_0 (N, H, W, 3) uint8, feature files, or statistics of shards
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// Weight file of Inception-v3: .pth or .safetensors; also hub://owner/repo/file
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// Statistics (.npz) or features (.safetensors) to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Keep features of images here, and use them again while images and weights are the same
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
}

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default()
            .and(&mut self.images)
            .and([&mut self.weights])
    }
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    let ending = args
        .out
        .extension()
        .map(|e| e.to_string_lossy().into_owned());
    let features_wanted = match ending.as_deref() {
        Some("npz") => false,
        Some("safetensors") => true,
        _ => {
            return Err(Error::usage(format!(
                "--out {}: expected a name that ends in .npz (statistics) or .safetensors (features)",
                args.out.display()
            ))
            .into());
        }
    };
    let inputs = args.images.iter().chain([&args.weights]);
    check_destination("--out", &args.out, inputs.map(PathBuf::as_path))?;
    let network = Network::open(&args.weights, args.cache.as_deref(), stop)?;
    let shards = args
        .images
        .iter()
        .map(|path| network.look_up(Input::to_count(path)?, true))
        .collect::<Result<Vec<_>>>()?;
    if let Some(one) = shards.iter().find(|shard| shard.set.is_none())
        && features_wanted
    {
        return Err(Error::usage(format!(
            "{}: statistics have no features to keep; give --out a name that ends in .npz",
            one.name
        ))
        .into());
    }
    let known: Vec<Known<'_>> = shards.iter().filter_map(Shard::known).collect();
    let count: usize = known.iter().map(|known| known.count).sum();
    if let Some((first, others)) = known.split_first() {
        fid::check_shards(first, others)?;
    }
    if !features_wanted && known.len() == shards.len() && count < 2 {
        return Err(Error::run(format!(
            "{count} image, expected at least 2: one has no covariance; add images, or keep its features (--out of .safetensors)"
        ))
        .into());
    }
    drop(known);
    let mut warnings = Vec::new();
    let (count, provenance) = if features_wanted {
        let sets = shards.into_iter().filter_map(|shard| shard.set).collect();
        let features = network.joined(sets, Keep::ALL)?;
        write_atomic(&args.out, |f| features.write(f))?;
        (features.len() as u64, Some(features.provenance))
    } else {
        for statistics in shards.iter().filter_map(|s| s.statistics.as_ref()) {
            warnings.extend(statistics.warnings.iter().cloned());
        }
        let statistics = network.statistics(shards, true)?;
        write_atomic(&args.out, |f| statistics.write(f))?;
        if statistics.spatial.is_none() {
            warnings.push("a part has no mu_s and sigma_s, so the whole has none: no sFID".into());
        }
        let count = statistics.pool.n().unwrap_or_default();
        warnings.extend(fid::few_rows_warning(
            "the statistics",
            count,
            fid::ImageFeatures::POOL,
        ));
        (count, statistics.provenance)
    };
    let of_images = provenance.iter().flat_map(|p| p.warnings.iter().cloned());
    warnings.splice(0..0, of_images.chain(network.warning()));
    warn(&warnings);
    Ok(say!(
        "{:#}",
        json!({
            "out": args.out,
            "count": count,
            "provenance": provenance,
            "weights_known_as": network.weights().known(),
            "warnings": warnings,
        })
    )?)
}
