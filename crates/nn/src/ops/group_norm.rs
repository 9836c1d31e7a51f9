use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::norm::normalize_composed;
use super::{is_fused_on_cpu, silu, values};
use crate::kernels::group_norm as kernel;

/// GroupNorm (Wu & He 2018, arXiv 1803.08494, eq. 1–3, 7): x (B, C, …) normalised over each of `groups` groups of
/// consecutive channels of a sample, then scaled and shifted by weight and bias (C,) of the channel.
///
/// For inference: fused it has **no backward**, and a backward that reaches it is an error.
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
) -> Result<Tensor> {
    normalize(x, weight, bias, (groups, eps), false)
}

/// SiLU of [`group_norm`], in one pass.
pub fn group_norm_silu(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
) -> Result<Tensor> {
    normalize(x, weight, bias, (groups, eps), true)
}

fn normalize(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    (groups, eps): (usize, f64),
    activated: bool,
) -> Result<Tensor> {
    let channels = x.dim(1)?;
    if groups == 0
        || !channels.is_multiple_of(groups)
        || x.elem_count() == 0
        || weight.dims() != [channels]
        || bias.dims() != [channels]
    {
        bail!(
            "group norm: x {:?}, weight {:?} and bias {:?} do not fit {groups} groups",
            x.dims(),
            weight.dims(),
            bias.dims()
        );
    }
    let (weight, bias) = (&weight.to_dtype(x.dtype())?, &bias.to_dtype(x.dtype())?);
    if !is_fused_on_cpu(&[x, weight, bias]) {
        let y = group_norm_composed(x, weight, bias, groups, eps)?;
        return if activated { silu(&y) } else { Ok(y) };
    }
    let shape = kernel::Shape {
        channels: channels / groups,
        groups,
        pixels: x.dims()[2..].iter().product(),
        eps,
        silu: activated,
    };
    x.contiguous()?.apply_op3(
        &weight.contiguous()?,
        &bias.contiguous()?,
        GroupNorm { shape },
    )
}

/// GroupNorm from candle's operations.
fn group_norm_composed(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
) -> Result<Tensor> {
    let (b, c) = (x.dim(0)?, x.dim(1)?);
    let p = x.elem_count() / (b * c);
    normalize_composed(&x.reshape((b, groups, c / groups * p))?, eps)? // (B, G, C/G·P)
        .reshape((b, c, p))?
        .broadcast_mul(&weight.unsqueeze(1)?)?
        .broadcast_add(&bias.unsqueeze(1)?)?
        .reshape(x.shape())
}

struct GroupNorm {
    shape: kernel::Shape,
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "group norm for inference"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w, b) = (values(x, xl)?, values(w, wl)?, values(b, bl)?);
        let y = kernel::group_norm(x, w, b, self.shape);
        Ok((CpuStorage::F32(y), xl.shape().clone()))
    }
}
