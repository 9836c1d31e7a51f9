use tinyfusion::train::{FitConfig, LrSchedule};

/// A number flag that is finite.
pub(crate) fn finite(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(v) if v.is_finite() => Ok(v),
        Ok(_) => Err("expected a finite number".into()),
        Err(e) => Err(e.to_string()),
    }
}

/// The flags of the training loop, shared by every command that trains.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct FitOptions {
    /// Training steps
    #[arg(long)]
    steps: Option<u64>,
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
    ema: Option<f64>,
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
}

impl FitOptions {
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
