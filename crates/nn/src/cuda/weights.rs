use std::cell::Cell;

use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp1, Layout, Result, Tensor, bail};

use super::{on_gpu, tensor, unwritten};
use crate::gradients::sum_of;
use crate::kernels::matmul::Into;

/// Gives `change` a contiguous f32 tensor on a GPU, as its storage and the place of its first value, to be changed in
/// place.
pub(crate) fn mutate(
    tensor: &Tensor,
    change: impl FnOnce(&mut CudaStorage, usize) -> Result<()>,
) -> Result<()> {
    tensor.inplace_op1(&Mutate(Cell::new(Some(change))))
}

struct Mutate<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut CudaStorage, usize) -> Result<()>> InplaceOp1 for Mutate<F> {
    fn name(&self) -> &'static str {
        "mutate on a GPU"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, layout: &Layout) -> Result<()> {
        bail!(
            "mutate on a GPU: found a tensor {:?} on the CPU",
            layout.dims()
        )
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        match (layout.contiguous_offsets(), self.0.take()) {
            (Some((start, _)), Some(change)) if storage.as_cuda_slice::<f32>().is_ok() => {
                change(storage, start)
            }
            _ => bail!("values are changed in place only in a contiguous f32 tensor"),
        }
    }
}

/// The gradient of `weight`, formed by `write` from a value of a storage on: into its running sum where there is one (then there
/// is nothing to hand on), otherwise as a tensor of its type; none for a frozen weight.
pub(super) fn gradient(
    weight: &Tensor,
    write: impl FnOnce(&mut CudaStorage, usize, Into) -> Result<()>,
) -> Result<Option<Tensor>> {
    if !weight.track_op() {
        return Ok(None);
    }
    if weight.dtype() == DType::F32
        && let Some((sum, into)) = sum_of(weight)
    {
        mutate(&sum, |values, from| write(values, from, into))?;
        return Ok(None);
    }
    let n = weight.elem_count();
    let mut own = on_gpu!(weight => weight; unwritten(weight.device(), n, weight.dtype())?);
    write(&mut own, 0, Into::Overwrite)?;
    Ok(Some(tensor(own, weight.shape())))
}

/// A weight as a kernel takes it: contiguous, in `dtype`, without its gradient.
pub(super) fn rounded(weight: &Tensor, dtype: DType) -> Result<Tensor> {
    weight.detach().to_dtype(dtype)?.contiguous()
}
