#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::Tensor;
use tinyfusion_core::{Parts, Result, Rows};

#[cfg(feature = "cuda")]
use super::is_fused;
#[cfg(feature = "cuda")]
use crate::cuda;

/// The samples `index` (R,) u32 of h (B, …), none of them twice → (R, …).
///
/// On a GPU the gradient's rows are written; candle's are added to zeros.
pub fn pick(h: &Tensor, index: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if h.device().is_cuda() && is_fused(&[h]) && is_index(index, h) {
        return Ok(cuda::blend::pick(h, index)?);
    }
    h.select(index)
}

/// [`Parts::joined`]; on a GPU in one pass, and with a backward in two.
pub fn join(parts: &Parts<'_>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    {
        let Parts {
            h,
            kept,
            dropped,
            place,
            ..
        } = parts;
        let tensors = [h, kept.after, dropped.after];
        if h.device().is_cuda() && is_fused(&tensors) && is_index(place, h) {
            return Ok(cuda::blend::join(parts)?);
        }
    }
    parts.joined()
}

#[cfg(feature = "cuda")]
fn is_index(index: &Tensor, of: &Tensor) -> bool {
    index.dtype() == DType::U32 && index.device().same_device(of.device())
}
