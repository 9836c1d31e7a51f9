use candle_core::{DType, Tensor};
use tinyfusion_core::{BlockStack, Error, Plan, Result, run};
use tinyfusion_diffusion::Objective;

use crate::{FeatureLoss, KnowledgeConfig, LayerMap, feature_loss};

/// Whom the student learns from.
#[derive(Debug)]
pub struct Teacher<'a, S> {
    /// The network, built on tensors that record nothing (`weights.detached()` if they are variables).
    pub net: &'a S,
    /// Which blocks belong together; needed when features are distilled.
    pub layers: Option<LayerMap>,
}

impl<S: BlockStack> Teacher<'_, S> {
    /// Checks that this teacher can teach `student` what `knowledge` asks.
    pub fn check(&self, student: &S, knowledge: &KnowledgeConfig) -> Result<()> {
        match &self.layers {
            _ if knowledge.features == FeatureLoss::None => Ok(()),
            Some(layers) => layers.check(student.layout(), self.net.layout()),
            None => Err(Error::usage(
                "distilling features needs to know which blocks of student and teacher belong together: \
                 pass the selection that cut the student, or use features = \"none\"",
            )),
        }
    }

    /// The pairs whose features are compared; none when only outputs are distilled.
    fn pairs(&self, knowledge: &KnowledgeConfig) -> Option<&LayerMap> {
        self.layers
            .as_ref()
            .filter(|_| knowledge.features != FeatureLoss::None)
    }
}

/// The parts of the loss, per sample (B,) f32.
#[derive(Debug, Clone)]
pub struct Losses {
    /// L_diff: the objective's own loss on the data.
    pub diff: Tensor,
    /// L_KD: how far the output is from the teacher's; none without a teacher.
    pub kd: Option<Tensor>,
    /// L_rep: how far the hidden states are from the teacher's, the mean over the paired blocks; none where no
    /// features are distilled.
    pub rep: Option<Tensor>,
}

impl Losses {
    /// What is minimised, (B,): α·L_KD + (1 − α)·L_diff + β·L_rep with a teacher (TinyFusion, §3.4), L_diff without.
    pub fn total(&self, alpha_kd: f64, beta: f64) -> Result<Tensor> {
        let Some(kd) = &self.kd else {
            return Ok(self.diff.clone());
        };
        let total = ((kd * alpha_kd)? + (&self.diff * (1.0 - alpha_kd))?)?;
        match &self.rep {
            Some(rep) => Ok((total + (rep * beta)?)?),
            None => Ok(total),
        }
    }
}

/// The parts of the student's loss on one draw. Teacher and student are asked the same question: same noise, same
/// timesteps, same dropped labels.
pub fn losses<S, O>(
    objective: &O,
    student: &S,
    teacher: Option<(&Teacher<'_, S>, &KnowledgeConfig)>,
    draw: &O::Draw,
) -> Result<Losses>
where
    S: BlockStack,
    O: Objective<S>,
{
    let input = objective.input(draw)?;
    // The teacher first: what it needs in passing is freed before the student's graph grows.
    let taught = teacher.map(|(teacher, knowledge)| {
        teacher.check(student, knowledge)?;
        let pairs = teacher.pairs(knowledge);
        let taps = pairs.map_or_else(Vec::new, LayerMap::teacher_blocks);
        let trace = run(teacher.net, &input, &Plan::full(teacher.net.layout().depth()).with_taps(taps))?;
        if trace.output.track_op() {
            return Err(Error::usage(
                "the teacher's weights are variables, so that its pass would be recorded; build it on `weights.detached()`",
            ));
        }
        Ok((objective.predict(teacher.net, trace.output, draw)?, trace.taps, pairs, knowledge))
    });
    let taught = taught.transpose()?;

    let taps = taught
        .as_ref()
        .and_then(|t| t.2)
        .map_or_else(Vec::new, LayerMap::student_blocks);
    let trace = run(
        student,
        &input,
        &Plan::full(student.layout().depth()).with_taps(taps),
    )?;
    let prediction = objective.predict(student, trace.output, draw)?;
    let diff = objective.loss(&prediction, draw)?; // (B,)
    let Some((target, features, pairs, knowledge)) = taught else {
        return Ok(Losses {
            diff,
            kd: None,
            rep: None,
        });
    };
    let kd = objective.distill(&prediction, &target, draw)?; // (B,)
    let rep = pairs
        .map(|pairs| mean_feature_loss(pairs, &trace.taps, &features, knowledge))
        .transpose()?;
    Ok(Losses {
        diff,
        kd: Some(kd),
        rep,
    })
}

/// The mean over the pairs, (B,).
fn mean_feature_loss(
    layers: &LayerMap,
    student: &[Tensor],
    teacher: &[Tensor],
    knowledge: &KnowledgeConfig,
) -> Result<Tensor> {
    let each = student
        .iter()
        .zip(teacher)
        .zip(layers.pairs())
        .map(|((s, t), (of_student, of_teacher))| {
            feature_loss(s, t, knowledge.features, knowledge.sigma).map_err(|e| match e {
                Error::Usage(what) => Error::usage(format!(
                    "student block {of_student}, teacher block {of_teacher}: {what}"
                )),
                other => other,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::stack(&each, 0)?.to_dtype(DType::F32)?.mean(0)?) // (pairs, B) → (B,)
}
