use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

#[cfg(feature = "cuda")]
use super::is_fused_on_gpu;
use super::linear::{act_composed, check, linear_composed, with_last};
use super::{host, is_fused_on_cpu, tensor, values};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::gradients::write_into_sum;
use crate::kernels::elementwise::{Act, act, act_backward, broadcast_rows};
use crate::kernels::matmul::{Into, Mat, matmul};
use crate::kernels::unwritten;
use crate::tape::apply3;

/// A low-rank update of a linear layer: W + scale·B·A (Hu et al. 2021, arXiv 2106.09685).
#[derive(Debug, Clone)]
pub struct LowRank {
    /// A (r, I).
    pub a: Tensor,
    /// B (O, r).
    pub b: Tensor,
    /// α/r.
    pub scale: f64,
}

/// y = x·Wᵀ + bias + scale·(x·Aᵀ)·Bᵀ for x (…, I), W (O, I), bias (O,) → (…, O), one operation.
///
/// Fused where W and bias are frozen, as they are under a low-rank update: then nothing of the size of the
/// output but the output itself is made, and backward forms dX, dA and dB only. All are rounded to x's type where theirs
/// is another.
pub fn linear_low_rank(x: &Tensor, w: &Tensor, bias: &Tensor, update: &LowRank) -> Result<Tensor> {
    fused_or(x, w, bias, update, None)
}

/// GELU-tanh of [`linear_low_rank`], in the same operation.
pub fn linear_low_rank_gelu(
    x: &Tensor,
    w: &Tensor,
    bias: &Tensor,
    update: &LowRank,
) -> Result<Tensor> {
    fused_or(x, w, bias, update, Some(Act::GeluTanh))
}

/// As [`linear_low_rank_gelu`] with the exact GELU.
pub fn linear_low_rank_gelu_erf(
    x: &Tensor,
    w: &Tensor,
    bias: &Tensor,
    update: &LowRank,
) -> Result<Tensor> {
    fused_or(x, w, bias, update, Some(Act::GeluErf))
}

fn fused_or(
    x: &Tensor,
    w: &Tensor,
    bias: &Tensor,
    update: &LowRank,
    act: Option<Act>,
) -> Result<Tensor> {
    check(x, w, Some(bias))?;
    let LowRank { a, b, scale } = update;
    let ((o, i), (r, a_in), (b_out, b_r)) = (w.dims2()?, a.dims2()?, b.dims2()?);
    if (a_in, b_out, b_r) != (i, o, r) {
        bail!(
            "low-rank update: A {:?} and B {:?} do not fit a weight {:?}",
            a.dims(),
            b.dims(),
            w.dims()
        );
    }
    let frozen = !w.track_op() && !bias.track_op();
    #[cfg(feature = "cuda")]
    if frozen && is_fused_on_gpu(x, &[Some(w), Some(bias), Some(a), Some(b)]) {
        return cuda::lora::linear_low_rank(x, (w, bias), (a, b, *scale as f32), act);
    }
    let in_type = |t: &Tensor| t.to_dtype(x.dtype());
    let (w, bias) = (&in_type(w)?, &in_type(bias)?);
    let (a, b) = (&in_type(a)?, &in_type(b)?);
    if !frozen || !is_fused_on_cpu(&[x, w, bias, a, b]) {
        let y = (linear_composed(x, w, Some(bias))?
            + linear_composed(&linear_composed(x, a, None)?, &(b * *scale)?, None)?)?; // (…, O)
        return match act {
            None => Ok(y),
            Some(act) => act_composed(&y, act),
        };
    }
    let op = Op {
        w: w.contiguous()?,
        bias: bias.contiguous()?,
        scale: *scale as f32,
        act,
        kept: Mutex::default(),
    };
    apply3(&x.contiguous()?, &a.contiguous()?, &b.contiguous()?, op)
}

