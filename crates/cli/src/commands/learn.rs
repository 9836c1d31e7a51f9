use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;
use tinyfusion::core::Error;
use tinyfusion::data::shapes::Split;
use tinyfusion::mask::{Linear, Pattern};
use tinyfusion::recover::{Blend, DeltaW, LearnConfig, LoraLayers, RunContext, Teacher, learn};
use tinyfusion::train::{FitConfig, RunDir, Stop};

use crate::compute::{ComputeOptions, Computed};
use crate::family::{Architecture, Family, Model, with_family};
use crate::hub::Inputs;
use crate::output::progress_bar;
use crate::resources::Resources;
use crate::selection_file::write_selection;
use crate::settings::{FitOptions, defaults_text, finite};
use crate::training_data::DataOptions;

/// Learn which blocks to keep so that the model recovers best after the cut.
///
/// Writes selection.json and history.jsonl (every decision). Resumes when run again.
///
/// Example: tinyfusion learn assets/teacher runs/learned --pattern 1:2 --delta lora --steps 300
#[derive(clap::Args)]
#[command(verbatim_doc_comment, after_help = defaults())]
pub(crate) struct Args {
    /// The dense network, a model as `inspect` takes it: PATH or hub://OWNER/REPO, with [#WORD,…]
    model: PathBuf,
    /// Folder of the run
    out: PathBuf,
    #[command(flatten)]
    options: Options,
}

impl Args {
    /// The defaults but for what other commands offer too.
    pub(crate) fn with_defaults(
        model: &Path,
        out: &Path,
        pattern: Option<Pattern>,
        data: DataOptions,
        seed: Option<u64>,
        compute: ComputeOptions,
    ) -> Self {
        Self {
            model: model.to_path_buf(),
            out: out.to_path_buf(),
            options: Options {
                pattern,
                data,
                fit: FitOptions::with_seed(seed, compute),
                ..Options::default()
            },
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Delta {
    Lora,
    Full,
    Frozen,
}

/// How masked blocks are computed; both give the same losses and gradients.
#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum BlendFlag {
    /// Dropped samples record nothing and have no backward
    Exact,
    /// Every sample runs through every block, as the reference does
    Plain,
}

#[derive(Debug, Clone, Default, clap::Args)]
struct Options {
    /// Blocks kept of each group: 1:2, 2:4, 7:14, 2:4x7 or a list such as 2:4,3:4,…
    #[arg(long)]
    pattern: Option<Pattern>,
    /// The weight update learned along with the mask
    #[arg(long)]
    delta: Option<Delta>,
    /// Rank of the low-rank update
    #[arg(long)]
    lora_rank: Option<usize>,
    /// Its α (the update is scaled by α/rank)
    #[arg(long, value_parser = finite)]
    lora_alpha: Option<f64>,
    /// Linear layers that get one: all, attention, mlp, or parts of their names, such as attn.qkv,mlp.fc1
    #[arg(long, value_name = "LAYERS")]
    lora_layers: Option<LoraLayers>,
    /// Learning rate of the mask's logits
    #[arg(long, value_parser = finite)]
    mask_lr: Option<f64>,
    /// Temperature at the first step
    #[arg(long, value_parser = finite)]
    tau_from: Option<f64>,
    /// Temperature at the last step
    #[arg(long, value_parser = finite)]
    tau_to: Option<f64>,
    /// Factor on the logits at the first step
    #[arg(long, value_parser = finite)]
    scale_from: Option<f64>,
    /// Factor on the logits at the last step
    #[arg(long, value_parser = finite)]
    scale_to: Option<f64>,
    /// How masked blocks are computed
    #[arg(long)]
    blend: Option<BlendFlag>,
    /// Steps between lines of history.jsonl
    #[arg(long)]
    history_every: Option<u64>,
    #[command(flatten)]
    data: DataOptions,
    #[command(flatten)]
    fit: FitOptions,
}

impl Options {
    fn learn_config(&self) -> Result<LearnConfig> {
        if self.fit.last_lr.is_some() || self.fit.warmup.is_some() {
            return Err(Error::usage(
                "learn keeps its learning rates constant: leave last-lr and warmup out",
            )
            .into());
        }
        // Budgets for a small model on a CPU; the paper's are LearnConfig's own defaults.
        let defaults = FitConfig {
            steps: 300,
            batch_size: 64,
            ema: 0.98,
            ..LearnConfig::default().fit
        };
        let d = LearnConfig {
            lr: 5e-4,
            mask_lr: 5e-3,
            fit: defaults,
            ..LearnConfig::default()
        };
        let delta = match self.delta.unwrap_or(Delta::Lora) {
            Delta::Lora => DeltaW::Lora {
                rank: self.lora_rank.unwrap_or(8),
                alpha: self.lora_alpha.unwrap_or(16.0),
                layers: self.lora_layers.clone().unwrap_or_default(),
            },
            _ if self.lora_rank.is_some()
                || self.lora_alpha.is_some()
                || self.lora_layers.is_some() =>
            {
                return Err(Error::usage(
                    "lora-rank, lora-alpha and lora-layers need --delta lora",
                )
                .into());
            }
            Delta::Full => DeltaW::Full,
            Delta::Frozen => DeltaW::Frozen,
        };
        Ok(LearnConfig {
            pattern: self.pattern.clone().unwrap_or(d.pattern),
            delta,
            lr: self.fit.lr.unwrap_or(d.lr),
            mask_lr: self.mask_lr.unwrap_or(d.mask_lr),
            tau: Linear {
                from: self.tau_from.unwrap_or(d.tau.from),
                to: self.tau_to.unwrap_or(d.tau.to),
            },
            scale: Linear {
                from: self.scale_from.unwrap_or(d.scale.from),
                to: self.scale_to.unwrap_or(d.scale.to),
            },
            blend: match self.blend {
                None => d.blend,
                Some(BlendFlag::Exact) => Blend::Exact,
                Some(BlendFlag::Plain) => Blend::Plain,
            },
            history_every: self.history_every.unwrap_or(d.history_every),
            seed: self.fit.seed(),
            fit: self.fit.fit(&d.fit),
        })
    }
}

/// For the help.
fn defaults() -> String {
    let settings = Options::default().learn_config();
    settings.map_or_else(|_| String::new(), |s| defaults_text(&s))
}

/// What `config.toml` records.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Settings<'a> {
    model_sha256: &'a str,
    data: &'a str,
    compute: Computed,
    learn: &'a LearnConfig,
}

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default()
            .and([&mut self.model])
            .and(self.options.data.origin())
    }
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    with_family!(Architecture::of(&args.model)?, search(args, stop))
}

