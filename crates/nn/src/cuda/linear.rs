use std::sync::Mutex;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};

use super::elementwise::{act_backward, bias_act};
use super::lt::{self, Sizes, Written};
use super::product::{Mat, product};
use super::sums::{self, Place, Rows};
use super::weights::{gradient, rounded};
use super::{View, on_gpu, tensor, unwritten};
use crate::kernels::elementwise::Act;
use crate::kernels::matmul::Into;
use crate::ops::with_last;
use crate::tape::{apply2, apply3};

/// act(x·Wᵀ + b) for x (…, I), W (O, I), b (O,) on a GPU: one product by cublasLt where [`lt::linear`] takes the operands,
/// otherwise cuBLAS's product, then one kernel over it. W and b are rounded to x's type; their gradients are of their own.
///
/// The pre-activation is kept for backward, which forms only what is tracked.
pub(crate) fn linear(
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    act: Option<Act>,
) -> Result<Tensor> {
    let round = |weight: &Tensor| rounded(weight, x.dtype());
    let op = Linear {
        w: round(w)?,
        b: b.map(round).transpose()?,
        act,
        keeps: x.track_op() || w.track_op() || b.is_some_and(Tensor::track_op),
        pre: Mutex::default(),
    };
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    match b {
        Some(b) => apply3(&x, &w, &b.contiguous()?, op),
        None => apply2(&x, &w, op),
    }
}

struct Linear {
    /// In x's type.
    w: Tensor,
    b: Option<Tensor>,
    /// Behind a bias only.
    act: Option<Act>,
    /// Whether there will be a backward.
    keeps: bool,
    /// x·Wᵀ + b (rows, O) where there is an activation, left by the forward for its own backward.
    pre: Mutex<Option<Tensor>>,
}

impl Linear {
    fn forward(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let (o, i) = self.w.dims2()?;
        let rows = xl.shape().elem_count() / i;
        let sizes = Sizes { rows, o, i };
        let x = View::new(x, xl)?;
        let written = match &self.b {
            None => on_gpu!(&self.w => w; Written {
                y: multiplied(x, w, sizes)?,
                pre: None,
            }),
            Some(b) => on_gpu!(&self.w => w, b => b; {
                match lt::linear([x, w, b], sizes, self.act, self.keeps)? {
                    Some(written) => written,
                    None => self.in_two(x, w, b, sizes)?,
                }
            }),
        };
        if let Some(kept) = written.pre {
            let Ok(mut pre) = self.pre.lock() else {
                bail!("linear: an earlier forward panicked")
            };
            *pre = Some(tensor(kept, (rows, o)));
        }
        Ok((written.y, with_last(xl.dims(), o)))
    }

    /// The product, then a kernel over it.
    fn in_two(&self, x: View<'_>, w: View<'_>, b: View<'_>, sizes: Sizes) -> Result<Written> {
        let mut y = multiplied(x, w, sizes)?;
        Ok(
            match bias_act(&mut y, b, self.act, (sizes.rows, sizes.o))? {
                None => Written { y, pre: None },
                Some(out) => Written {
                    y: out,
                    pre: self.keeps.then_some(y),
                },
            },
        )
    }

    /// With g the gradient of what enters the activation: dX = g·W, dW = gᵀ·X, db = column sums of g. Those of variables go
    /// straight into their sums where there are some.
    fn backward(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: Option<&Tensor>,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (o, i) = w.dims2()?;
        let rows = x.elem_count() / i;
        let g = match self.act {
            None => dy.clone(),
            Some(act) => match self.pre.lock().ok().as_deref() {
                Some(Some(pre)) => act_backward(act, pre, dy)?,
                _ => bail!("linear: a backward without its forward"),
            },
        };
        on_gpu!(&g => g, x => xs, &self.w => ws; {
            let (g_mat, w_mat) = (Mat::new(g, rows, o), Mat::new(ws, o, i));
            let dx = match x.track_op() {
                true => {
                    let mut dx = unwritten(xs.device(), rows * i, xs.dtype())?;
                    product(&mut dx, 0, Into::Overwrite, 1.0, g_mat, w_mat)?;
                    Some(tensor(dx, x.shape()))
                }
                false => None,
            };
            let dw = gradient(w, |dw, from, into| {
                product(dw, from, into, 1.0, g_mat.t(), Mat::new(xs, rows, i))
            })?;
            let db = match b {
                Some(b) => gradient(b, |db, from, into| {
                    let of = Rows { groups: 1, t: rows, d: o };
                    sums::rows(g, of)?.write(db, from, Place { stride: o, at: [0; 2], into })
                })?,
                None => None,
            };
            Ok((dx, dw, db))
        })
    }
}

/// x·Wᵀ (rows, O).
fn multiplied(x: View<'_>, w: View<'_>, Sizes { rows, o, i }: Sizes) -> Result<CudaStorage> {
    let mut y = unwritten(x.device(), rows * o, x.dtype())?;
    let w = Mat::new(w, o, i);
    product(&mut y, 0, Into::Overwrite, 1.0, Mat::new(x, rows, i), w.t())?;
    Ok(y)
}

const ON_THE_CPU: &str = "linear on a GPU: found its operands on the CPU";

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
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
        bail!("{ON_THE_CPU}")
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
        self.forward(x, xl)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.backward(x, w, Some(b), dy)
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("{ON_THE_CPU}")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward(x, xl)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw, _) = self.backward(x, w, None, dy)?;
        Ok((dx, dw))
    }
}
