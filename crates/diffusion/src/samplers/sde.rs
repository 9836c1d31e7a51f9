use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};

use super::TimeStep;
use super::flow::{Asked, grid};
use crate::interpolant::Mix;
use crate::{DiffusionForm, Interpolant};

/// Solver of the stochastic equation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SdeMethod {
    /// Euler–Maruyama: one network call a step.
    #[default]
    Euler,
    /// Noise first, then Heun on the drift: two network calls a step.
    Heun,
}

/// How the last stretch to t = 1 is gone, where noise would only spoil the sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LastStep {
    /// Not at all: the noisy steps go to the end of the interval.
    None,
    /// A step of the stochastic equation without its noise.
    #[default]
    Mean,
    /// The estimate of the data, E[x | x_t].
    Tweedie,
    /// A step of the probability-flow equation.
    Euler,
}

/// Settings of [`sde`]. The default is that of SiT's sampling script.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SdeConfig {
    /// The solver.
    pub method: SdeMethod,
    /// How much noise is added, and taken away again, over time.
    pub form: DiffusionForm,
    /// The norm n of that form.
    pub norm: f64,
    /// The last step.
    pub last_step: LastStep,
    /// Length of the last step in t.
    pub last_step_size: f64,
    /// Steps in all, the last one included, as SiT counts: one fewer has noise (also where there is no last step).
    pub num_steps: usize,
}

impl Default for SdeConfig {
    fn default() -> Self {
        Self {
            method: SdeMethod::default(),
            form: DiffusionForm::default(),
            norm: 1.0,
            last_step: LastStep::default(),
            last_step_size: 0.04,
            num_steps: 250,
        }
    }
}

/// The stochastic equation dx = (v + w·score) dt + √(2w) dW (Ma et al., 2401.08740, eq. 5 in this time's direction)
/// from noise `z` (B, C, H, W) to samples.
///
/// `predict(x, t)` gets x (B, C, H, W) f32 and t (B,) f32 in [0, 1] and returns the network's estimate (B, C, H, W);
/// drift and score come from one call. `noise(k)` gives the standard normal noise (B, C, H, W) of step k, asked
/// in ascending order of k from 0.
///
/// # Errors
/// A form or an estimate that has no value at one of the times is an [`Error::Usage`] before the network is asked
/// anything: the score of a velocity at t = 1, the form `sbdm` at t = 0.
pub fn sde(
    interpolant: &Interpolant,
    config: SdeConfig,
    z: &Tensor,
    predict: impl FnMut(&Tensor, &Tensor) -> Result<Tensor>,
    mut noise: impl FnMut(usize) -> Result<Tensor>,
    mut on_step: impl FnMut(&TimeStep<'_>) -> Result<()>,
) -> Result<Tensor> {
    let equation = Equation::new(interpolant, config)?;
    let times = &equation.times;
    let (end, noisy) = (times[times.len() - 1], times.len() - 1);
    let total = noisy + usize::from(config.last_step != LastStep::None);
    let mut asked = Asked {
        interpolant,
        predict,
    };
    let mut x = z.to_dtype(DType::F32)?;
    for (k, pair) in times.windows(2).enumerate() {
        let (from, to) = (pair[0], pair[1]);
        let dt = to - from;
        let kick = (noise(k)? * (2.0 * equation.diffusion(from)? * dt).sqrt())?; // (B, C, H, W)
        x = match config.method {
            SdeMethod::Euler => {
                let drift = asked.mixed(equation.drift(from)?, &x, from)?;
                ((x + (drift * dt)?)? + kick)?
            }
            SdeMethod::Heun => {
                let moved = (x + kick)?;
                let first = asked.mixed(equation.drift(from)?, &moved, from)?;
                let ahead = (&moved + (&first * dt)?)?;
                let second = asked.mixed(equation.drift(to)?, &ahead, to)?;
                (moved + ((first + second)? * (0.5 * dt))?)?
            }
        };
        on_step(&TimeStep {
            done: k + 1,
            total: Some(total),
            from,
            to,
            accepted: true,
            sample: &x,
        })?;
    }
    let Some(last) = equation.last(end)? else {
        return Ok(x);
    };
    let moved = asked.mixed(last, &x, end)?;
    x = match config.last_step {
        LastStep::Tweedie => moved,
        _ => (x + (moved * config.last_step_size)?)?,
    };
    on_step(&TimeStep {
        done: total,
        total: Some(total),
        from: end,
        to: 1.0,
        accepted: true,
        sample: &x,
    })?;
    Ok(x)
}

/// The stochastic equation on its grid of times.
struct Equation<'a> {
    interpolant: &'a Interpolant,
    config: SdeConfig,
    times: Vec<f64>,
}

impl<'a> Equation<'a> {
    /// Checks the settings, and every value that will be needed.
    fn new(interpolant: &'a Interpolant, config: SdeConfig) -> Result<Self> {
        if !(config.norm >= 0.0 && config.norm.is_finite()) {
            return Err(Error::usage(format!(
                "the norm of a diffusion must be a finite number from 0, found {}",
                config.norm
            )));
        }
        let gap = match config.last_step {
            LastStep::None => 0.0,
            _ if config.last_step_size > 0.0 && config.last_step_size < 1.0 => {
                config.last_step_size
            }
            _ => {
                return Err(Error::usage(format!(
                    "last_step_size must be between 0 and 1, found {}",
                    config.last_step_size
                )));
            }
        };
        let interval = interpolant.config().sde_interval(config.form, gap);
        if interval.0 >= interval.1 {
            return Err(Error::usage(format!(
                "a last step of {gap} leaves nothing of the interval from {}",
                interval.0
            )));
        }
        let equation = Self {
            interpolant,
            config,
            times: grid(config.num_steps, interval)?,
        };
        for (k, &t) in equation.times.iter().enumerate() {
            let is_end = k + 1 == equation.times.len();
            if !is_end || config.method == SdeMethod::Heun {
                equation.drift(t)?;
            }
        }
        equation.last(interval.1)?;
        Ok(equation)
    }

    /// w_t
    fn diffusion(&self, t: f64) -> Result<f64> {
        let (form, path) = (self.config.form, self.interpolant.config().path);
        let w = form.at(path, self.config.norm, t);
        // At the end of a path a form that goes to 0 may round to a little less.
        let w = if w > -1e-9 { w.max(0.0) } else { w };
        if w.is_finite() && w >= 0.0 {
            return Ok(w);
        }
        Err(Error::usage(format!(
            "the diffusion {form:?} on the path {path} is {w} at t = {t}; use another form or a larger sample_eps"
        )))
    }

    /// v + w·score
    fn drift(&self, t: f64) -> Result<Mix> {
        let w = self.diffusion(t)?;
        let (velocity, score) = (
            self.interpolant.velocity_mix(t),
            self.interpolant.score_mix(t),
        );
        let drift = Mix {
            of_x: velocity.of_x + w * score.of_x,
            of_prediction: velocity.of_prediction + w * score.of_prediction,
        };
        self.interpolant.checked(drift, "velocity and score", t)
    }

    /// What the last step at `t` asks of the network, if there is one.
    fn last(&self, t: f64) -> Result<Option<Mix>> {
        let interpolant = self.interpolant;
        Ok(match self.config.last_step {
            LastStep::None => None,
            LastStep::Mean => Some(self.drift(t)?),
            LastStep::Tweedie => {
                let mix = interpolant.x_start_mix(t);
                Some(interpolant.checked(mix, "estimate of the data", t)?)
            }
            LastStep::Euler => {
                Some(interpolant.checked(interpolant.velocity_mix(t), "velocity", t)?)
            }
        })
    }
}
