use std::sync::Mutex;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Storage, Tensor, Var, bail};

use crate::gradients::add_to_sums;
use crate::tape::Tape;

/// f(x, c), keeping nothing of what f's backward needs but x and c: backward runs f once more (Chen et al. 2016,
/// arXiv 1604.06174). The gradients are the same, bit for bit.
///
/// Gradients of variables inside f reach the sums of the [`Gradients`](crate::Gradients) whose backward is under way;
/// candle's own `backward` has no place for them, and fails here. Where neither x nor c is tracked, and on devices without a
/// way to hand on what was computed (a GPU without the feature `cuda`), this is f itself.
pub fn recompute(
    x: &Tensor,
    c: &Tensor,
    f: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let known = x.device().is_cpu() || (cfg!(feature = "cuda") && x.device().is_cuda());
    if !known || !(x.track_op() || c.track_op()) {
        return f(x, c);
    }
    let out = f(&x.detach(), &c.detach())?.detach();
    x.apply_op2(
        c,
        Recompute {
            f,
            out: Mutex::new(Some(out)),
        },
    )
}

struct Recompute<F> {
    f: F,
    /// f(x, c), taken by the forward.
    out: Mutex<Option<Tensor>>,
}

impl<F> Recompute<F> {
    fn take(&self) -> Result<Tensor> {
        match self.out.lock().ok().and_then(|mut out| out.take()) {
            Some(out) => Ok(out),
            None => bail!("recompute: run twice"),
        }
    }
}

/// The values that `layout` names, as a storage of their own.
fn copy<S>(from: &S, layout: &Layout) -> Result<S>
where
    S: BackendStorage<Device: BackendDevice<Storage = S>>,
{
    let mut to = from.device().zeros_impl(layout.shape(), from.dtype())?;
    from.copy_strided_src(&mut to, 0, layout)?;
    Ok(to)
}

impl<F: Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync> CustomOp2 for Recompute<F> {
    fn name(&self) -> &'static str {
        "recompute"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = self.take()?;
        let (storage, layout) = out.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((copy(storage, layout)?, out.shape().clone())),
            other => bail!(
                "recompute: x is on the CPU, f(x, c) on {:?}",
                other.device()
            ),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let out = self.take()?;
        let (storage, layout) = out.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((copy(storage, layout)?, out.shape().clone())),
            other => bail!("recompute: x is on a GPU, f(x, c) on {:?}", other.device()),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        c: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, c) = (
            Var::from_tensor(&x.detach())?,
            Var::from_tensor(&c.detach())?,
        );
        let (out, tape) = Tape::of(&x, &c, &self.f)?;
        if let Some(tape) = tape {
            return tape.backward(&x, &c, &out, dout);
        }
        // d/dx ⟨f(x, c), dout⟩ is dout through f's own backward.
        let mut found = (out * dout)?.sum_all()?.backward()?;
        let own = (found.remove(x.as_tensor()), found.remove(c.as_tensor()));
        add_to_sums(&mut found)?;
        Ok(own)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::{Gradients, ops};

    fn random(shape: &[usize], seed: u32) -> Tensor {
        let n = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..n)
            .map(|i| ((i as f32 + 1.0) * (seed as f32 + 0.37)).sin())
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn bits(t: &Tensor) -> Vec<u32> {
        let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    }

    /// Two layers with a norm between them, whose weight is used by candle's own operations.
    #[test]
    fn gradients_are_the_same_bit_for_bit() {
        let var = |shape: &[usize], seed| Var::from_tensor(&random(shape, seed)).unwrap();
        let (x, c, w, bias, scale) = (
            var(&[2, 3, 8], 1),
            var(&[2, 48], 2),
            var(&[8, 8], 3),
            var(&[8], 4),
            var(&[8], 5),
        );
        let all = [&x, &c, &w, &bias, &scale];
        let block = {
            let (w, bias, scale) = (
                w.as_tensor().clone(),
                bias.as_tensor().clone(),
                scale.as_tensor().clone(),
            );
            move |x: &Tensor, c: &Tensor| {
                let h = ops::layer_norm_modulate(x, c, 0, 1, 1e-6)?;
                let h = ops::linear_gelu(&h, &w, &bias)?.broadcast_mul(&scale)?;
                ops::gated_residual(x, &h, c, 2)
            }
        };
        let gradients = |again: bool| {
            let mut h = x.as_tensor().clone();
            for _ in 0..3 {
                h = if again {
                    recompute(&h, &c, block.clone()).unwrap()
                } else {
                    block(&h, &c).unwrap()
                };
            }
            let loss = h.sqr().unwrap().sum_all().unwrap();
            let mut sums = Gradients::new(&all);
            sums.backward(&loss).unwrap();
            (
                loss.to_scalar::<f32>().unwrap().to_bits(),
                sums.sums().unwrap().iter().map(bits).collect::<Vec<_>>(),
            )
        };
        let (plain, again) = (gradients(false), gradients(true));
        assert_eq!(plain.0, again.0);
        for (i, (a, b)) in plain.1.iter().zip(&again.1).enumerate() {
            assert_eq!(a, b, "gradient {i}");
            assert!(a.iter().any(|v| *v != 0));
        }
    }

    #[test]
    fn without_sums_the_gradients_have_no_place() {
        let w = Var::ones((2, 2), DType::F32, &Device::Cpu).unwrap();
        let weight = w.as_tensor().clone();
        let x = Var::ones((1, 2), DType::F32, &Device::Cpu).unwrap();
        let y = recompute(&x, &x, move |x, _| ops::linear(x, &weight, None)).unwrap();
        let error = y.sum_all().unwrap().backward().unwrap_err();
        assert!(error.to_string().contains("Gradients"), "{error}");
    }
}
