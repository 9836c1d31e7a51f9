//! What the solvers of the equations in continuous time share: their contract with the network and the watcher.

use candle_core::{DType, Tensor};
use tinyfusion_core::{Error, Result};

use crate::Interpolant;
use crate::interpolant::Mix;
use crate::schedule::MAX_STEPS;

/// What [`ode`](super::ode), [`sde`](super::sde) and [`dormand_prince`](super::dormand_prince) report after each step.
#[derive(Debug, Clone, Copy)]
pub struct TimeStep<'a> {
    /// Steps done, from 1; of an adaptive solver those that were accepted.
    pub done: usize,
    /// Steps in all; none where the solver chooses them.
    pub total: Option<usize>,
    /// The time that the step left.
    pub from: f64,
    /// The time that the step reached; an adaptive solver's last one is beyond the end.
    pub to: f64,
    /// Whether the step was taken; only an adaptive solver rejects steps.
    pub accepted: bool,
    /// x after the step (B, …), or as it was before if the step was rejected.
    pub sample: &'a Tensor,
}

/// The network behind a sampler: tells it the time and checks what it answers.
pub(super) struct Asked<'a, F> {
    pub(super) interpolant: &'a Interpolant,
    pub(super) predict: F,
}

impl<F: FnMut(&Tensor, &Tensor) -> Result<Tensor>> Asked<'_, F> {
    /// a·x + b·prediction(x, t) for x (B, …) f32.
    pub(super) fn mixed(&mut self, mix: Mix, x: &Tensor, t: f64) -> Result<Tensor> {
        let times = Tensor::full(t as f32, x.dim(0)?, x.device())?; // (B,)
        // Detached, so that a network of trainable weights does not chain the graphs of all steps.
        let prediction = (self.predict)(x, &times)?.detach().to_dtype(DType::F32)?;
        self.interpolant.check_output(&prediction, x)?;
        mix.apply(x, &prediction)
    }

    /// The velocity at x (B, …).
    pub(super) fn velocity(&mut self, x: &Tensor, t: f64) -> Result<Tensor> {
        let interpolant = self.interpolant;
        let mix = interpolant.checked(interpolant.velocity_mix(t), "velocity", t)?;
        self.mixed(mix, x, t)
    }
}

/// `num_steps` times from `t0` to `t1`, both included.
pub(super) fn grid(num_steps: usize, (t0, t1): (f64, f64)) -> Result<Vec<f64>> {
    if num_steps < 2 {
        return Err(Error::usage(format!(
            "num_steps counts the times of the grid with both ends: it must be at least 2, found {num_steps}"
        )));
    }
    if num_steps > MAX_STEPS {
        return Err(Error::usage(format!(
            "a time grid of {num_steps} steps is too long; use at most {MAX_STEPS}"
        )));
    }
    let dt = (t1 - t0) / (num_steps - 1) as f64;
    Ok((0..num_steps)
        .map(|i| {
            if i + 1 == num_steps {
                t1
            } else {
                t0 + i as f64 * dt
            }
        })
        .collect())
}
