use std::f64::consts::{FRAC_PI_2, PI};
use std::fmt;

use serde::{Deserialize, Serialize};

/// The path x_t = α_t·x + σ_t·ε from noise ε at t = 0 to data x at t = 1 (Ma et al., 2401.08740, §2.3; the paper's
/// time runs the other way, its public code's this way).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// α = t, σ = 1 − t. What SiT publishes.
    #[default]
    Linear,
    /// Generalised variance preserving: α = sin(πt/2), σ = cos(πt/2).
    Gvp,
    /// Variance preserving, with β falling linearly from 20 at t = 0 to 0.1 at t = 1:
    /// ln α = −¼(1 − t)²(20 − 0.1) − ½(1 − t)·0.1, σ = √(1 − α²).
    Vp,
}

/// β of the VP path at t = 1 and at t = 0.
const BETA: (f64, f64) = (0.1, 20.0);

impl Path {
    /// α_t, how much data there is.
    pub fn alpha(self, t: f64) -> f64 {
        match self {
            Self::Linear => t,
            Self::Gvp => (FRAC_PI_2 * t).sin(),
            Self::Vp => vp_log_alpha(t).exp(),
        }
    }

    /// σ_t, how much noise there is; not a number beyond t = 1 on the VP path.
    pub fn sigma(self, t: f64) -> f64 {
        match self {
            Self::Linear => 1.0 - t,
            Self::Gvp => (FRAC_PI_2 * t).cos(),
            // β's line goes on beyond t = 1 and α comes down again, but there is no such process.
            Self::Vp if t > 1.0 => f64::NAN,
            // 1 − α² without cancellation near t = 1.
            Self::Vp => (-(2.0 * vp_log_alpha(t)).exp_m1()).sqrt(),
        }
    }

    /// dα/dt.
    pub fn d_alpha(self, t: f64) -> f64 {
        match self {
            Self::Linear => 1.0,
            Self::Gvp => FRAC_PI_2 * (FRAC_PI_2 * t).cos(),
            Self::Vp => self.alpha(t) * self.log_slope(t),
        }
    }

    /// dσ/dt; infinite at t = 1 on the VP path.
    pub fn d_sigma(self, t: f64) -> f64 {
        match self {
            Self::Linear => -1.0,
            Self::Gvp => -FRAC_PI_2 * (FRAC_PI_2 * t).sin(),
            Self::Vp => -self.alpha(t).powi(2) * self.log_slope(t) / self.sigma(t),
        }
    }

    /// d ln α/dt, with which the velocity is v = (d ln α/dt)·x_t + [`score_weight`](Self::score_weight)·score
    /// (2401.08740, §2.2); infinite at t = 0 on the paths that start without data (Linear, GVP).
    pub fn log_slope(self, t: f64) -> f64 {
        match self {
            Self::Linear => 1.0 / t,
            Self::Gvp => PI / (2.0 * (FRAC_PI_2 * t).tan()),
            Self::Vp => 0.5 * vp_beta(t),
        }
    }

    /// (d ln α/dt)·σ² − σ·dσ/dt, the score's part in the velocity: half of g² of the diffusion that has these
    /// marginals without further noise, the reference's "SBDM".
    pub fn score_weight(self, t: f64) -> f64 {
        match self {
            Self::Linear | Self::Gvp => {
                let sigma = self.sigma(t);
                self.log_slope(t) * sigma * sigma - sigma * self.d_sigma(t)
            }
            // The same in closed form, also where σ is 0.
            Self::Vp => 0.5 * vp_beta(t),
        }
    }

    /// σ·dα/dt − α·dσ/dt, what separates noise from velocity, where it is the same at all times.
    pub(crate) fn turn(self) -> Option<f64> {
        match self {
            Self::Linear => Some(1.0),
            Self::Gvp => Some(FRAC_PI_2),
            Self::Vp => None,
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linear => "linear",
            Self::Gvp => "gvp",
            Self::Vp => "vp",
        })
    }
}

fn vp_beta(t: f64) -> f64 {
    BETA.0 + (1.0 - t) * (BETA.1 - BETA.0)
}

fn vp_log_alpha(t: f64) -> f64 {
    -0.25 * (1.0 - t).powi(2) * (BETA.1 - BETA.0) - 0.5 * (1.0 - t) * BETA.0
}
