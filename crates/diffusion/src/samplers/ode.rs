use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_core::Result;

use super::flow::{Asked, grid};
use super::{TimeStep, Tolerance, dormand_prince};
use crate::Interpolant;

/// Solver of the probability-flow equation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OdeMethod {
    /// First order, one network call a step.
    Euler,
    /// Heun's explicit trapezoid: second order, two network calls a step.
    Heun,
    /// Dormand–Prince 5(4) with steps by the tolerances: SiT's choice.
    #[default]
    Dopri5,
}

/// Settings of [`ode`]. The default is SiT's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OdeConfig {
    /// The solver.
    pub method: OdeMethod,
    /// Times of the grid, both ends included, as SiT counts: Euler and Heun make one step fewer. Dormand–Prince
    /// chooses its own.
    pub num_steps: usize,
    /// Error allowed in a step of Dormand–Prince, absolute.
    pub atol: f64,
    /// Error allowed in a step of Dormand–Prince, as a share of the state.
    pub rtol: f64,
    /// From data to noise instead.
    pub reverse: bool,
}

impl Default for OdeConfig {
    fn default() -> Self {
        let Tolerance { atol, rtol } = Tolerance::default();
        Self {
            method: OdeMethod::default(),
            num_steps: 50,
            atol,
            rtol,
            reverse: false,
        }
    }
}

/// The probability-flow equation dx = v(x, t) dt (Ma et al., 2401.08740, eq. 2) from noise `z` (B, C, H, W) to samples,
/// or from samples to noise with `config.reverse`.
///
/// `predict(x, t)` gets x (B, C, H, W) f32 and t (B,) f32 in [0, 1] and returns the network's estimate
/// (B, C, H, W). Dormand–Prince asks it a little beyond the interval's end.
pub fn ode(
    interpolant: &Interpolant,
    config: OdeConfig,
    z: &Tensor,
    predict: impl FnMut(&Tensor, &Tensor) -> Result<Tensor>,
    mut on_step: impl FnMut(&TimeStep<'_>) -> Result<()>,
) -> Result<Tensor> {
    let (t0, t1) = interpolant.config().ode_interval();
    let ends = if config.reverse { (t1, t0) } else { (t0, t1) };
    let mut asked = Asked {
        interpolant,
        predict,
    };
    let start = z.to_dtype(DType::F32)?;
    if config.method == OdeMethod::Dopri5 {
        let tolerance = Tolerance {
            atol: config.atol,
            rtol: config.rtol,
        };
        let mut reached = dormand_prince(
            |t, x| asked.velocity(x, t),
            &start,
            &[ends.0, ends.1],
            tolerance,
            on_step,
        )?;
        return Ok(reached.pop().unwrap_or(start));
    }
    let grid = grid(config.num_steps, ends)?;
    let mut x = start;
    for (k, pair) in grid.windows(2).enumerate() {
        let (from, to) = (pair[0], pair[1]);
        let dt = to - from;
        let first = asked.velocity(&x, from)?;
        let euler = (&x + (&first * dt)?)?;
        x = if config.method == OdeMethod::Heun {
            let second = asked.velocity(&euler, to)?;
            (x + ((first + second)? * (0.5 * dt))?)?
        } else {
            euler
        };
        on_step(&TimeStep {
            done: k + 1,
            total: Some(grid.len() - 1),
            from,
            to,
            accepted: true,
            sample: &x,
        })?;
    }
    Ok(x)
}
