use std::path::Path;

use anyhow::Result;
use tinyfusion::core::{Error, LatentBatch};
use tinyfusion::distill::{
    DistillConfig, KnowledgeConfig, LayerMap, Run, Student, Teacher as DistillTeacher, distill,
};
use tinyfusion::mask::Linear;
use tinyfusion::models::{DiT, DiTConfig};
use tinyfusion::recover::{DeltaW, LearnConfig, RunContext, Teacher, learn};
use tinyfusion::train::{FitConfig, LrSchedule, Progress, RunDir, Stop};

use super::turns::Turns;
use super::worker::Batch;
use super::{Case, Kind};
use crate::compute::Compute;
use crate::family::DiTModel;
use crate::selection_file::read_selection_for;

/// Steps that never come: the loop is left at the end of input.
const ENDLESS: u64 = 1 << 40;

/// Training steps, by the functions that `learn` and `distill` call. The data source is what waits for the next request,
/// so a repetition is everything from one batch to the next.
pub(super) fn run(folder: &Path, case: &Case, compute: &Compute) -> Result<()> {
    let batch = Batch::read(folder)?;
    let clean = LatentBatch {
        x: batch.get("x")?.to_device(&compute.device)?,
        y: batch.get("y")?.to_dtype(candle_core::DType::U32)?,
    };
    let mut turns = Turns::new(&compute.device);
    let batches = move |_| match turns.next()? {
        true => Ok(clean.clone()),
        false => Err(Error::Stopped),
    };
    let fit = FitConfig {
        steps: ENDLESS,
        batch_size: case.batch,
        micro_batches: case.micro_batches,
        lanes: case.threads,
        clip: Some(1.0),
        ema: 0.9999,
        checkpoint_every: ENDLESS,
        log_every: ENDLESS,
        ..FitConfig::default()
    };
    let scratch = tempfile::tempdir()?;
    let dir = RunDir::open(scratch.path().join("run"), case)?;
    let (stop, progress) = (Stop::default(), Progress::hidden());
    let ended = match case.kind {
        Kind::LearnFull | Kind::LearnLora => {
            let mut model = DiTModel::load_on(&folder.join("model"), compute)?;
            let config = LearnConfig {
                delta: if case.kind == Kind::LearnFull {
                    DeltaW::Full
                } else {
                    DeltaW::default()
                },
                tau: Linear::constant(1.0),
                history_every: ENDLESS,
                seed: case.seed,
                fit,
                ..LearnConfig::default()
            };
            let teacher = Teacher {
                weights: std::mem::take(&mut model.weights),
                is_fixed: &DiTConfig::is_fixed,
                build: &|weights, scale| {
                    Ok(DiT::with_lora(&model.config, weights, scale)?.computing_in(compute.dtype))
                },
            };
            let context = RunContext {
                dir: &dir,
                stop: &stop,
                progress: &progress,
            };
            learn(&config, teacher, &model.objective()?, batches, context).map(|_| ())
        }
        _ => {
            let is_kd = case.kind == Kind::MaskedKd;
            let own = folder.join(if is_kd { "student" } else { "model" });
            let mut model = DiTModel::load_on(&own, compute)?;
            let teacher = if is_kd {
                Some(DiTModel::load_on(&folder.join("model"), compute)?)
            } else {
                None
            };
            let net = teacher.as_ref().map(DiTModel::network).transpose()?;
            let knowledge = match (&teacher, &net) {
                (Some(teacher), Some(net)) => {
                    let selection =
                        read_selection_for(&folder.join("selection.json"), &teacher.layout())?;
                    Some(DistillTeacher {
                        net,
                        layers: Some(LayerMap::group_ends(&selection)?),
                    })
                }
                _ => None,
            };
            let config = DistillConfig {
                seed: case.seed,
                lr: LrSchedule {
                    peak: 1e-4,
                    last: 1e-4,
                    warmup: 0,
                },
                fit,
                knowledge: is_kd.then(KnowledgeConfig::default),
            };
            let student = Student {
                weights: std::mem::take(&mut model.weights),
                build: &|weights| Ok(DiT::new(&model.config, weights)?.computing_in(compute.dtype)),
                is_fixed: &DiTConfig::is_fixed,
            };
            let context = Run {
                dir: &dir,
                stop: &stop,
                progress: &progress,
            };
            distill(
                &config,
                student,
                knowledge.as_ref(),
                &model.objective()?,
                batches,
                context,
            )
            .map(|_| ())
        }
    };
    match ended {
        Err(Error::Stopped) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
