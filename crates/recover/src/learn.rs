use std::ops::Range;
use std::sync::{Mutex, OnceLock};

use tinyfusion_core::{BlockStack, Error, Result, Selection, StateDict, StepRng, stream};
use tinyfusion_diffusion::Objective;
use tinyfusion_train::{LrSchedule, ParamGroup, Progress, RunDir, StepLoss, Stop, TrainStep, fit};

use crate::{Candidates, Drawn, LearnConfig, MaskedStack, Teacher};

/// Where a run happens and who can watch and stop it.
#[derive(Debug, Clone, Copy)]
pub struct RunContext<'a> {
    /// Checkpoints, `metrics.jsonl` and `history.jsonl` (one
    /// [`HistoryRecord`](tinyfusion_mask::HistoryRecord) a line) go here; a run found here is resumed.
    pub dir: &'a RunDir,
    /// A request to end early.
    pub stop: &'a Stop,
    /// The progress bar.
    pub progress: &'a Progress,
}

/// What learning leaves.
#[derive(Debug)]
pub struct Learned {
    /// The blocks to keep, with every group's probabilities.
    pub selection: Selection,
    /// Steps skipped because the loss or the gradient was not finite.
    pub skipped: u64,
    /// Seconds of training, over all parts of the run.
    pub seconds: f64,
}

/// Learns which blocks of `teacher` to keep so that it recovers best:
/// min over p(m), ΔΦ of E\[L(x, Φ + ΔΦ, m)\] (TinyFusion, arXiv 2412.01199).
///
/// `batches(step)` is the clean batch of a step (from 0), of `config.fit.batch_size` samples on the
/// weights' device; the same for the same step, or a resumed run is not the unbroken one.
///
/// The decision is the arg-max of the *averaged* logits. ΔΦ is thrown away with the run's checkpoints: it was
/// trained under masks that changed from sample to sample and only stands in for the recovery to come.
/// The student starts from the teacher's own weights of the kept blocks, as in the paper.
///
/// # Errors
/// A pattern that does not fit and settings out of range are [`Error::Usage`]; after a request to stop it
/// is [`Error::Interrupted`], and the same call resumes.
pub fn learn<S, O>(
    config: &LearnConfig,
    teacher: Teacher<'_, S>,
    objective: &O,
    batches: impl FnMut(u64) -> Result<O::Batch> + Send,
    context: RunContext<'_>,
) -> Result<Learned>
where
    S: BlockStack + Sync,
    O: Objective<S> + Sync,
{
    let (masked, variables) = MaskedStack::new(config, teacher)?;
    let group = |name: &str, lr, vars| ParamGroup::new(name, LrSchedule::constant(lr), vars);
    // No weight decay, as in the reference. The clip runs over both groups together.
    let mut groups = vec![group("mask", config.mask_lr, variables.logits)?];
    if !variables.weights.is_empty() {
        // The update is thrown away with the run: nobody asks for its average.
        groups.push(group("delta", config.lr, variables.weights)?.without_averages());
    }
    let step = LearnStep {
        config,
        masked,
        objective,
        batches: Mutex::new(batches),
    };
    let outcome = fit(
        &config.fit,
        &step,
        &groups,
        context.dir,
        context.stop,
        context.progress,
    )?;

    let last = config.temperature(config.fit.steps.saturating_sub(1));
    let settings =
        serde_json::to_value(config).map_err(|e| Error::run(format!("settings: {e}")))?;
    let selection = step
        .masked
        .sampler()
        .decide(&outcome.averages, last.scale)?;
    Ok(Learned {
        selection: Selection {
            settings,
            ..selection
        },
        skipped: outcome.skipped,
        seconds: outcome.seconds,
    })
}

/// One step of learning, for [`fit`].
struct LearnStep<'a, S, O, F> {
    config: &'a LearnConfig,
    masked: MaskedStack<S>,
    objective: &'a O,
    /// Asked by one thread at a time; a loader may keep an epoch's order between steps.
    batches: Mutex<F>,
}

/// What a step draws.
struct StepDraw<D> {
    drawn: Drawn<D>,
    /// By the logits of the step, which all its micro-batches share: the first of them asks for all, so that a GPU is
    /// waited for once in a step.
    candidates: OnceLock<Candidates>,
}

impl<S, O, F> TrainStep for LearnStep<'_, S, O, F>
where
    S: BlockStack + Sync,
    O: Objective<S> + Sync,
    F: FnMut(u64) -> Result<O::Batch> + Send,
{
    type Batch = StepDraw<O::Draw>;

    fn draw(&self, step: u64) -> Result<Self::Batch> {
        let LearnConfig { seed, fit, .. } = self.config;
        let batch = {
            let mut batches = self
                .batches
                .lock()
                .map_err(|_| Error::run("reading a batch panicked before"))?;
            batches(step)?
        };
        let drawn = Drawn {
            draw: self
                .objective
                .draw(&batch, &mut StepRng::new(*seed, step, stream::DRAW))?,
            // For the whole batch, so that the masks do not depend on how it is cut into micro-batches.
            noise: self
                .masked
                .sampler()
                .draw_noise(*seed, step, fit.batch_size)?,
            temperature: self.config.temperature(step),
        };
        Ok(StepDraw {
            drawn,
            candidates: OnceLock::new(),
        })
    }

    fn loss(&self, batch: &Self::Batch, rows: Range<usize>) -> Result<StepLoss> {
        let StepDraw { drawn, candidates } = batch;
        let candidates = match candidates.get() {
            Some(known) => known,
            None => {
                // Two lanes may get here at once, with the same answer.
                let asked = self.masked.candidates(drawn)?;
                candidates.get_or_init(|| asked)
            }
        };
        let loss = self
            .masked
            .losses(self.objective, drawn, candidates, rows)?
            .mean_all()?;
        Ok(StepLoss {
            loss,
            scalars: Vec::new(),
        })
    }

    fn record(&self, done: u64, averages: &dyn Fn() -> StateDict) -> Result<Option<String>> {
        let last = done == self.config.fit.steps;
        if !done.is_multiple_of(self.config.history_every) && !last {
            return Ok(None);
        }
        // `done` steps are done: the temperature is that of the step just made.
        let temperature = self.config.temperature(done.saturating_sub(1));
        let record = self
            .masked
            .sampler()
            .record(done, &averages(), temperature)?;
        Ok(Some(record.to_line()?))
    }
}
