use std::path::PathBuf;

use anyhow::Result;
use candle_core::Device;
use serde::Serialize;
use tinyfusion::checkpoint::Provenance;
use tinyfusion::data::shapes::{self, Split};
use tinyfusion::diffusion::{BetaSchedule, DiffusionConfig, Variance};
use tinyfusion::distill::{DistillConfig, Run, Student, distill};
use tinyfusion::models::{ClassifierConfig, DiT, DiTConfig};
use tinyfusion::train::{FitConfig, LrSchedule, Outcome, RunDir, Stop};

use crate::classifier;
use crate::model::{DiTModel, save_classifier, save_dit};
use crate::output::{progress_bar, say};
use crate::resources::Resources;
use crate::settings::{ExportOptions, FitOptions, defaults_text};
use crate::training_data::{DataOptions, objective};

/// Train the embedded experiment's teacher or classifier from nothing.
///
/// Example: tinyfusion pretrain runs/teacher --what dit --steps 20000 --lr 1e-3
#[derive(clap::Args)]
#[command(verbatim_doc_comment, after_help = defaults())]
pub(crate) struct Args {
    /// Folder of the run; the model lands in OUT/model
    out: PathBuf,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    export: ExportOptions,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum What {
    /// The diffusion transformer
    Dit,
    /// The classifier that judges its samples
    Classifier,
}

#[derive(Debug, Clone, Default, clap::Args)]
struct Options {
    /// What to train
    #[arg(long)]
    what: Option<What>,
    /// Blocks
    #[arg(long)]
    depth: Option<usize>,
    /// Width
    #[arg(long)]
    hidden_size: Option<usize>,
    /// Attention heads
    #[arg(long)]
    num_heads: Option<usize>,
    /// Side of a patch
    #[arg(long)]
    patch_size: Option<usize>,
    #[command(flatten)]
    fit: FitOptions,
}

impl Options {
    fn schedule(&self) -> LrSchedule {
        self.fit.lr(LrSchedule {
            peak: 1e-3,
            last: 5e-5,
            warmup: 100,
        })
    }

    fn budget(&self) -> FitConfig {
        self.fit.fit(&FitConfig {
            steps: 20_000,
            ..FitConfig::default()
        })
    }

    /// The sizes of the embedded teacher.
    fn dit(&self) -> DiTConfig {
        DiTConfig {
            input_size: shapes::SIZE,
            patch_size: self.patch_size.unwrap_or(4),
            in_channels: 3,
            hidden_size: self.hidden_size.unwrap_or(64),
            depth: self.depth.unwrap_or(16),
            num_heads: self.num_heads.unwrap_or(2),
            num_classes: shapes::CLASSES.len(),
            learn_sigma: false,
            ..DiTConfig::default()
        }
    }
}

/// For the help.
fn defaults() -> String {
    let options = Options::default();
    defaults_text(&Settings {
        what: What::Dit,
        seed: 0,
        lr: options.schedule(),
        fit: &options.budget(),
        model: &options.dit(),
        diffusion: None,
    })
}

/// Everything that decides the outcome, as written to `config.toml`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Settings<'a, M> {
    what: What,
    seed: u64,
    lr: LrSchedule,
    fit: &'a FitConfig,
    model: &'a M,
    diffusion: Option<&'a DiffusionConfig>,
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    let options = &args.options;
    let resources = Resources::start();
    args.export.check()?;
    let job = Job {
        args,
        seed: options.fit.seed(),
        lr: options.schedule(),
        fit: options.budget(),
        options,
        stop,
    };
    job.fit.validate()?;
    let outcome = match job.options.what.unwrap_or(What::Dit) {
        What::Dit => job.dit()?,
        What::Classifier => job.classifier()?,
    };
    resources.write(&args.out, Some(outcome.seconds))?;
    say!("{}", args.out.join("model").display())?;
    Ok(())
}

