use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};

use crate::{DiffusionForm, Path};

/// What the network estimates. Each can be turned into the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// v = dα/dt·x + dσ/dt·ε, averaged over what x_t may have come from.
    #[default]
    Velocity,
    /// The noise ε.
    Noise,
    /// ∇ ln p_t(x_t) = −ε/σ, averaged likewise.
    Score,
}

/// What multiplies the squared error of a noise or score prediction, with w =
/// [`Path::score_weight`](Path::score_weight).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weighting {
    /// 1
    #[default]
    None,
    /// (w/σ)²: the loss of the velocity that the prediction means.
    Velocity,
    /// w/σ²: a bound on the likelihood (Song et al., 2101.09258).
    Likelihood,
}

/// Settings of an [`Interpolant`](crate::Interpolant). The default is what SiT publishes.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InterpolantConfig {
    /// From noise to data.
    pub path: Path,
    /// What the network estimates.
    pub prediction: Prediction,
    /// Weight of the training loss over time; a velocity is not weighted.
    pub weighting: Weighting,
    /// How far training times stay from where the formulas have no value; where it is not given: 1e-5 on the path
    /// VP, 0 for a velocity on the others, which needs none and may have no other, 1e-3 otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_eps: Option<f64>,
    /// The same for sampling; where it is not given: 1e-3, and 0 for a velocity on the paths Linear and GVP. There it
    /// is for the stochastic equation alone: the flow is solved over all of [0, 1] whatever it says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample_eps: Option<f64>,
}

impl InterpolantConfig {
    /// Checks that the settings go together.
    pub fn validate(&self) -> Result<()> {
        for (name, eps) in [
            ("train_eps", self.train_eps),
            ("sample_eps", self.sample_eps),
        ] {
            if let Some(eps) = eps
                && !(0.0..0.5).contains(&eps)
            {
                return Err(Error::usage(format!(
                    "interpolant: {name} is {eps}; it must be in [0, 0.5)"
                )));
            }
        }
        // The public code ignores such a distance and such a weighting in silence.
        if self.is_plain_velocity()
            && let Some(eps) = self.train_eps
            && eps != 0.0
        {
            return Err(Error::usage(format!(
                "interpolant: train_eps {eps} does nothing for a velocity on the path {}, which is trained on all of [0, \
                 1]; leave it out",
                self.path
            )));
        }
        if self.prediction == Prediction::Velocity && self.weighting != Weighting::None {
            return Err(Error::usage(format!(
                "interpolant: the loss of a velocity has no weighting, found {:?}; set it to `none`",
                self.weighting
            )));
        }
        Ok(())
    }

    /// Times are drawn from this interval in training.
    pub fn train_interval(&self) -> (f64, f64) {
        let default = match (self.path, self.prediction) {
            (Path::Vp, _) => 1e-5,
            (_, Prediction::Velocity) => 0.0,
            _ => 1e-3,
        };
        self.interval(self.train_eps.unwrap_or(default))
    }

    /// The probability-flow equation is solved over this interval.
    pub fn ode_interval(&self) -> (f64, f64) {
        self.interval(self.sample_eps())
    }

    /// The stochastic equation is solved over this interval; `last_step` is what is left for a
    /// last step of another kind, 0 for none.
    pub fn sde_interval(&self, form: DiffusionForm, last_step: f64) -> (f64, f64) {
        let eps = self.sample_eps();
        // Where there is no data in x_t, it has no score to speak of but the noise's own.
        let wants_data = form == DiffusionForm::Sbdm || self.prediction != Prediction::Velocity;
        let t0 = if self.path != Path::Vp && wants_data {
            eps
        } else {
            0.0
        };
        let gap = if last_step == 0.0 { eps } else { last_step };
        (t0, 1.0 - gap)
    }

    fn sample_eps(&self) -> f64 {
        let default = if self.is_plain_velocity() { 0.0 } else { 1e-3 };
        self.sample_eps.unwrap_or(default)
    }

    /// A velocity on a path where it has a value at all times.
    fn is_plain_velocity(&self) -> bool {
        self.prediction == Prediction::Velocity && self.path != Path::Vp
    }

    fn interval(&self, eps: f64) -> (f64, f64) {
        match (self.path, self.prediction) {
            (Path::Vp, _) => (0.0, 1.0 - eps),
            (_, Prediction::Velocity) => (0.0, 1.0),
            _ => (eps, 1.0 - eps),
        }
    }
}