fn search<F: Family>(args: &Args, stop: &Stop) -> Result<()> {
    let options = &args.options;
    let resources = Resources::start();
    let config = options.learn_config()?;
    config.validate()?;
    let compute = options.fit.compute.open()?;
    let mut model = Model::<F>::load_on(&args.model, &compute)?;
    // Before the run's folder is made, so that a mistake leaves none behind.
    config.pattern.groups(&model.layout())?;
    let batches = options
        .data
        .batches(&model, Split::Train, config.seed, config.fit.batch_size)?;
    let settings = Settings {
        model_sha256: &model.sha256,
        data: options.data.name(),
        compute: compute.computed(),
        learn: &config,
    };
    let teacher = Teacher {
        weights: std::mem::take(&mut model.weights),
        is_fixed: &F::is_fixed,
        build: &|weights, scale| {
            let recompute = options.fit.recompute;
            F::network(&model.config, weights, scale, recompute, compute.dtype)
        },
    };
    let dir = RunDir::open(&args.out, &settings)?;
    let progress = progress_bar("learn", config.fit.steps);
    let context = RunContext {
        dir: &dir,
        stop,
        progress: &progress,
    };
    let mut learned = learn(&config, teacher, &model.objective()?, batches, context)?;
    learned.selection.source_sha256 = Some(model.sha256.clone());
    write_selection(&args.out, &learned.selection)?;
    if learned.skipped > 0 {
        tracing::warn!(
            skipped = learned.skipped,
            "steps were skipped because something was not finite"
        );
    }
    resources.write(&args.out, Some(learned.seconds))
}
