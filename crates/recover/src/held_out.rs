use serde::{Deserialize, Serialize};
use tinyfusion_core::{BlockStack, Plan, Result, StepRng, run, stream};
use tinyfusion_diffusion::Objective;

use crate::running::Running;

/// A mean loss over held-out samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossEstimate {
    /// The mean; not finite where the network's output is not.
    pub loss: f64,
    /// Standard error of that mean, σ/√n, as of independent samples. A MAR draws one mask rate for all samples of a batch,
    /// so that theirs are not quite independent, and this is somewhat too small. (The spread of the batches' means is no
    /// better in general: data that lies sorted by class would make it too large.)
    pub standard_error: f64,
    /// Samples n.
    pub images: u64,
}

/// The loss of `net` under `plan` over `batches`, with all randomness fixed by `seed`: networks
/// that are compared see the same timesteps and noise.
///
/// With blocks skipped this is a mask's *calibration loss* (what earlier criteria minimise); with a
/// recovered student and [`Plan::full`] it tells how well it recovered. Batch k draws by (seed, k), so
/// comparable runs cut the samples into batches in the same way. Build `net` on detached weights, or every
/// forward records a graph for nothing.
pub fn held_out_loss<S: BlockStack, O: Objective<S>>(
    net: &S,
    plan: &Plan,
    objective: &O,
    batches: impl IntoIterator<Item = Result<O::Batch>>,
    seed: u64,
) -> Result<LossEstimate> {
    let mut losses = Running::default();
    for (k, batch) in (0u64..).zip(batches) {
        let draw = objective.draw(&batch?, &mut StepRng::new(seed, k, stream::HELD_OUT))?;
        losses.extend(sample_losses(net, plan, objective, &draw)?);
    }
    losses.estimate("a held-out loss")
}

/// The loss of every sample of a draw.
pub(crate) fn sample_losses<S: BlockStack, O: Objective<S>>(
    net: &S,
    plan: &Plan,
    objective: &O,
    draw: &O::Draw,
) -> Result<Vec<f64>> {
    let output = run(net, &objective.input(draw)?, plan)?.output;
    let losses = objective.loss(&objective.predict(net, output, draw)?, draw)?; // (B,)
    Ok(losses
        .to_vec1::<f32>()?
        .into_iter()
        .map(f64::from)
        .collect())
}
