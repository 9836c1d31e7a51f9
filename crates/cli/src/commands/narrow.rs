use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use tinyfusion::checkpoint::{DTypePolicy, Narrowed, Provenance};
use tinyfusion::core::{
    BlockLayout, Error, Group, LatentBatch, Selection, StateDict, WidthGroups, WidthPart,
};
use tinyfusion::data::Loader;
use tinyfusion::data::shapes::Split;
use tinyfusion::diffusion::TimestepObjective;
use tinyfusion::recover::Teacher;
use tinyfusion::recover::width::{
    Taylor, TaylorConfig, kept_groups, magnitude, random, ratio_for_parameters, taylor,
};
use tinyfusion::train::Stop;

use crate::compute::ComputeOptions;
use crate::family::{Architecture, Family, Model, save, with_family};
use crate::hub::Inputs;
use crate::output::{progress_bar, say};
use crate::resources::Resources;
use crate::selection_file::SELECTION_FILE;
use crate::settings::finite;
use crate::source::parameters_of;
use crate::training_data::DataOptions;

/// Cut in width: remove the least important heads and MLP channels of every block (Diff-Pruning).
///
/// Every block loses the same share of its heads and of its MLP channels, rounded to whole ones (a half is kept), and
/// keeps at least one of each. The width D of the hidden states stays, so that the dense model can teach the narrow one
/// block by block; what each block computes from the timestep (adaLN) stays too, so that half the heads and channels are
/// less than half of the parameters: ask for a number of parameters to compare with a model cut in depth.
///
/// OUT is a model directory with importance.json (the score of every head and channel, those kept, the loss at every
/// timestep) and selection.json (all blocks), by which distill aligns the model with its dense teacher.
///
/// Examples:
///   tinyfusion narrow assets/teacher runs/narrow --ratio 0.5
///   tinyfusion narrow assets/teacher runs/narrow --parameters-of runs/cut
///   tinyfusion distill runs/narrow runs/student --teacher assets/teacher --steps 600
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// The dense network, a model as `inspect` takes it: PATH or hub://OWNER/REPO, with [#WORD,…]
    model: PathBuf,
    /// Model directory to write
    out: PathBuf,
    #[command(flatten)]
    budget: Budget,
    /// How heads and channels are ranked
    #[arg(long, default_value = "taylor")]
    importance: Importance,
    /// Timesteps count until their loss is below this share of the largest (taylor only) [default: 0.05]
    #[arg(long, value_parser = finite)]
    threshold: Option<f64>,
    /// Timesteps from one that is taken to the next (taylor only): more are quicker, and an approximation [default: 1]
    #[arg(long)]
    stride: Option<usize>,
    /// Images that the loss is taken on (taylor only) [default: 128]
    #[arg(long)]
    samples: Option<usize>,
    /// Images at a time (taylor only): fewer take less memory, and have other noise [default: half of them, at most 64]
    #[arg(long)]
    batch_size: Option<usize>,
    /// Seed of images and noise (taylor), or of the choice (random) [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    data: DataOptions,
    /// Store the weights in 16 bits
    #[arg(long)]
    f16: bool,
    #[command(flatten)]
    compute: ComputeOptions,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Budget {
    /// Share of the heads and MLP channels to remove from every block, at least 0 and less than 1
    #[arg(long, value_parser = finite)]
    ratio: Option<f64>,
    /// The ratio that leaves as nearly as possible so many parameters
    #[arg(long, value_name = "N")]
    parameters: Option<usize>,
    /// The ratio that leaves as nearly as possible as many parameters as this model has
    #[arg(long, value_name = "MODEL")]
    parameters_of: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Importance {
    /// First-order Taylor expansion of the loss over the timesteps (Diff-Pruning)
    Taylor,
    /// Norm of the weights
    Magnitude,
    /// Drawn at random: the control
    Random,
}

impl Importance {
    fn name(self) -> &'static str {
        match self {
            Self::Taylor => "taylor",
            Self::Magnitude => "magnitude",
            Self::Random => "random",
        }
    }
}

/// What `importance.json` records.
#[derive(Serialize)]
struct Report<'a> {
    importance: &'static str,
    ratio: f64,
    source_sha256: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    taylor: Option<Swept<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    layers: Vec<Layer<'a>>,
}

