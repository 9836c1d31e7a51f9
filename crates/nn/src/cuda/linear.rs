use std::sync::Mutex;

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};

use super::elementwise::{act_backward, bias_act};
use super::lt::{self, Sizes, Written};
use super::sums::{self, Rows};
use super::{View, on_gpu, tensor, unwritten};
use crate::kernels::elementwise::Act;

/// act(x·Wᵀ + b) for x (…, I), W (O, I), b (O,) on a GPU: one product by cublasLt where [`lt::linear`] takes the operands,
/// otherwise candle's cuBLAS product, then one kernel over it.
///
/// The pre-activation is kept for backward, which forms only what is tracked.
pub(crate) fn linear(
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    act: Option<Act>,
) -> Result<Tensor> {
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    let keeps = x.track_op() || w.track_op() || b.is_some_and(Tensor::track_op);
    let op = Linear {
        act,
        keeps,
        pre: Mutex::default(),
    };
    match b {
        Some(b) => x.apply_op3(&w, &b.contiguous()?, op),
        None => x.apply_op2(&w, op),
    }
}

struct Linear {
    /// Behind a bias only.
    act: Option<Act>,
    /// Whether there will be a backward.
    keeps: bool,
    /// x·Wᵀ + b (rows, O), left by the forward for its own backward where there is an activation.
    pre: Mutex<Option<Tensor>>,
}

impl Linear {
    fn forward(
        &self,
        (x, xl): (&CudaStorage, &Layout),
        (w, wl): (&CudaStorage, &Layout),
        bias: Option<View<'_>>,
    ) -> Result<(CudaStorage, Shape)> {
        let (o, i) = wl.shape().dims2()?;
        let rows = xl.shape().elem_count() / i;
        let fused = match bias {
            Some(bias) => {
                let operands = [View::new(x, xl)?, View::new(w, wl)?, bias];
                lt::linear(operands, Sizes { rows, o, i }, self.act, self.keeps)?
            }
            None => None,
        };
        let Written { y: out, pre } = match fused {
            Some(written) => written,
            None => {
                let flat = Layout::contiguous_with_offset((rows, i), xl.start_offset());
                let mut y = x.matmul(w, (1, rows, o, i), &flat, &wl.transpose(0, 1)?)?;
                let act = match bias {
                    Some(bias) => bias_act(&mut y, bias, self.act, (rows, o))?,
                    None => None,
                };
                match act {
                    None => Written { y, pre: None },
                    Some(out) => Written {
                        y: out,
                        pre: self.keeps.then_some(y),
                    },
                }
            }
        };
        if let Some(kept) = pre {
            let Ok(mut pre) = self.pre.lock() else {
                bail!("linear: an earlier forward panicked")
            };
            *pre = Some(tensor(kept, (rows, o)));
        }
        let mut dims = xl.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = o;
        }
        Ok((out, Shape::from(dims)))
    }

    /// With g the gradient of what enters the activation: dX = g·W, dW = gᵀ·X, db = column sums of g.
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
            None => dy.contiguous()?,
            Some(act) => {
                let Some(pre) = self.pre.lock().ok().and_then(|pre| pre.clone()) else {
                    bail!("linear: a backward without its forward")
                };
                act_backward(act, &pre, &dy.contiguous()?.reshape((rows, o))?)?
            }
        };
        let g = g.reshape((rows, o))?;
        let dx = match x.track_op() {
            true => Some(g.matmul(&w.detach())?.reshape(x.shape())?),
            false => None,
        };
        let dw = match w.track_op() {
            true => Some(g.t()?.matmul(&x.detach().reshape((rows, i))?)?),
            false => None,
        };
        let db = match b.filter(|b| b.track_op()) {
            Some(_) => Some(on_gpu!(&g => g; {
                let mut db = unwritten(g.device(), o, g.dtype())?;
                sums::rows(g, Rows { groups: 1, t: rows, d: o })?.write(&mut db, o, [0; 2])?;
                tensor(db, o)
            })),
            None => None,
        };
        Ok((dx, dw, db))
    }
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
        w: &CudaStorage,
        wl: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward((x, xl), (w, wl), Some(View::new(b, bl)?))
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
        w: &CudaStorage,
        wl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward((x, xl), (w, wl), None)
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
