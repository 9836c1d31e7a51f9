use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Tensor};
use tinyfusion_core::{BlockStack, Error, Result, StateDict, StepRng, stream};
use tinyfusion_diffusion::Objective;
use tinyfusion_train::{Outcome, ParamGroup, Progress, RunDir, StepLoss, Stop, TrainStep, fit};

use crate::{DistillConfig, KnowledgeConfig, Teacher, losses};

/// What is to be recovered. The student itself is built by [`distill()`], on a copy of the weights.
pub struct Student<'a, S> {
    /// Its weights. They are not changed, and those that nobody else holds are freed as they are copied: a clone (which
    /// shares them) keeps them, giving them away saves their memory.
    pub weights: StateDict,
    /// The network on given weights.
    pub build: &'a dyn Fn(&StateDict) -> Result<S>,
    /// Parameters that are fixed tables and stay as they are.
    pub is_fixed: &'a dyn Fn(&str) -> bool,
}

/// Where a run lives and who watches it.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// Settings, logs and checkpoints.
    pub dir: &'a RunDir,
    /// A request to stop.
    pub stop: &'a Stop,
    /// The progress bar.
    pub progress: &'a Progress,
}

/// Trains a copy of the student, with a teacher by knowledge distillation, without by plain fine-tuning.
///
/// `batches(step)` is the clean batch of a step, of `config.fit.batch_size` samples, the same whenever it is asked.
/// The outcome's averages are *all* the student's weights, fixed tables included, ready to be saved as a model.
/// Resumes from `run.dir` and ends early with [`Error::Interrupted`] when `run.stop` is requested.
pub fn distill<S, O>(
    config: &DistillConfig,
    student: Student<'_, S>,
    teacher: Option<&Teacher<'_, S>>,
    objective: &O,
    batches: impl FnMut(u64) -> Result<O::Batch> + Send,
    run: Run<'_>,
) -> Result<Outcome>
where
    S: BlockStack + Sync,
    O: Objective<S> + Sync,
{
    config.validate()?;
    let teacher = match (teacher, &config.knowledge) {
        (None, None) => None,
        (Some(teacher), Some(knowledge)) => Some((teacher, knowledge)),
        (None, Some(_)) => {
            return Err(Error::usage(
                "the settings speak of knowledge but there is no teacher; pass one, or leave `knowledge` out",
            ));
        }
        (Some(_), None) => {
            return Err(Error::usage(
                "there is a teacher but the settings do not say what to learn from it: set `knowledge`",
            ));
        }
    };
    let mut weights = student.weights.into_detached();
    let vars = weights.make_trainable(|name| !(student.is_fixed)(name))?; // copies what is trained
    if vars.is_empty() {
        return Err(Error::usage("the student has no weights to train"));
    }
    let net = (student.build)(&weights)?;
    if let Some((teacher, knowledge)) = teacher {
        teacher.check(&net, knowledge)?;
        let (from, to) = (teacher.net.layout().depth(), net.layout().depth());
        let pairs = teacher.layers.as_ref().map_or(&[][..], |l| l.pairs());
        tracing::info!(teacher = from, student = to, features = ?knowledge.features, ?pairs, "distilling");
    }

    let group = ParamGroup::new("student", config.lr, vars)?;
    let step = DistillStep {
        config,
        net,
        teacher,
        objective,
        batches: Mutex::new(batches),
    };
    let mut outcome = fit(
        &config.fit,
        &step,
        std::slice::from_ref(&group),
        run.dir,
        run.stop,
        run.progress,
    )?;
    for (name, fixed) in weights.iter().filter(|(name, _)| (student.is_fixed)(name)) {
        outcome.averages.insert(name, fixed.clone());
    }
    Ok(outcome)
}

/// One step of [`distill()`].
struct DistillStep<'a, S, O, F> {
    config: &'a DistillConfig,
    net: S,
    teacher: Option<(&'a Teacher<'a, S>, &'a KnowledgeConfig)>,
    objective: &'a O,
    /// Loaders keep an epoch's order, so they are mutable; only one draw happens at a time.
    batches: Mutex<F>,
}

/// What a step draws, and which step it is: β depends on it.
struct Draw<D> {
    step: u64,
    draw: D,
}

impl<S, O, F> TrainStep for DistillStep<'_, S, O, F>
where
    S: BlockStack + Sync,
    O: Objective<S> + Sync,
    F: FnMut(u64) -> Result<O::Batch> + Send,
{
    type Batch = Draw<O::Draw>;

    fn draw(&self, step: u64) -> Result<Self::Batch> {
        let batch = (self.batches.lock().unwrap_or_else(PoisonError::into_inner))(step)?;
        let mut rng = StepRng::new(self.config.seed, step, stream::DRAW);
        Ok(Draw {
            step,
            draw: self.objective.draw(&batch, &mut rng)?,
        })
    }

    fn loss(&self, batch: &Self::Batch, rows: Range<usize>) -> Result<StepLoss> {
        let draw = self.objective.rows(&batch.draw, rows.start, rows.len())?;
        let parts = losses(self.objective, &self.net, self.teacher, &draw)?;
        let (alpha, beta) = self.teacher.map_or((0.0, 0.0), |(_, k)| {
            (k.alpha_kd, k.beta_at(batch.step, self.config.fit.steps))
        });
        let mut scalars = vec![("diff", mean(&parts.diff)?)];
        if let Some(kd) = &parts.kd {
            scalars.push(("kd", mean(kd)?));
        }
        if let Some(rep) = &parts.rep {
            let beta = Tensor::new(beta, &Device::Cpu)?;
            scalars.extend([("rep", mean(rep)?), ("beta", beta)]);
        }
        Ok(StepLoss {
            loss: parts.total(alpha, beta)?.mean_all()?,
            scalars,
        })
    }
}

fn mean(per_sample: &Tensor) -> Result<Tensor> {
    Ok(per_sample.detach().mean_all()?)
}
