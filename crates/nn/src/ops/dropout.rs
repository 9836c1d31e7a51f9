use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::{host, is_fused, tensor, values};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::kernels::dropout::{Drop, dropout as forward, mix};
use crate::tape::apply1;

/// Dropout at one place of a network (Srivastava et al. 2014): every value is 0 with probability `rate`, the others
/// are multiplied by 1/(1 − rate).
///
/// Which values is a function of the sample's seed, the place and the index within the sample, so that a sample
/// loses the same values alone, in any batch and in any subset of its batch's rows, on every device and thread
/// count; and nothing is stored between forward and backward.
#[derive(Debug, Clone)]
pub struct Dropout {
    pub(super) drop: Drop,
    rate: f64,
    /// One per sample.
    pub(super) keys: Arc<[u64]>,
}

impl Dropout {
    /// Dropout of `rate` in [0, 1) for samples with these `seeds`, at the place of the network called `place`.
    pub fn new(rate: f64, seeds: &[u64], place: u64) -> Result<Self> {
        if !(0.0..1.0).contains(&rate) {
            bail!("dropout: the rate must be in [0, 1), found {rate}");
        }
        let keys = seeds.iter().map(|&seed| mix(seed ^ mix(place)));
        Ok(Self {
            drop: Drop {
                threshold: (rate * 2f64.powi(32)) as u32,
                scale: (1.0 / (1.0 - rate)) as f32,
            },
            rate,
            keys: keys.collect(),
        })
    }

    /// Whether nothing is ever dropped.
    pub fn is_off(&self) -> bool {
        self.rate == 0.0
    }

    pub(super) fn check(&self, what: &str, x: &Tensor) -> Result<()> {
        if x.dim(0)? != self.keys.len() {
            bail!(
                "{what}: {} seeds were given for a batch of shape {:?}",
                self.keys.len(),
                x.dims()
            );
        }
        Ok(())
    }

    /// The factors of a tensor of `shape` (B, …), as a tensor like `like`.
    pub(super) fn factors(&self, shape: &[usize], like: &Tensor) -> Result<Tensor> {
        let ones = vec![1f32; shape.iter().product()];
        let factors = forward(&ones, &self.keys, self.drop);
        tensor(factors, shape)?
            .to_device(like.device())?
            .to_dtype(like.dtype())
    }
}

/// x (B, …) with values dropped as `dropout` says.
pub fn dropout(x: &Tensor, dropout: &Dropout) -> Result<Tensor> {
    dropout.check("dropout", x)?;
    if dropout.is_off() {
        return Ok(x.clone());
    }
    if !is_fused(&[x]) {
        return x * dropout.factors(x.dims(), x)?;
    }
    apply1(&x.contiguous()?, Op(dropout.clone()))
}

struct Op(Dropout);

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = forward(values(x, xl)?, &self.0.keys, self.0.drop);
        Ok((CpuStorage::F32(y), xl.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let (x, n) = (cuda::View::new(x, xl)?, xl.shape().elem_count());
        let y = cuda::elementwise::dropout(x, n, &self.0.keys, self.0.drop)?;
        Ok((y, xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            // Linear, and its own transpose.
            let dy = dy.contiguous()?;
            return dy.apply_op1_no_bwd(&Op(self.0.clone())).map(Some);
        }
        let dx = host!(dy => dy; forward(dy, &self.0.keys, self.0.drop));
        Ok(Some(tensor(dx, x.shape())?))
    }
}
