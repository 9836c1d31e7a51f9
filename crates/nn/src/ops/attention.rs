#[cfg(feature = "cuda")]
use std::sync::Mutex;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};

use super::{Dropout, host, is_fused, tensor, values};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::kernels::attention as kernel;
use crate::tape::apply1;

/// softmax(q·kᵀ/√E)·v per head: packed qkv (B, T, 3·D), in timm's order (3, heads, E), → (B, T, D).
///
/// Vaswani et al. 2017, eq. 1.
pub fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    attention_with(qkv, heads, None)
}

/// As [`attention`] with dropout of the probabilities behind the softmax, each at index (head, query, key) of its sample.
pub fn attention_dropped(qkv: &Tensor, heads: usize, dropout: &Dropout) -> Result<Tensor> {
    dropout.check("attention", qkv)?;
    let dropout = Some(dropout).filter(|d| !d.is_off());
    attention_with(qkv, heads, dropout)
}

fn attention_with(qkv: &Tensor, heads: usize, dropout: Option<&Dropout>) -> Result<Tensor> {
    let (_, t, width) = qkv.dims3()?;
    if heads == 0 || width % (3 * heads) != 0 {
        bail!(
            "attention: {heads} heads do not divide a third of the last axis of {:?}",
            qkv.dims()
        );
    }
    if !has_kernel(qkv, width / 3 / heads)? {
        return attention_composed(qkv, heads, dropout);
    }
    let shape = kernel::Shape {
        t,
        heads,
        e: width / 3 / heads,
    };
    let op = Attention {
        shape,
        dropout: dropout.cloned(),
        #[cfg(feature = "cuda")]
        lse: Mutex::default(),
    };
    apply1(&qkv.contiguous()?, op)
}

/// Whether there is a kernel for heads of `e` values: on a GPU up to 128 of them.
fn has_kernel(qkv: &Tensor, e: usize) -> Result<bool> {
    #[cfg(feature = "cuda")]
    if let (true, candle_core::Device::Cuda(device)) = (is_fused(&[qkv]), qkv.device()) {
        return cuda::attention::fits(device, e, qkv.dtype());
    }
    let _ = e;
    Ok(is_fused(&[qkv]))
}

/// The same from candle's operations.
pub(crate) fn attention_composed(
    qkv: &Tensor,
    heads: usize,
    dropout: Option<&Dropout>,
) -> Result<Tensor> {
    let (b, t, width) = qkv.dims3()?;
    let e = width / 3 / heads;
    let packed = qkv.reshape((b, t, 3, heads, e))?.permute((2, 0, 3, 1, 4))?; // (3, B, H, T, E)
    let part = |i: usize| packed.get(i)?.contiguous(); // (B, H, T, E)
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / (e as f64).sqrt())?; // (B, H, T, T)
    let scores = scores
        .broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?
        .exp()?;
    let p = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
    let p = match dropout {
        None => p,
        Some(dropout) => (&p * dropout.factors(p.dims(), &p)?)?,
    };
    p.matmul(&v)?.transpose(1, 2)?.reshape((b, t, heads * e)) // (B, T, D)
}

struct Attention {
    shape: kernel::Shape,
    dropout: Option<Dropout>,
    /// On a GPU: the logarithm of every row's sum, left by the forward for its own backward.
    #[cfg(feature = "cuda")]
    lse: Mutex<Option<Tensor>>,
}

impl Attention {
    fn dropped(&self) -> kernel::Dropped<'_> {
        self.dropout.as_ref().map(|d| (d.drop, &*d.keys))
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, t, width) = l.shape().dims3()?;
        let out = kernel::attention(values(qkv, l)?, self.shape, self.dropped());
        Ok((CpuStorage::F32(out), Shape::from((b, t, width / 3))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, qkv: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        let (b, t, width) = l.shape().dims3()?;
        let qkv = cuda::View::new(qkv, l)?;
        let (out, lse) = cuda::attention::forward(qkv, b, self.shape, self.dropped())?;
        match self.lse.lock() {
            Ok(mut slot) => *slot = Some(lse),
            Err(_) => bail!("attention: an earlier forward panicked"),
        }
        Ok((out, Shape::from((b, t, width / 3))))
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if qkv.device().is_cuda() {
            let Some(lse) = self.lse.lock().ok().and_then(|lse| lse.clone()) else {
                bail!("attention: a backward without its forward")
            };
            let dropped = self.dropped();
            return cuda::attention::backward(qkv, out, &lse, dout, self.shape, dropped).map(Some);
        }
        let _ = out; // the CPU's backward computes the probabilities again
        let dqkv = host!(dout => dout, qkv => qkv; kernel::attention_backward(
            dout, qkv, self.shape, self.dropped(),
        ));
        Ok(Some(tensor(dqkv, qkv.shape())?))
    }
}