/// How the Taylor scores came about.
#[derive(Serialize)]
struct Swept<'a> {
    #[serde(flatten)]
    config: TaylorConfig,
    data: &'a str,
    dtype: &'static str,
    samples: usize,
    /// How many timesteps counted.
    timesteps: usize,
    /// Mean loss at timesteps 0, stride, 2·stride, …; the last is below the threshold, if there is one more.
    losses: Vec<f64>,
}

/// The heads or the hidden channels of one block.
#[derive(Serialize)]
struct Layer<'a> {
    block: usize,
    part: WidthPart,
    kept: &'a [usize],
    scores: &'a [f64],
}

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default()
            .and([&mut self.model])
            .and(&mut self.budget.parameters_of)
            .and(self.data.origin())
    }
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    with_family!(Architecture::of(&args.model)?, narrow(args, stop))
}

fn narrow<F: Family>(args: &Args, stop: &Stop) -> Result<()> {
    let resources = Resources::start();
    args.check()?;
    let model = Model::<F>::load_on(&args.model, &args.compute.open()?)?;
    if args.out.exists() {
        return Err(Error::usage(format!(
            "{} exists; narrow writes a new folder",
            args.out.display()
        ))
        .into());
    }
    let groups = F::width_groups(&model.config);
    let ratio = args.budget.ratio(&model.weights, &groups)?;
    let seed = args.seed.unwrap_or(0);
    let (scores, swept) = match args.importance {
        Importance::Taylor => {
            let (found, samples) = args.sweep(&model, &groups, stop)?;
            let swept = Swept {
                config: args.taylor(),
                data: args.data.name(),
                dtype: model.compute.numbers(),
                samples,
                timesteps: found.timesteps,
                losses: found.losses,
            };
            (found.scores, Some(swept))
        }
        Importance::Magnitude => (magnitude(&model.weights, &groups)?, None),
        Importance::Random => (random(&groups, seed), None),
    };
    let kept = scores
        .iter()
        .map(|scores| kept_groups(scores, ratio))
        .collect::<tinyfusion::core::Result<Vec<_>>>()?;
    let report = Report {
        importance: args.importance.name(),
        ratio,
        source_sha256: &model.sha256,
        taylor: swept,
        seed: (args.importance == Importance::Random).then_some(seed),
        layers: groups
            .iter()
            .zip(kept.iter().zip(&scores))
            .map(|(group, (kept, scores))| Layer {
                block: group.block,
                part: group.part,
                kept,
                scores,
            })
            .collect(),
    };
    let (config, weights) = F::narrow(&model.config, &model.weights, &kept)?;
    weights.check(&F::params(&config))?;
    let mut provenance =
        Provenance::of_command(super::command_line()).with_parent(&model.sha256, &model.provenance);
    provenance.narrowed = Some(Narrowed {
        ratio,
        importance: args.importance.name().into(),
    });
    let dtype = if args.f16 {
        DTypePolicy::F16
    } else {
        DTypePolicy::F32
    };
    save(
        &args.out,
        &model.description(&config)?,
        &weights,
        &provenance,
        dtype,
        &[
            (
                "importance.json",
                serde_json::to_string_pretty(&report)? + "\n",
            ),
            (
                SELECTION_FILE,
                every_block(&model.layout(), &model.sha256)?.to_json()?,
            ),
        ],
    )?;
    resources.write(&args.out, None)?;
    if let Some(swept) = &report.taylor {
        say!(
            "{} timesteps counted, losses {:.4} to {:.4}",
            swept.timesteps,
            swept.losses[0],
            swept.losses[swept.timesteps - 1]
        )?;
    }
    Ok(say!(
        "{}: ratio {ratio:.4}, {} of {} parameters ({:.1} %)",
        args.out.display(),
        weights.elem_count(),
        model.weights.elem_count(),
        100.0 * weights.elem_count() as f64 / model.weights.elem_count() as f64
    )?)
}

impl Args {
    /// Most images that the loss is taken on: they stay in memory.
    const MOST_SAMPLES: usize = 65_536;

