use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

#[cfg(feature = "cuda")]
use super::is_fused_on_gpu;
use super::lora::weight_gradient;
use super::{host, is_fused_on_cpu, tensor, values};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::kernels::elementwise::{Act, act, act_backward, broadcast_rows, sum_rows};
use crate::kernels::matmul::{Into, Mat, matmul};
use crate::kernels::unwritten;
use crate::tape::{apply2, apply3};

/// y = x·Wᵀ + b for x (…, I), W (O, I), b (O,) → (…, O). W and b are rounded to x's type where theirs is another, so that
/// f32 weights work on bf16 activations and get f32 gradients.
///
/// Backward forms only what is tracked: a frozen weight costs no dW, an untracked input no dX.
/// (candle's own matmul always forms both.)
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    check(x, w, b)?;
    #[cfg(feature = "cuda")]
    if is_fused_on_gpu(x, &[Some(w), b]) {
        return cuda::linear::linear(x, w, b, None);
    }
    let w = &w.to_dtype(x.dtype())?;
    let b = b.map(|b| b.to_dtype(x.dtype())).transpose()?;
    let b = b.as_ref();
    if !is_fused_on_cpu(&[x, w]) {
        return linear_composed(x, w, b);
    }
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    match b {
        Some(b) => apply3(&x, &w, &b.contiguous()?, Linear),
        None => apply2(&x, &w, Linear),
    }
}

/// GELU-tanh(x·Wᵀ + b), one operation: the pre-activation is kept for backward, and its gradient
/// never passes through the graph.
pub fn linear_gelu(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    activated(x, w, b, Act::GeluTanh)
}

/// As [`linear_gelu`] with the exact GELU.
pub fn linear_gelu_erf(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    activated(x, w, b, Act::GeluErf)
}

fn activated(x: &Tensor, w: &Tensor, b: &Tensor, act: Act) -> Result<Tensor> {
    check(x, w, Some(b))?;
    #[cfg(feature = "cuda")]
    if is_fused_on_gpu(x, &[Some(w), Some(b)]) {
        return cuda::linear::linear(x, w, Some(b), Some(act));
    }
    let (w, b) = (&w.to_dtype(x.dtype())?, &b.to_dtype(x.dtype())?);
    if !is_fused_on_cpu(&[x, w, b]) {
        return act_composed(&linear_composed(x, w, Some(b))?, act);
    }
    let op = LinearGelu {
        act,
        pre: Mutex::new(Vec::new()),
    };
    apply3(&x.contiguous()?, &w.contiguous()?, &b.contiguous()?, op)
}

/// The same from candle's operations.
pub(crate) fn linear_composed(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (o, i) = w.dims2()?;
    let rows = x.elem_count() / i;
    let y = x.reshape((rows, i))?.matmul(&w.t()?)?; // (R, O)
    let y = match b {
        Some(b) => y.broadcast_add(b)?,
        None => y,
    };
    y.reshape(with_last(x.dims(), o))
}

pub(super) fn act_composed(x: &Tensor, act: Act) -> Result<Tensor> {
    match act {
        Act::GeluTanh => x.gelu(),
        Act::GeluErf => x.gelu_erf(),
        Act::Silu => x.silu(),
    }
}

/// (…, I) → (…, `last`).
pub(crate) fn with_last(dims: &[usize], last: usize) -> Shape {
    let mut dims = dims.to_vec();
    if let Some(size) = dims.last_mut() {
        *size = last;
    }
    Shape::from(dims)
}

pub(super) fn check(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<()> {
    let (o, i) = w.dims2()?;
    if x.dims().last() != Some(&i) {
        bail!(
            "linear: the input {:?} does not end in the weight's {i} columns {:?}",
            x.dims(),
            w.dims()
        );
    }
    if let Some(b) = b.filter(|b| b.dims() != [o]) {
        bail!(
            "linear: the bias {:?} does not fit the weight's {o} rows",
            b.dims()
        );
    }
    Ok(())
}

struct Linear;

impl Linear {
    fn forward(
        x: &[f32],
        xl: &Layout,
        w: &[f32],
        wl: &Layout,
        b: Option<&[f32]>,
    ) -> Result<(Vec<f32>, Shape)> {
        let (o, i) = wl.shape().dims2()?;
        let rows = x.len() / i;
        let (mut y, into) = match b {
            Some(b) => (broadcast_rows(b, rows), Into::Accumulate),
            None => (unwritten(rows * o), Into::Overwrite),
        };
        matmul(
            &mut y,
            o,
            into,
            1.0,
            Mat::new(x, rows, i),
            Mat::new(w, o, i).t(),
        );
        Ok((y, with_last(xl.dims(), o)))
    }

    /// dX = dY·W, dW = dYᵀ·X, db = column sums of dY. Those of variables go straight into their sums where a pass
    /// that keeps sums is under way ([`Gradients`](crate::Gradients)), and are none then.
    fn backward(
        x: &Tensor,
        w: &Tensor,
        b: Option<&Tensor>,
        dy: &[f32],
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (o, i) = w.dims2()?;
        let rows = dy.len() / o;
        let dy_mat = Mat::new(dy, rows, o);
        let dx = if x.track_op() {
            let mut dx = unwritten(rows * i);
            host!(w => w; matmul(&mut dx, i, Into::Overwrite, 1.0, dy_mat, Mat::new(w, o, i)));
            Some(tensor(dx, x.shape())?)
        } else {
            None
        };
        let dw = host!(x => x; weight_gradient(w, |dw, into| {
            matmul(dw, i, into, 1.0, dy_mat.t(), Mat::new(x, rows, i));
        })?);
        let db = match b {
            Some(b) => weight_gradient(b, |db, into| sum_rows(dy, db, into))?,
            None => None,
        };
        Ok((dx, dw, db))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
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
        let (y, shape) =
            Self::forward(values(x, xl)?, xl, values(w, wl)?, wl, Some(values(b, bl)?))?;
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        host!(dy => dy; Self::backward(x, w, Some(b), dy))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, shape) = Self::forward(values(x, xl)?, xl, values(w, wl)?, wl, None)?;
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw, _) = host!(dy => dy; Self::backward(x, w, None, dy))?;
        Ok((dx, dw))
    }
}

struct LinearGelu {
    act: Act,
    /// x·Wᵀ + b, left by the forward for its own backward.
    pre: Mutex<Vec<f32>>,
}

impl CustomOp3 for LinearGelu {
    fn name(&self) -> &'static str {
        "linear-gelu"
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
        let (pre, shape) =
            Linear::forward(values(x, xl)?, xl, values(w, wl)?, wl, Some(values(b, bl)?))?;
        let y = act(self.act, &pre);
        match self.pre.lock() {
            Ok(mut slot) => *slot = pre,
            Err(_) => bail!("linear-gelu: an earlier forward panicked"),
        }
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Ok(pre) = self.pre.lock() else {
            bail!("linear-gelu: an earlier forward panicked")
        };
        let dpre = host!(dy => dy; act_backward(self.act, &pre, dy));
        Linear::backward(x, w, Some(b), &dpre)
    }
}
