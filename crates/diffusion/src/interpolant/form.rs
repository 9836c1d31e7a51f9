use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::Path;

/// The diffusion coefficient w_t of the reverse equation dx = (v + w·score) dt + √(2w) dW: any w ≥ 0 leaves
/// the marginals as they are (Ma et al., 2401.08740, eq. 5 and table 2), so it is chosen at sampling time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiffusionForm {
    /// n
    Constant,
    /// n · [`Path::score_weight`], as in score-based diffusion models; infinite at t = 0 on the paths Linear and GVP.
    Sbdm,
    /// n · σ_t. What SiT's sampling script takes.
    #[default]
    Sigma,
    /// n · (1 − t)
    Linear,
    /// ¼ (n · cos(πt) + 1)²
    Decreasing,
    /// n · sin²(πt)
    IncreasingDecreasing,
}

impl DiffusionForm {
    /// w_t on `path` with norm `n`.
    pub fn at(self, path: Path, n: f64, t: f64) -> f64 {
        match self {
            Self::Constant => n,
            Self::Sbdm => n * path.score_weight(t),
            Self::Sigma => n * path.sigma(t),
            Self::Linear => n * (1.0 - t),
            Self::Decreasing => 0.25 * (n * (PI * t).cos() + 1.0).powi(2),
            Self::IncreasingDecreasing => n * (PI * t).sin().powi(2),
        }
    }
}
