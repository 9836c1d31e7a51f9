mod options;

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;
use tinyfusion::checkpoint::Provenance;
use tinyfusion::core::{BlockLayout, BlockStack, Error, Selection};
use tinyfusion::data::shapes::Split;
use tinyfusion::distill::{DistillConfig, FeatureLoss, LayerMap, Run, Student, Teacher, distill};
use tinyfusion::train::{FitConfig, RunDir, Stop};

use self::options::{Align, Options, defaults};
use crate::compute::Computed;
use crate::family::{Architecture, Family, Model, with_family};
use crate::hub::Inputs;
use crate::output::{progress_bar, say};
use crate::resources::Resources;
use crate::selection_file::{SELECTION_FILE, check_layout, read_selection};
use crate::settings::ExportOptions;

/// Recover a cut model: plain fine-tuning, or knowledge distillation from a teacher.
///
/// Examples:
///   tinyfusion distill runs/cut runs/student --steps 600
///   tinyfusion distill runs/cut runs/student --steps 600 --teacher assets/teacher --features masked
///   tinyfusion distill runs/cut runs/student --samples 38400 --batch-size 256 --teacher assets/teacher
///   tinyfusion distill runs/d14 runs/student --data latents.safetensors --teacher MODEL --recipe reference
///   tinyfusion distill runs/d7 runs/student --data latents.safetensors --teacher runs/d14-recovered/model --align 1:2
#[derive(clap::Args)]
#[command(verbatim_doc_comment, after_help = defaults())]
pub(crate) struct Args {
    /// The cut network, a model as `inspect` takes it
    student: PathBuf,
    /// Folder of the run; the recovered model (averaged weights) lands in OUT/model
    out: PathBuf,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    export: ExportOptions,
}

/// What `config.toml` records.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Settings<'a> {
    student_sha256: &'a str,
    teacher_sha256: Option<&'a str>,
    /// Pairs (student block, teacher block) whose hidden states are matched.
    layers: Option<&'a [(usize, usize)]>,
    data: &'a str,
    compute: Computed,
    distill: &'a DistillConfig,
}

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default()
            .and([&mut self.student])
            .and(&mut self.options.teacher)
            .and(&mut self.options.selection)
            .and(self.options.data.origin())
    }
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    with_family!(Architecture::of(&args.student)?, recover(args, stop))
}

fn recover<F: Family>(args: &Args, stop: &Stop) -> Result<()> {
    let options = &args.options;
    let resources = Resources::start();
    args.export.check()?;
    let config = options.distill_config(F::BETA)?;
    config.validate()?;
    warn_of_the_start(&config.fit);
    let compute = options.fit.compute.open()?;
    let mut model = Model::<F>::load_on(&args.student, &compute)?;
    if model.classes.is_empty() {
        model.classes = options.data.class_names()?;
    }
    let teacher = options
        .teacher
        .as_deref()
        .map(|teacher| Model::<F>::load_on(teacher, &compute))
        .transpose()?;
    let wants_features = config
        .knowledge
        .as_ref()
        .is_some_and(|k| k.features != FeatureLoss::None);
    if let Some(teacher) = &teacher {
        check_teacher(teacher, &model, wants_features)?;
    }
    let teacher_net = teacher.as_ref().map(Model::network).transpose()?;
    let selection_path = match &options.selection {
        Some(path) => Some(path.clone()),
        None => beside(&args.student),
    };
    let selection = match selection_path {
        Some(path) => Some((selection_of(&model, &path)?, path)),
        None => None,
    };
    let layers = match &teacher {
        Some(teacher) if wants_features => Some(align(
            &options.align(),
            selection.as_ref(),
            &teacher.layout(),
        )?),
        _ => None,
    };
    let knowledge = teacher_net.as_ref().map(|net| Teacher { net, layers });
    if let Some(teacher) = &knowledge {
        // Before the run's folder is made, so that a mistake leaves none behind.
        if let Some(layers) = &teacher.layers {
            layers.check(model.network()?.layout(), teacher.net.layout())?;
        }
    }
    let batches = options
        .data
        .batches(&model, Split::Train, config.seed, config.fit.batch_size)?;
    let settings = Settings {
        student_sha256: &model.sha256,
        teacher_sha256: teacher.as_ref().map(|t| t.sha256.as_str()),
        layers: knowledge
            .as_ref()
            .and_then(|k| k.layers.as_ref())
            .map(LayerMap::pairs),
        data: options.data.name(),
        compute: compute.computed(),
        distill: &config,
    };
    let dir = RunDir::open(&args.out, &settings)?;
    let student = Student {
        weights: std::mem::take(&mut model.weights),
        build: &|weights| {
            let recompute = options.fit.recompute;
            F::network(&model.config, weights, 0.0, recompute, compute.dtype)
        },
        is_fixed: &F::is_fixed,
    };
    let progress = progress_bar("distill", config.fit.steps);
    let context = Run {
        dir: &dir,
        stop,
        progress: &progress,
    };
    let outcome = distill(
        &config,
        student,
        knowledge.as_ref(),
        &model.objective()?,
        batches,
        context,
    )?;
    let mut provenance = Provenance::of_command(super::command_line())
        .with_parent(&model.sha256, &model.provenance)
        .with_cut_of(&model.provenance);
    provenance.steps = Some(config.fit.steps);
    // So that a second recovery finds it, as it would beside the cut model.
    let beside = match &selection {
        Some((selection, _)) => vec![(SELECTION_FILE, selection.to_json()?)],
        None => Vec::new(),
    };
    for (place, dtype) in args.export.places(&args.out) {
        model.save(&place, &outcome.averages, &provenance, dtype, &beside)?;
    }
    resources.write(&args.out, Some(outcome.seconds))?;
    Ok(say!("{}", args.out.join("model").display())?)
}

