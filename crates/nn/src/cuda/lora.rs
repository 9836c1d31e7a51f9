use std::sync::Mutex;

use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::elementwise::{act_backward, bias_act};
use super::product::{Mat, product};
use super::weights::{gradient, rounded};
use super::{View, on_gpu, tensor, unwritten};
use crate::kernels::elementwise::Act;
use crate::kernels::matmul::Into;
use crate::ops::with_last;
use crate::tape::apply3;

/// act(x·Wᵀ + bias + scale·(x·Aᵀ)·Bᵀ) for x (…, I), frozen W (O, I) and bias (O,), A (r, I), B (O, r) on a GPU. All are rounded to
/// x's type; the gradients of A and B are of their own.
pub(crate) fn linear_low_rank(
    x: &Tensor,
    (w, bias): (&Tensor, &Tensor),
    (a, b, scale): (&Tensor, &Tensor, f32),
    act: Option<Act>,
) -> Result<Tensor> {
    let round = |weight: &Tensor| rounded(weight, x.dtype());
    let op = LowRank {
        w: round(w)?,
        bias: round(bias)?,
        a: round(a)?,
        b: round(b)?,
        scale,
        act,
        keeps: x.track_op() || a.track_op() || b.track_op(),
        kept: Mutex::default(),
    };
    apply3(&x.contiguous()?, &a.contiguous()?, &b.contiguous()?, op)
}

struct LowRank {
    w: Tensor,
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    scale: f32,
    act: Option<Act>,
    /// Whether there will be a backward.
    keeps: bool,
    /// Left by the forward for its own backward.
    kept: Mutex<Option<Kept>>,
}

struct Kept {
    /// x·Aᵀ (rows, r).
    low: Tensor,
    /// What goes into the activation (rows, O), if there is one.
    pre: Option<Tensor>,
}

impl CustomOp3 for LowRank {
    fn name(&self) -> &'static str {
        "linear-low-rank"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("a low-rank linear layer on a GPU: found its operands on the CPU")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let ((o, i), (r, _)) = (self.w.dims2()?, self.a.dims2()?);
        let rows = xl.shape().elem_count() / i;
        let x = View::new(x, xl)?;
        let mut low = unwritten(x.device(), rows * r, x.dtype())?;
        let mut y = unwritten(x.device(), rows * o, x.dtype())?;
        let out = on_gpu!(&self.w => w, &self.bias => bias, &self.a => a, &self.b => b; {
            let (x, w) = (Mat::new(x, rows, i), Mat::new(w, o, i));
            let (a, b) = (Mat::new(a, r, i), Mat::new(b, o, r));
            product(&mut low, 0, Into::Overwrite, 1.0, x, a.t())?;
            product(&mut y, 0, Into::Overwrite, 1.0, x, w.t())?;
            let of_low = Mat::new(View::whole(&low), rows, r);
            product(&mut y, 0, Into::Accumulate, self.scale, of_low, b.t())?;
            bias_act(&mut y, bias, self.act, (rows, o))?
        });
        let (out, pre) = match out {
            None => (y, None),
            Some(out) => (out, Some(y)),
        };
        if self.keeps {
            let Ok(mut kept) = self.kept.lock() else {
                bail!("a low-rank linear layer: an earlier forward panicked")
            };
            *kept = Some(Kept {
                low: tensor(low, (rows, r)),
                pre: pre.map(|pre| tensor(pre, (rows, o))),
            });
        }
        Ok((out, with_last(xl.dims(), o)))
    }

    /// With g the gradient of what enters the activation: dB = s·gᵀ·low, dlow = s·g·B, dA = dlowᵀ·x, dX = g·W + dlow·A.
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((o, i), (r, _), s) = (self.w.dims2()?, a.dims2()?, self.scale);
        let rows = x.elem_count() / i;
        let kept = self.kept.lock();
        let Some(Kept { low, pre }) = kept.as_deref().ok().and_then(Option::as_ref) else {
            bail!("a low-rank linear layer: a backward without its forward")
        };
        let g = match (self.act, pre) {
            (Some(act), Some(pre)) => act_backward(act, pre, dy)?,
            _ => dy.clone(),
        };
        on_gpu!(&g => g, x => xs, low => low, &self.w => w, &self.a => av, &self.b => bv; {
            let (g, xs) = (Mat::new(g, rows, o), Mat::new(xs, rows, i));
            let mut dlow = unwritten(w.device(), rows * r, w.dtype())?;
            product(&mut dlow, 0, Into::Overwrite, s, g, Mat::new(bv, o, r))?;
            let dlow = Mat::new(View::whole(&dlow), rows, r);
            let low = Mat::new(low, rows, r);
            let db = gradient(b, |db, from, into| product(db, from, into, s, g.t(), low))?;
            let da = gradient(a, |da, from, into| product(da, from, into, 1.0, dlow.t(), xs))?;
            let dx = match x.track_op() {
                true => {
                    let mut dx = unwritten(w.device(), rows * i, w.dtype())?;
                    product(&mut dx, 0, Into::Overwrite, 1.0, g, Mat::new(w, o, i))?;
                    product(&mut dx, 0, Into::Accumulate, 1.0, dlow, Mat::new(av, r, i))?;
                    Some(tensor(dx, x.shape()))
                }
                false => None,
            };
            Ok((dx, da, db))
        })
    }
}
