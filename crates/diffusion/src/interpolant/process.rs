use candle_core::{DType, Tensor};
use tinyfusion_core::{Error, Result};

use crate::{InterpolantConfig, Prediction};

/// The process of SiT in continuous time: formulas in f64 on the host, applied to f32 tensors; no weights.
///
/// x_t = α_t·x + σ_t·ε with data x, noise ε and times `t`, one per sample, t = 1 being data. Every estimate that a
/// network can make is an affine function of x_t and every other, so each conversion is one formula for two coefficients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interpolant {
    config: InterpolantConfig,
}

/// a·x_t + b·prediction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Mix {
    pub(crate) of_x: f64,
    pub(crate) of_prediction: f64,
}

impl Mix {
    /// The estimate of x_t (B, …) and its prediction (B, …) at one time for the whole batch.
    pub(crate) fn apply(self, x: &Tensor, prediction: &Tensor) -> Result<Tensor> {
        if self.of_x == 0.0 {
            return match self.of_prediction {
                1.0 => Ok(prediction.clone()),
                b => Ok((prediction * b)?),
            };
        }
        Ok(((x * self.of_x)? + (prediction * self.of_prediction)?)?)
    }

    fn is_finite(self) -> bool {
        self.of_x.is_finite() && self.of_prediction.is_finite()
    }
}

impl Interpolant {
    /// The process of these settings.
    pub fn new(config: InterpolantConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }

    /// The settings it was made with.
    pub fn config(&self) -> &InterpolantConfig {
        &self.config
    }

    /// x_t = α_t·x + σ_t·ε, all (B, …) (2401.08740, eq. 1).
    pub fn x_t(&self, x_start: &Tensor, noise: &Tensor, t: &[f64]) -> Result<Tensor> {
        let path = self.config.path;
        let signal = self.per_sample(t, x_start, "α", |t| path.alpha(t))?;
        let spread = self.per_sample(t, x_start, "σ", |t| path.sigma(t))?;
        Ok((x_start.broadcast_mul(&signal)? + noise.broadcast_mul(&spread)?)?)
    }

    /// dx_t/dt = dα/dt·x + dσ/dt·ε (2401.08740, eq. 3 before the average).
    pub fn velocity_target(&self, x_start: &Tensor, noise: &Tensor, t: &[f64]) -> Result<Tensor> {
        let path = self.config.path;
        let signal = self.per_sample(t, x_start, "dα/dt", |t| path.d_alpha(t))?;
        let spread = self.per_sample(t, x_start, "dσ/dt", |t| path.d_sigma(t))?;
        Ok((x_start.broadcast_mul(&signal)? + noise.broadcast_mul(&spread)?)?)
    }

    /// The velocity that a network's `prediction` (B, …) for x_t (B, …) means: the drift of the
    /// probability-flow equation dx = v dt.
    pub fn velocity(&self, prediction: &Tensor, x_t: &Tensor, t: &[f64]) -> Result<Tensor> {
        self.mixed(prediction, x_t, t, "velocity", |t| self.velocity_mix(t))
    }

    /// ∇ ln p_t(x_t) as the network's `prediction` (B, …) means it.
    pub fn score(&self, prediction: &Tensor, x_t: &Tensor, t: &[f64]) -> Result<Tensor> {
        self.mixed(prediction, x_t, t, "score", |t| self.score_mix(t))
    }

    /// The noise ε in x_t as the network's `prediction` (B, …) means it.
    pub fn noise(&self, prediction: &Tensor, x_t: &Tensor, t: &[f64]) -> Result<Tensor> {
        self.mixed(prediction, x_t, t, "noise", |t| self.noise_mix(t))
    }

    /// The data in x_t as the network's `prediction` (B, …) means it: x̂ = (x_t + σ²·score)/α (Tweedie).
    pub fn x_start(&self, prediction: &Tensor, x_t: &Tensor, t: &[f64]) -> Result<Tensor> {
        self.mixed(prediction, x_t, t, "estimate of the data", |t| {
            self.x_start_mix(t)
        })
    }

    /// From v: ε = (dα/dt·x_t − α·v)/(σ·dα/dt − α·dσ/dt). From the score: ε = −σ·score.
    fn noise_mix(&self, t: f64) -> Mix {
        let path = self.config.path;
        match self.config.prediction {
            Prediction::Noise => Mix {
                of_x: 0.0,
                of_prediction: 1.0,
            },
            Prediction::Score => Mix {
                of_x: 0.0,
                of_prediction: -path.sigma(t),
            },
            Prediction::Velocity => match path.turn() {
                Some(turn) => Mix {
                    of_x: path.d_alpha(t) / turn,
                    of_prediction: -path.alpha(t) / turn,
                },
                // With σ² + α² = 1 it is (dα/dt)/σ, which falls out: what is left has values at t = 1, too.
                None => Mix {
                    of_x: path.sigma(t),
                    of_prediction: -path.sigma(t) / path.log_slope(t),
                },
            },
        }
    }

