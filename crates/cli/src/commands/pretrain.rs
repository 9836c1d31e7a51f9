use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use tinyfusion::checkpoint::Provenance;
use tinyfusion::core::Error;
use tinyfusion::data::shapes::{self, Split};
use tinyfusion::diffusion::{BetaSchedule, DiffusionConfig, InterpolantConfig, Variance};
use tinyfusion::distill::{DistillConfig, Run, Student, distill};
use tinyfusion::models::{ClassifierConfig, DiTConfig, MarConfig, SiTConfig};
use tinyfusion::train::{FitConfig, LrSchedule, Outcome, RunDir, Stop};

use crate::classifier;
use crate::compute::{Compute, Computed};
use crate::family::{Dit, Family, MaskedAutoregressive, Model, Sit};
use crate::hub::Inputs;
use crate::model::save_classifier;
use crate::output::{progress_bar, say};
use crate::resources::Resources;
use crate::settings::{ExportOptions, FitOptions, defaults_text};
use crate::source::Source;
use crate::training_data::DataOptions;

/// Train one of the embedded experiment's teachers, or its classifier.
///
/// Examples:
///   tinyfusion pretrain runs/teacher --what dit --steps 20000 --lr 1e-3
///   tinyfusion pretrain runs/sit --what sit --from assets/teacher --steps 6000
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
    /// The same network under an interpolant
    Sit,
    /// An encoder and a decoder of patches of pixels, each with half of the blocks, and a denoiser of single patches
    Mar,
    /// The classifier that judges its samples
    Classifier,
}

#[derive(Debug, Clone, Default, clap::Args)]
struct Options {
    /// What to train
    #[arg(long)]
    what: Option<What>,
    /// Begin with the weights of this model, whose tensors must be the same by name and shape, and not
    /// with fresh ones: a DiT's can become a SiT's
    #[arg(long, value_name = "MODEL")]
    from: Option<PathBuf>,
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

    /// The sizes of the embedded MAR: its tokens are patches of pixels.
    fn mar(&self) -> MarConfig {
        let depth = self.depth.unwrap_or(16);
        let width = self.hidden_size.unwrap_or(64);
        let heads = self.num_heads.unwrap_or(2);
        MarConfig {
            img_size: shapes::SIZE,
            vae_stride: 1,
            patch_size: self.patch_size.unwrap_or(4),
            encoder_embed_dim: width,
            encoder_depth: depth / 2,
            encoder_num_heads: heads,
            decoder_embed_dim: width,
            decoder_depth: depth - depth / 2,
            decoder_num_heads: heads,
            vae_embed_dim: 3,
            class_num: shapes::CLASSES.len(),
            // So small a network is too weak to learn by heart what it is shown once.
            attn_dropout: 0.0,
            proj_dropout: 0.0,
            buffer_size: 8,
            diffloss_d: DENOISER.0,
            diffloss_w: DENOISER.1,
            // Without the last timestep, where the cosine schedule leaves no signal: a small denoiser's error there is
            // multiplied by 2·10⁴.
            num_sampling_steps: "ddim25".into(),
            // Four, as published, double the denoiser's work.
            diffusion_batch_mul: 2,
            ..MarConfig::default()
        }
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

/// Blocks and width of the denoiser of single patches in the embedded MAR.
const DENOISER: (usize, usize) = (3, 128);

/// The cosine schedule spends more of its steps where a small image's structure is decided (Nichol & Dhariwal 2021,
/// §3.2).
fn pixel_diffusion() -> DiffusionConfig {
    DiffusionConfig {
        schedule: BetaSchedule::Cosine,
        variance: Variance::FixedLarge,
        ..DiffusionConfig::default()
    }
}

/// For the help.
fn defaults() -> String {
    let options = Options::default();
    defaults_text(&Settings {
        what: What::Dit,
        seed: 0,
        lr: options.schedule(),
        compute: None,
        fit: &options.budget(),
        model: &options.dit(),
        process: BTreeMap::<_, ()>::new(),
        from_sha256: None,
    })
}

/// Everything that decides the outcome, as written to `config.toml`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Settings<'a, M, P = ()> {
    what: What,
    seed: u64,
    lr: LrSchedule,
    /// Nothing in the help, where no device is open.
    compute: Option<Computed>,
    fit: &'a FitConfig,
    model: &'a M,
    /// The process, under its family's name.
    #[serde(flatten)]
    process: BTreeMap<&'static str, P>,
    from_sha256: Option<&'a str>,
}

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default().and(&mut self.options.from)
    }
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
        What::Dit => job.teacher::<Dit>(job.options.dit(), pixel_diffusion())?,
        What::Sit => {
            job.teacher::<Sit>(SiTConfig(job.options.dit()), InterpolantConfig::default())?
        }
        What::Mar => job.teacher::<MaskedAutoregressive>(job.options.mar(), ())?,
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
    fn provenance(&self) -> Provenance {
        let mut provenance = Provenance::of_command(super::command_line());
        provenance.steps = Some(self.fit.steps);
        provenance
            .notes
            .insert("seed".into(), self.seed.to_string());
        provenance
    }

    fn teacher<F: Family>(&self, config: F::Config, process: F::Process) -> Result<Outcome> {
        let o = self.options;
        F::validate(&config, &process)?;
        let compute = o.fit.compute.open()?;
        let (weights, from) = match &o.from {
            None => (F::init(&config, self.seed, &compute.device)?, None),
            Some(path) => {
                let from = Source::open(path)?
                    .load(&compute.device)?
                    .checked(&F::params(&config))?;
                (
                    from.weights.tensors,
                    Some((from.weights.sha256, from.provenance)),
                )
            }
        };
        let settings = Settings {
            what: o.what.unwrap_or(What::Dit),
            seed: self.seed,
            lr: self.lr,
            compute: Some(compute.computed()),
            fit: &self.fit,
            model: &config,
            process: F::PROCESS.map(|key| (key, &process)).into_iter().collect(),
            from_sha256: from.as_ref().map(|(sha256, _)| sha256.as_str()),
        };
        let dir = RunDir::open(&self.args.out, &settings)?;
        let mut model = Model::<F>::fresh(
            &self.args.out,
            config,
            process,
            DataOptions::default().class_names()?,
            weights,
            &compute,
        );
        let student = Student {
            weights: std::mem::take(&mut model.weights),
            build: &|weights| {
                F::network(&model.config, weights, 0.0, o.fit.recompute, compute.dtype)
            },
            is_fixed: &F::is_fixed,
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
            &model.objective()?,
            data.batches(&model, Split::Train, self.seed, self.fit.batch_size)?,
            Run {
                dir: &dir,
                stop: self.stop,
                progress: &progress,
            },
        )?;
        let mut provenance = self.provenance();
        if let Some((sha256, parent)) = &from {
            provenance = provenance.with_parent(sha256, parent);
        }
        for (place, dtype) in self.args.export.places(&self.args.out) {
            model.save(&place, &outcome.averages, &provenance, dtype, &[])?;
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
        if o.from.is_some() {
            return Err(
                Error::usage("the classifier is trained from nothing: leave --from out").into(),
            );
        }
        o.fit.compute.refuse_gpu("the classifier's training")?;
        let dir = RunDir::open(
            &self.args.out,
            &Settings {
                what: What::Classifier,
                seed: self.seed,
                lr: self.lr,
                compute: Some(Compute::on_cpu().computed()),
                fit: &self.fit,
                model: &config,
                process: BTreeMap::<_, ()>::new(),
                from_sha256: None,
            },
        )?;
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
