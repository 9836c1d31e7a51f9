#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{is_fused_with, values};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::kernels::elementwise::add;
use crate::tape::apply2;

/// x + y for x and y of one shape, in the type of x: a residual stream, which may be f32 where what is added to it is bf16.
pub fn residual(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.dims() != y.dims() {
        bail!("residual: {:?} and {:?} do not fit", x.dims(), y.dims());
    }
    if !is_fused_with(x, &[y]) {
        return x + y.to_dtype(x.dtype())?;
    }
    apply2(&x.contiguous()?, &y.contiguous()?, Residual)
}

struct Residual;

impl CustomOp2 for Residual {
    fn name(&self) -> &'static str {
        "residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        y: &CpuStorage,
        yl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = add(values(x, xl)?, values(y, yl)?);
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        y: &CudaStorage,
        yl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (x, y) = (cuda::View::new(x, xl)?, cuda::View::new(y, yl)?);
        let out = cuda::elementwise::residual(x, y, xl.shape().elem_count())?;
        Ok((out, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = x.track_op().then(|| dout.clone());
        let dy = match y.track_op() {
            true => Some(dout.to_dtype(y.dtype())?),
            false => None,
        };
        Ok((dx, dy))
    }
}