struct Job<'a> {
    args: &'a Args,
    options: &'a Options,
    seed: u64,
    lr: LrSchedule,
    fit: FitConfig,
    stop: &'a Stop,
}

impl Job<'_> {
    fn dir<M: Serialize>(
        &self,
        what: What,
        model: &M,
        diffusion: Option<&DiffusionConfig>,
    ) -> Result<RunDir> {
        let settings = Settings {
            what,
            seed: self.seed,
            lr: self.lr,
            fit: &self.fit,
            model,
            diffusion,
        };
        Ok(RunDir::open(&self.args.out, &settings)?)
    }

    fn provenance(&self) -> Provenance {
        let mut provenance = Provenance::of_command(super::command_line());
        provenance.steps = Some(self.fit.steps);
        provenance
            .notes
            .insert("seed".into(), self.seed.to_string());
        provenance
    }

    fn dit(&self) -> Result<Outcome> {
        let o = self.options;
        let config = o.dit();
        // The cosine schedule spends more of its steps where a small image's structure is decided
        // (Nichol & Dhariwal 2021, §3.2).
        let diffusion = DiffusionConfig {
            schedule: BetaSchedule::Cosine,
            variance: Variance::FixedLarge,
            ..DiffusionConfig::default()
        };
        config.validate()?;
        let dir = self.dir(What::Dit, &config, Some(&diffusion))?;
        let mut model = DiTModel {
            weights: config.init(self.seed, &Device::Cpu)?,
            config,
            diffusion,
            sha256: String::new(),
            path: self.args.out.clone(),
            provenance: Provenance::default(),
        };
        let student = Student {
            weights: std::mem::take(&mut model.weights),
            build: &|weights| Ok(DiT::new(&model.config, weights)?.recomputing(o.fit.recompute)),
            is_fixed: &DiTConfig::is_fixed,
        };
        // Training from nothing is plain fine-tuning of fresh weights.
        let settings = DistillConfig {
            seed: self.seed,
            lr: self.lr,
            fit: self.fit.clone(),
            knowledge: None,
        };
        let progress = progress_bar("pretrain", self.fit.steps);
        let data = DataOptions::default();
        let outcome = distill(
            &settings,
            student,
            None,
            &objective(&model)?,
            data.batches(&model, Split::Train, self.seed, self.fit.batch_size)?,
            Run {
                dir: &dir,
                stop: self.stop,
                progress: &progress,
            },
        )?;
        for (place, dtype) in self.args.export.places(&self.args.out) {
            save_dit(
                &place,
                &model.config,
                &model.diffusion,
                &outcome.averages,
                &self.provenance(),
                dtype,
            )?;
        }
        Ok(outcome)
    }

    fn classifier(&self) -> Result<Outcome> {
        let o = self.options;
        let defaults = ClassifierConfig::default();
        let config = ClassifierConfig {
            patch_size: o.patch_size.unwrap_or(defaults.patch_size),
            hidden_size: o.hidden_size.unwrap_or(defaults.hidden_size),
            depth: o.depth.unwrap_or(defaults.depth),
            num_heads: o.num_heads.unwrap_or(defaults.num_heads),
            num_classes: shapes::CLASSES.len(),
            ..defaults
        };
        config.validate()?;
        let dir = self.dir(What::Classifier, &config, None)?;
        let outcome = classifier::train(&config, self.seed, self.lr, &self.fit, &dir, self.stop)?;
        let accuracy = classifier::held_out_accuracy(&config, &outcome.averages)?;
        let mut provenance = self.provenance();
        provenance
            .notes
            .insert("held-out accuracy".into(), format!("{accuracy:.4}"));
        for (place, dtype) in self.args.export.places(&self.args.out) {
            save_classifier(&place, &config, &outcome.averages, &provenance, dtype)?;
        }
        say!("held-out accuracy {accuracy:.4}")?;
        Ok(outcome)
    }
}
