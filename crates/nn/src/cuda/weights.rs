use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp1, Layout, Result, Tensor, bail};

use super::{on_gpu, tensor, unwritten};
use crate::gradients::{has_sums, sum_of};
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

/// Memory of a tensor's size and type, all of which is written before any is read.
pub(crate) fn buffer(like: &Tensor) -> Result<Tensor> {
    let n = like.elem_count();
    let own = on_gpu!(like => like; unwritten(like.device(), n, like.dtype())?);
    Ok(tensor(own, like.shape()))
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
        && let Some((sum, into)) = sum_of(weight)?
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
///
/// While blocks are recorded it is converted once, for a network and for its twin on the same weights without gradients.
pub(super) fn rounded(weight: &Tensor, dtype: DType) -> Result<Tensor> {
    let weight = weight.detach();
    let convert = || weight.to_dtype(dtype)?.contiguous();
    if weight.dtype() == dtype || !has_sums() || !weight.is_contiguous() {
        return convert();
    }
    let (address, start) = {
        let (storage, layout) = weight.storage_and_layout();
        (std::ptr::from_ref(&*storage).addr(), layout.start_offset())
    };
    let key = (address, start, weight.dims().to_vec(), dtype);
    if let Some((_, known)) = ROUNDED.with_borrow(|all| all.get(&key).cloned()) {
        return Ok(known);
    }
    let rounded = convert()?;
    // The weight, too, so that nothing else comes to its address.
    ROUNDED.with_borrow_mut(|all| all.insert(key, (weight, rounded.clone())));
    Ok(rounded)
}

/// A storage, the place in it, the sizes, and what they are rounded to.
type Key = (usize, usize, Vec<usize>, DType);

thread_local! {
    static ROUNDED: RefCell<HashMap<Key, (Tensor, Tensor)>> = RefCell::default();
}

/// Lets go of what was rounded for a recording: weights change behind it.
pub(crate) fn forget_rounded() {
    ROUNDED.take();
}