    /// An error where flags do nothing, or are out of range.
    fn check(&self) -> Result<()> {
        let fail = |what: String| Err(Error::usage(what).into());
        let of_taylor = self.threshold.is_some()
            || self.stride.is_some()
            || self.samples.is_some()
            || self.batch_size.is_some()
            || self.data.is_given();
        let name = self.importance.name();
        if self.importance != Importance::Taylor && of_taylor {
            return fail(format!(
                "importance {name} looks at no image: threshold, stride, samples, batch-size and data need --importance taylor"
            ));
        }
        if self.importance == Importance::Magnitude && self.seed.is_some() {
            return fail("magnitudes are not random: leave seed out".into());
        }
        for (name, given) in [("samples", self.samples), ("batch-size", self.batch_size)] {
            if given.is_some_and(|n| !(1..=Self::MOST_SAMPLES).contains(&n)) {
                return fail(format!("{name} must be from 1 to {}", Self::MOST_SAMPLES));
            }
        }
        self.taylor().validate()?;
        // Before anything is computed by it.
        kept_groups(&[], self.budget.ratio.unwrap_or(0.0))?;
        Ok(())
    }

    fn taylor(&self) -> TaylorConfig {
        let defaults = TaylorConfig::default();
        TaylorConfig {
            threshold: self.threshold.unwrap_or(defaults.threshold),
            stride: self.stride.unwrap_or(defaults.stride),
            seed: self.seed.unwrap_or(0),
            ..defaults
        }
    }

    /// The scores, and how many images they were taken on.
    fn sweep<F: Family>(
        &self,
        model: &Model<F>,
        groups: &[WidthGroups],
        stop: &Stop,
    ) -> Result<(Taylor, usize)> {
        let batches = self.batches(model)?;
        let samples = batches.iter().map(|b| Ok(b.y.dim(0)?));
        let samples = samples.sum::<tinyfusion::core::Result<usize>>()?;
        let teacher = Teacher {
            weights: model.weights.clone(),
            is_fixed: &F::is_fixed,
            build: &|weights, scale| {
                Ok(F::as_teacher(F::network(
                    &model.config,
                    weights,
                    scale,
                    false,
                    model.compute.dtype,
                )?))
            },
        };
        // Nothing is dropped: a score is of the network as it draws.
        let objective = F::objective(&model.config, &model.process, true)?;
        let timesteps = objective.timesteps() as u64;
        let found = taylor(
            &TaylorConfig {
                lanes: model.compute.lanes(self.taylor().lanes),
                ..self.taylor()
            },
            teacher,
            groups,
            &objective,
            &batches,
            stop,
            &progress_bar("narrow", timesteps),
        )?;
        Ok((found, samples))
    }

    /// The images, in pieces.
    fn batches<F: Family>(&self, model: &Model<F>) -> Result<Vec<LatentBatch>> {
        let source = self.data.open(model, Split::Train)?;
        let count = self.samples.unwrap_or(128);
        if let Some(len) = source.len().filter(|len| *len < count as u64) {
            return Err(Error::usage(format!(
                "{} has {len} images, fewer than the {count} of --samples",
                self.data.name()
            ))
            .into());
        }
        // Two pieces at least, one for each lane.
        let size = self.batch_size.unwrap_or(count.div_ceil(2).min(64));
        let size = size.clamp(1, count);
        let mut loader = Loader::new(source, self.seed.unwrap_or(0), size)?;
        let piece = |start: usize| {
            let batch = loader.batch((start / size) as u64)?;
            let rows = size.min(count - start);
            let batch = LatentBatch {
                x: batch.x.narrow(0, 0, rows)?, // (B, C, H, W)
                y: batch.y.narrow(0, 0, rows)?, // (B,)
            };
            Ok(batch.to_device(&model.compute.device)?)
        };
        (0..count).step_by(size).map(piece).collect()
    }
}

impl Budget {
    fn ratio(&self, weights: &StateDict, groups: &[WidthGroups]) -> Result<f64> {
        let parameters = match (self.ratio, self.parameters, &self.parameters_of) {
            (Some(ratio), _, _) => return Ok(ratio),
            (None, Some(parameters), _) => parameters,
            (None, None, Some(model)) => parameters_of(model)?,
            (None, None, None) => unreachable!("clap requires one of the three"),
        };
        Ok(ratio_for_parameters(weights, groups, parameters)?)
    }
}

/// The selection that keeps every block, each a group of its own: a narrow model's hidden states are compared with its
/// dense teacher's behind every block.
fn every_block(layout: &BlockLayout, sha256: &str) -> Result<Selection> {
    let depth = layout.depth();
    let mut selection = Selection::from_indices(layout, (0..depth).collect())?;
    selection.groups = vec![Group { n: 1, m: 1 }; depth];
    selection.criterion = "narrow".into();
    selection.source_sha256 = Some(sha256.into());
    Ok(selection.validated()?)
}
