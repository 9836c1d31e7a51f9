use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Serialize;
use tinyfusion::checkpoint::{DTypePolicy, inspect};
use tinyfusion::core::{Error, Result};
use tinyfusion::train::{FitConfig, LrSchedule};

use crate::commands::command_line;
use crate::compute::ComputeOptions;

/// A number flag that is finite.
pub(crate) fn finite(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(v) if v.is_finite() => Ok(v),
        Ok(_) => Err("expected a finite number".into()),
        Err(e) => Err(e.to_string()),
    }
}

/// Where a trained model goes beside the run's own folder.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ExportOptions {
    /// Also write the model, in 16 bits, into this folder
    #[arg(long, value_name = "FOLDER")]
    export: Option<PathBuf>,
    /// Replace what another command wrote into that folder
    #[arg(long, requires = "export")]
    overwrite: bool,
}

impl ExportOptions {
    /// An error where the folder holds what this command did not write: asked before the training, not after it.
    pub(crate) fn check(&self) -> Result<()> {
        let Some(folder) = self.export.as_ref().filter(|_| !self.overwrite) else {
            return Ok(());
        };
        let is_empty = match std::fs::read_dir(folder) {
            Ok(mut entries) => entries.next().is_none(),
            Err(e) if e.kind() == ErrorKind::NotFound => true,
            Err(e) => return Err(Error::file(folder, e)),
        };
        let is_own = || {
            let found = inspect(folder).ok()?.provenance?.command?;
            Some(found == command_line())
        };
        if is_empty || is_own() == Some(true) {
            return Ok(());
        }
        Err(Error::usage(format!(
            "{}: the export would replace what stands there; use a new folder, or pass --overwrite",
            folder.display()
        )))
    }

    /// The folders of a finished run's model and the types of its weights there.
    pub(crate) fn places(&self, run: &Path) -> Vec<(PathBuf, DTypePolicy)> {
        let own = (run.join("model"), DTypePolicy::F32);
        let exported = self.export.iter().map(|e| (e.clone(), DTypePolicy::F16));
        std::iter::once(own).chain(exported).collect()
    }
}

/// What stands under a command's help: its settings where no flag is given, under the names of a run's config.toml.
pub(crate) fn defaults_text(settings: &impl Serialize) -> String {
    let text = toml::to_string(settings).unwrap_or_default();
    let lines = text.lines().filter(|l| !l.is_empty());
    lines.fold(
        "Settings without flags, as a run's config.toml records them:".to_string(),
        |all, line| format!("{all}\n  {line}"),
    )
}

/// The flags of the training loop, shared by every command that trains.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct FitOptions {
    /// Training steps
    #[arg(long)]
    pub(crate) steps: Option<u64>,
    /// Images per step
    #[arg(long)]
    pub(crate) batch_size: Option<usize>,
    /// Pieces of a batch: more take less memory
    #[arg(long)]
    micro_batches: Option<usize>,
    /// Pieces worked on side by side, as far as there are cores
    #[arg(long)]
    lanes: Option<usize>,
    /// Keep of every block only its input, and compute it again for its backward: less memory, for one more forward
    #[arg(long)]
    pub(crate) recompute: bool,
    /// Peak learning rate of the weights
    #[arg(long, value_parser = finite)]
    pub(crate) lr: Option<f64>,
    /// Learning rate at the last step (half cosine)
    #[arg(long, value_parser = finite)]
    pub(crate) last_lr: Option<f64>,
    /// Steps of linear warm-up
    #[arg(long)]
    pub(crate) warmup: Option<u64>,
    /// Decay per step of the averaged parameters
    #[arg(long, value_parser = finite)]
    pub(crate) ema: Option<f64>,
    /// Largest gradient norm; longer gradients are scaled down to it (0: never)
    #[arg(long, value_parser = finite)]
    clip: Option<f64>,
    /// Seed of everything random in the run
    #[arg(long)]
    seed: Option<u64>,
    /// Steps between checkpoints
    #[arg(long)]
    checkpoint_every: Option<u64>,
    /// Steps between lines of metrics.jsonl
    #[arg(long)]
    log_every: Option<u64>,
    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

impl FitOptions {
    pub(crate) fn with_seed(seed: Option<u64>, compute: ComputeOptions) -> Self {
        Self {
            seed,
            compute,
            ..Self::default()
        }
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }

    /// The flags over `defaults`.
    pub(crate) fn fit(&self, defaults: &FitConfig) -> FitConfig {
        let batch_size = self.batch_size.unwrap_or(defaults.batch_size);
        // A small batch has fewer pieces, unless so many were asked for: then it is a mistake.
        let pieces = defaults.micro_batches.min(batch_size.max(1));
        FitConfig {
            steps: self.steps.unwrap_or(defaults.steps),
            batch_size,
            micro_batches: self.micro_batches.unwrap_or(pieces),
            lanes: self.lanes.unwrap_or(defaults.lanes),
            clip: match self.clip {
                Some(0.0) => None,
                given => given.or(defaults.clip),
            },
            ema: self.ema.unwrap_or(defaults.ema),
            checkpoint_every: self.checkpoint_every.unwrap_or(defaults.checkpoint_every),
            log_every: self.log_every.unwrap_or(defaults.log_every),
            ..defaults.clone()
        }
    }

    /// The flags over `defaults`; a peak alone keeps the defaults' ratio of last to peak.
    pub(crate) fn lr(&self, defaults: LrSchedule) -> LrSchedule {
        let peak = self.lr.unwrap_or(defaults.peak);
        LrSchedule {
            peak,
            last: self.last_lr.unwrap_or(peak * defaults.last / defaults.peak),
            warmup: self.warmup.unwrap_or(defaults.warmup),
        }
    }
}
