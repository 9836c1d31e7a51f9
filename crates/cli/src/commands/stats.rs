use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::fid::{self, Known, StoredStatistics};
use tinyfusion::train::Stop;

use super::evaluate::inception::{Input, Network, Set, warn};
use crate::destination::check_destination;
use crate::hub::Inputs;
use crate::output::say;

/// Reference statistics of images: the .npz that `evaluate` and ADM's evaluator read.
///
/// The file holds mu and sigma (FID), mu_s and sigma_s (sFID), the number of images, and where they come from: hashes
/// of images and weights, which `evaluate` compares. With an --out of .safetensors the features themselves are kept,
/// from which also precision, recall and KID can be computed. Several sets are shards of one, in the order given.
///
/// Examples:
///   tinyfusion stats images/ --weights inception.pth -o ref.npz
///   tinyfusion stats part-0.npz part-1.npz --weights inception.pth -o features.safetensors
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Folders of PNG, JPEG or WebP images, .npz with arr_0 (N, H, W, 3) uint8, or feature files
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// Weight file of Inception-v3: .pth or .safetensors
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
    let sets = Input::open_all(&args.images)?
        .into_iter()
        .map(|input| network.look_up(input))
        .collect::<Result<Vec<_>>>()?;
    let known: Vec<Known<'_>> = sets.iter().map(Set::known).collect();
    let count: usize = known.iter().map(|known| known.count).sum();
    if let Some((first, others)) = known.split_first() {
        fid::check_shards(first, others)?;
    }
    if !features_wanted && count < 2 {
        return Err(Error::run(format!(
            "{count} image, expected at least 2: one has no covariance; add images, or keep its features (--out of .safetensors)"
        ))
        .into());
    }
    drop(known);
    let features = network.joined(sets)?;
    if features_wanted {
        write_atomic(&args.out, |f| features.write(f))?;
    } else {
        let statistics = StoredStatistics::of(&features)?;
        write_atomic(&args.out, |f| statistics.write(f))?;
    }
    let mut warnings = features.provenance.warnings.clone();
    warnings.extend(network.warning());
    if !features_wanted && features.len() <= fid::ImageFeatures::POOL {
        warnings.push(format!(
            "{} images for {} features: the covariance is rank-deficient and the FID far too high; use at least {}",
            features.len(),
            fid::ImageFeatures::POOL,
            fid::ImageFeatures::POOL + 1
        ));
    }
    warn(&warnings);
    Ok(say!(
        "{:#}",
        json!({
            "out": args.out,
            "count": features.len(),
            "provenance": features.provenance,
            "weights_known_as": network.known,
            "warnings": warnings,
        })
    )?)
}