/// Which blocks of the student are compared with which of a teacher of `layout`.
fn align(
    rule: &Align,
    selection: Option<&(Selection, PathBuf)>,
    layout: &BlockLayout,
) -> Result<LayerMap> {
    if let Align::Pattern(pattern) = rule {
        return Ok(LayerMap::groups(&pattern.groups(layout)?)?);
    }
    let Some((selection, path)) = selection else {
        return Err(Error::usage(
            "matching hidden states needs the selection that cut the student: none lies in its folder, so pass \
             --selection, a pattern such as --align 1:2, or --features none",
        )
        .into());
    };
    check_layout(selection, path, layout).map_err(|e| {
        Error::usage(format!(
            "{e}; for another teacher than the one that the student was cut from, align them by a pattern, such as \
             --align 1:2; for a student that was cut and then narrowed pass the --selection of the cut"
        ))
    })?;
    Ok(match rule {
        Align::EveryBlock => LayerMap::every_block(selection, layout)?,
        Align::GroupEnds | Align::Pattern(_) => LayerMap::group_ends(selection)?,
    })
}

/// A word where the averaged weights, which are what is saved, will hardly have moved: nothing else in a run shows it.
fn warn_of_the_start(fit: &FitConfig) {
    const TOO_MUCH: f64 = 0.05;
    let left = fit.start_left();
    if left > TOO_MUCH {
        tracing::warn!(
            "{:.0} % of the averaged weights will still be the cut model that they began with: a decay of {} per step \
             is long for {} steps; pass --ema-rampup 0.05, or --ema-half-life",
            100.0 * left,
            fit.ema,
            fit.steps
        );
    }
}

/// An error where `teacher` cannot teach `student`: before a run's folder is made, so that a mistake leaves none behind.
fn check_teacher<F: Family>(teacher: &Model<F>, student: &Model<F>, features: bool) -> Result<()> {
    let fail = |what: String| {
        let (student, teacher) = (student.path.display(), teacher.path.display());
        Err(Error::usage(format!("{teacher} cannot teach {student}: {what}")).into())
    };
    if teacher.process != student.process {
        return fail("they were trained under different processes".into());
    }
    let (ours, theirs) = (student.samples(), teacher.samples());
    if ours != theirs {
        return fail(format!("the teacher draws {theirs}, the student {ours}"));
    }
    let (ours, theirs) = (F::outputs(&student.config), F::outputs(&teacher.config));
    if ours != theirs {
        return fail(format!("outputs of another shape: {theirs:?} and {ours:?}"));
    }
    let (ours, theirs) = (F::widths(&student.config), F::widths(&teacher.config));
    if features && ours != theirs {
        return fail(format!(
            "hidden states of the widths {theirs:?} and {ours:?}; pass --features none"
        ));
    }
    Ok(())
}

/// The selection that cut `model`, as far as the model's own record tells.
fn selection_of<F: Family>(model: &Model<F>, path: &Path) -> Result<Selection> {
    let selection = read_selection(path)?;
    match &model.provenance.kept {
        Some(kept) if *kept != selection.kept => Err(Error::usage(format!(
            "{}: keeps blocks {:?}, but {} was cut to {kept:?}; pass the selection that it was cut by",
            path.display(),
            selection.kept,
            model.path.display()
        ))
        .into()),
        _ => Ok(selection),
    }
}

/// The selection that `cut` laid beside the student, if there is one.
fn beside(student: &Path) -> Option<PathBuf> {
    let path = student.join(SELECTION_FILE);
    path.is_file().then(|| {
        tracing::info!("hidden states are aligned by {}", path.display());
        path
    })
}