    /// score = −ε/σ
    pub(crate) fn score_mix(&self, t: f64) -> Mix {
        if self.config.prediction == Prediction::Score {
            return Mix {
                of_x: 0.0,
                of_prediction: 1.0,
            };
        }
        let (noise, sigma) = (self.noise_mix(t), self.config.path.sigma(t));
        Mix {
            of_x: -noise.of_x / sigma,
            of_prediction: -noise.of_prediction / sigma,
        }
    }

    /// From the score: v = (d ln α/dt)·x_t + w·score with w = [`Path::score_weight`]; from the noise by
    /// score = −ε/σ.
    pub(crate) fn velocity_mix(&self, t: f64) -> Mix {
        let path = self.config.path;
        match self.config.prediction {
            Prediction::Velocity => Mix {
                of_x: 0.0,
                of_prediction: 1.0,
            },
            Prediction::Score => Mix {
                of_x: path.log_slope(t),
                of_prediction: path.score_weight(t),
            },
            Prediction::Noise => Mix {
                of_x: path.log_slope(t),
                of_prediction: -path.score_weight(t) / path.sigma(t),
            },
        }
    }

    /// x̂ = (x_t − σ·ε)/α
    pub(crate) fn x_start_mix(&self, t: f64) -> Mix {
        let (path, noise) = (self.config.path, self.noise_mix(t));
        let (alpha, sigma) = (path.alpha(t), path.sigma(t));
        Mix {
            of_x: (1.0 - sigma * noise.of_x) / alpha,
            of_prediction: -sigma * noise.of_prediction / alpha,
        }
    }

    /// `mix`, or an error where it has no value: nothing that is not a number gets into a sample.
    pub(crate) fn checked(&self, mix: Mix, what: &str, t: f64) -> Result<Mix> {
        if mix.is_finite() {
            return Ok(mix);
        }
        Err(self.no_value(what, t))
    }

    pub(crate) fn no_value(&self, what: &str, t: f64) -> Error {
        let InterpolantConfig {
            path, prediction, ..
        } = self.config;
        Error::usage(format!(
            "the path {path} with prediction {prediction:?} has no {what} at t = {t}: stay inside (0, 1) by a larger \
             sample_eps or train_eps, a last step, or a solver that does not step beyond its interval"
        ))
    }

    fn mixed(
        &self,
        prediction: &Tensor,
        x_t: &Tensor,
        t: &[f64],
        what: &str,
        mix: impl Fn(f64) -> Mix,
    ) -> Result<Tensor> {
        self.check_output(prediction, x_t)?;
        let prediction = prediction.to_dtype(DType::F32)?;
        let of_x = self.per_sample(t, x_t, what, |t| mix(t).of_x)?; // (B, 1, …)
        let of_prediction = self.per_sample(t, x_t, what, |t| mix(t).of_prediction)?; // (B, 1, …)
        Ok((x_t.broadcast_mul(&of_x)? + prediction.broadcast_mul(&of_prediction)?)?)
    }

    /// A prediction has the shape of what it is about; a network with channels more must have dropped them.
    pub(crate) fn check_output(&self, prediction: &Tensor, x_t: &Tensor) -> Result<()> {
        if prediction.dims() == x_t.dims() {
            return Ok(());
        }
        Err(Error::usage(format!(
            "the network put out {:?}, but its prediction of a {:?} must be {:?}",
            prediction.dims(),
            self.config.prediction,
            x_t.dims()
        )))
    }

    /// `value(t)` per sample, computed in f64, as f32 (B, 1, …) that broadcasts against `like` (B, …).
    pub(crate) fn per_sample(
        &self,
        t: &[f64],
        like: &Tensor,
        what: &str,
        value: impl Fn(f64) -> f64,
    ) -> Result<Tensor> {
        if like.rank() == 0 || like.dim(0)? != t.len() {
            return Err(Error::usage(format!(
                "{} times were given for a batch of shape {:?}",
                t.len(),
                like.dims()
            )));
        }
        let value = |&t: &f64| match value(t) {
            v if v.is_finite() => Ok(v as f32),
            _ => Err(self.no_value(what, t)),
        };
        let values: Vec<f32> = t.iter().map(value).collect::<Result<_>>()?;
        let mut shape = vec![1; like.rank()];
        shape[0] = t.len();
        Ok(Tensor::from_vec(values, shape, like.device())?)
    }
}
