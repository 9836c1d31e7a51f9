use std::str::FromStr;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};

/// Which elements of the hidden states are compared when features are distilled.
///
/// Trained transformers have *massive activations*: few elements, hundreds of times larger than the rest,
/// whose squared differences drown everything else. TinyFusion masks them (§3.4); without the mask its
/// training diverges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FeatureLoss {
    /// No features, only outputs.
    None,
    /// Every element: mean (s − t)².
    All,
    /// Each side by its own mask, mean (m_s·s − m_t·t)², as the reference does: an element that is an outlier
    /// on one side only still adds s² or t².
    Masked,
    /// Only elements that are inliers on both sides: mean (m_s·m_t·(s − t))².
    Joint,
}

impl FromStr for FeatureLoss {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "none" => Ok(Self::None),
            "all" => Ok(Self::All),
            "masked" => Ok(Self::Masked),
            "joint" => Ok(Self::Joint),
            other => Err(Error::usage(format!(
                "no feature loss is called `{other}`; there are none, all, masked, joint"
            ))),
        }
    }
}

/// Which elements of hidden states are not massive, and by what measure. Constants: no gradient flows here.
#[derive(Debug, Clone)]
pub struct Inliers {
    /// (B,) mean over tokens and channels.
    pub mean: Tensor,
    /// (B,) unbiased variance over tokens and channels.
    pub variance: Tensor,
    /// (B, T, D) f32, 1 where |x − mean| < k·√variance.
    pub mask: Tensor,
}

/// The elements of `x` (B, T, D) within `k` standard deviations of their sample's mean.
pub fn inliers(x: &Tensor, k: f64) -> Result<Inliers> {
    let shape = x.dims3()?;
    let (b, n) = (shape.0, shape.1 * shape.2);
    let x = x.detach().to_dtype(DType::F32)?.reshape((b, n))?; // (B, T·D)
    let mean = x.mean_keepdim(1)?; // (B, 1)
    let squares = x.broadcast_sub(&mean)?.sqr()?;
    let variance = (squares.sum_keepdim(1)? / n.saturating_sub(1).max(1) as f64)?; // (B, 1)
    // Both sides squared: the squares are there already.
    let mask = squares
        .broadcast_lt(&(&variance * (k * k))?)?
        .to_dtype(DType::F32)?;
    Ok(Inliers {
        mean: mean.squeeze(1)?,
        variance: variance.squeeze(1)?,
        mask: mask.reshape(shape)?, // (B, T, D)
    })
}

/// The difference of hidden states `student` and `teacher`, both (B, T, D), per sample, (B,) f32.
///
/// All modes divide by all T·D elements, masked ones included (as the reference does), so that their values
/// can be compared: `masked` − `joint` is what one-sided outliers add. No gradient reaches the teacher, and none
/// passes through a mask. A value that is not finite makes its sample's loss not finite.
pub fn feature_loss(
    student: &Tensor,
    teacher: &Tensor,
    which: FeatureLoss,
    k: f64,
) -> Result<Tensor> {
    let (b, _, _) = student.dims3()?;
    if student.dims() != teacher.dims() {
        return Err(Error::usage(format!(
            "the student's hidden states are {:?} and the teacher's {:?} (samples, tokens, width): features can be \
             distilled only between networks of one width and one number of tokens; use features = \"none\"",
            student.dims(),
            teacher.dims()
        )));
    }
    let student = student.to_dtype(DType::F32)?;
    let teacher = teacher.detach().to_dtype(DType::F32)?;
    // Products, not selections: 0·NaN is NaN, so that a broken network is seen.
    let difference = match which {
        FeatureLoss::None => return Ok(Tensor::zeros(b, DType::F32, student.device())?),
        FeatureLoss::All => (student - teacher)?,
        FeatureLoss::Masked => {
            let (of_student, of_teacher) = (inliers(&student, k)?.mask, inliers(&teacher, k)?.mask);
            ((student * of_student)? - (teacher * of_teacher)?)?
        }
        FeatureLoss::Joint => {
            let both = (inliers(&student, k)?.mask * inliers(&teacher, k)?.mask)?;
            ((student - teacher)? * both)?
        }
    };
    Ok(difference.sqr()?.flatten_from(1)?.mean(1)?) // (B,)
}