struct Op {
    w: Tensor,
    bias: Tensor,
    scale: f32,
    act: Option<Act>,
    /// Left by the forward for its own backward.
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// x·Aᵀ (R, r).
    low: Vec<f32>,
    /// What goes into the activation (R, O), if there is one.
    pre: Vec<f32>,
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "linear-low-rank"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        a: &CpuStorage,
        al: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((o, i), (r, _)) = (self.w.dims2()?, al.shape().dims2()?);
        let (x, a, b) = (values(x, xl)?, values(a, al)?, values(b, bl)?);
        let rows = x.len() / i;
        let x = Mat::new(x, rows, i);
        let mut low = unwritten(rows * r);
        matmul(&mut low, r, Into::Overwrite, 1.0, x, Mat::new(a, r, i).t());
        let w = &self.w;
        let bias = &self.bias;
        let mut y = host!(bias => bias; broadcast_rows(bias, rows)); // (R, O)
        host!(w => w; matmul(&mut y, o, Into::Accumulate, 1.0, x, Mat::new(w, o, i).t()));
        let low_mat = Mat::new(&low, rows, r);
        matmul(
            &mut y,
            o,
            Into::Accumulate,
            self.scale,
            low_mat,
            Mat::new(b, o, r).t(),
        );
        let out = self.act.map(|kind| act(kind, &y));
        let Ok(mut kept) = self.kept.lock() else {
            bail!("linear-low-rank: an earlier forward panicked")
        };
        let out = match out {
            None => y,
            Some(out) => {
                kept.pre = y;
                out
            }
        };
        kept.low = low;
        Ok((CpuStorage::F32(out), with_last(xl.dims(), o)))
    }

    /// With g the gradient of what enters the activation: dB = s·gᵀ·low, dlow = s·g·B, dA = dlowᵀ·x,
    /// dX = g·W + dlow·A.
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((o, i), (r, _), s) = (self.w.dims2()?, a.dims2()?, self.scale);
        let Ok(kept) = self.kept.lock() else {
            bail!("linear-low-rank: an earlier forward panicked")
        };
        let rows = dy.elem_count() / o;
        let through = match self.act {
            Some(kind) => Some(host!(dy => dy; act_backward(kind, &kept.pre, dy))),
            None => None,
        };
        host!(dy => dy, x => xs, a => av, b => bv; {
            let g = Mat::new(through.as_deref().unwrap_or(dy), rows, o);
            let mut dlow = unwritten(rows * r);
            matmul(&mut dlow, r, Into::Overwrite, s, g, Mat::new(bv, o, r));
            let dlow = Mat::new(&dlow, rows, r);
            let low = Mat::new(&kept.low, rows, r);
            let db = weight_gradient(b, |db, into| matmul(db, r, into, s, g.t(), low))?;
            let da = weight_gradient(a, |da, into| matmul(da, i, into, 1.0, dlow.t(), Mat::new(xs, rows, i)))?;
            let dx = if x.track_op() {
                let mut dx = unwritten(rows * i);
                let w = &self.w;
                host!(w => w; matmul(&mut dx, i, Into::Overwrite, 1.0, g, Mat::new(w, o, i)));
                matmul(&mut dx, i, Into::Accumulate, 1.0, dlow, Mat::new(av, r, i));
                Some(tensor(dx, x.shape())?)
            } else {
                None
            };
            Ok((dx, da, db))
        })
    }
}

/// The gradient of `weight`, formed by `write`: into its running sum where there is one (then there is nothing to hand
/// on), otherwise as a tensor; none for a frozen weight.
pub(super) fn weight_gradient(
    weight: &Tensor,
    write: impl Fn(&mut [f32], Into),
) -> Result<Option<Tensor>> {
    if !weight.track_op() || write_into_sum(weight, &write)? {
        return Ok(None);
    }
    let mut gradient = unwritten(weight.elem_count());
    write(&mut gradient, Into::Overwrite);
    Ok(Some(tensor(gradient, weight.shape())?))
}
