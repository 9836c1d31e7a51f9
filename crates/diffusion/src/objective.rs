use candle_core::Tensor;
use tinyfusion_core::{BlockStack, Error, Result, StepRng};

/// One training problem on networks of type `S`, owning no weights.
///
/// A step is `draw` → `input` → the network → `predict` → `loss` (and `distill` where there is a
/// teacher). All randomness happens in [`draw`](Self::draw), before any network runs: a draw can be
/// stored, sliced into micro-batches, and shared by teacher and student, who then see the same noise,
/// the same timesteps and the same dropped labels without either knowing of the other.
///
/// # How the families fit
///
/// DiT is [`DenoisingObjective`](crate::DenoisingObjective), SiT
/// [`InterpolantObjective`](crate::InterpolantObjective): both are asked a
/// [`LatentQuery`](tinyfusion_core::LatentQuery), and only the latter's draw holds continuous times. MAR is
/// [`MarObjective`](crate::MarObjective): it is asked a
/// [`TokenQuery`](tinyfusion_core::TokenQuery); its draw holds the token mask, the noise of the per-token diffusion and
/// the seeds of dropout, and since its denoiser is part of the model, [`predict`](Self::predict) gets the network and
/// turns the tokens' output into the denoiser's prediction by running it (the bound on `S` is
/// [`TokenDenoiser`](tinyfusion_core::TokenDenoiser)).
pub trait Objective<S: BlockStack> {
    /// Clean data, with one entry per sample along the first axis.
    type Batch;
    /// A batch with all the randomness of a step.
    type Draw: Send + Sync;
    /// What the loss is taken on.
    type Prediction;

    /// Draws everything random of a step. The same `rng` state gives the same draw on every device.
    fn draw(&self, batch: &Self::Batch, rng: &mut StepRng) -> Result<Self::Draw>;
    /// The samples start..start + len of a draw: a micro-batch.
    fn rows(&self, draw: &Self::Draw, start: usize, len: usize) -> Result<Self::Draw>;
    /// What the network is asked.
    fn input(&self, draw: &Self::Draw) -> Result<S::Input>;
    /// From the output of the stack's head to the prediction; the identity for DiT.
    fn predict(&self, net: &S, output: Tensor, draw: &Self::Draw) -> Result<Self::Prediction>;
    /// The training loss per sample, (B,) f32.
    fn loss(&self, prediction: &Self::Prediction, draw: &Self::Draw) -> Result<Tensor>;
    /// The output-distillation loss L_KD per sample, (B,) f32. No gradient reaches the teacher.
    fn distill(
        &self,
        student: &Self::Prediction,
        teacher: &Self::Prediction,
        draw: &Self::Draw,
    ) -> Result<Tensor>;
}

/// An objective whose draws can be made at one timestep of the caller's choice: for criteria that go through the
/// timesteps one by one.
pub trait TimestepObjective<S: BlockStack>: Objective<S> {
    /// Timesteps, numbered from that of the least noise.
    fn timesteps(&self) -> usize;
    /// As [`draw`](Objective::draw), with every sample at the timestep `t` < [`timesteps`](Self::timesteps). Everything
    /// else that is random depends on `rng` alone: the same state gives the same noise at every timestep.
    fn draw_timestep(&self, batch: &Self::Batch, t: usize, rng: &mut StepRng)
    -> Result<Self::Draw>;
}

/// An error unless `t` is one of `timesteps`.
pub(crate) fn check_timestep(t: usize, timesteps: usize) -> Result<()> {
    if t < timesteps {
        return Ok(());
    }
    Err(Error::usage(format!(
        "timestep {t} does not exist: there are {timesteps} (from 0)"
    )))
}
