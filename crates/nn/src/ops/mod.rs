//! The hot operations as functions over tensors, each with its own backward.
//!
//! On a CPU in f32 they run the fused kernels, on an NVIDIA GPU in f32 and bf16 (feature `cuda`) those of `cuda/`;
//! elsewhere each falls back to the plain composition of candle operations beside it, which is also the oracle of its
//! tests.

mod activation;
mod attention;
mod blend;
mod conv;
mod dropout;
mod gated;
mod group_norm;
mod linear;
mod lora;
mod modulate;
mod norm;
mod residual;

pub use activation::{gelu_erf, gelu_tanh, silu};
pub use attention::{attention, attention_dropped};
pub use blend::{join, pick};
pub use conv::{Conv2d, conv2d};
pub use dropout::{Dropout, dropout};
pub use gated::gated_residual;
pub use group_norm::{group_norm, group_norm_silu};
#[cfg(feature = "cuda")]
pub(crate) use linear::with_last;
pub use linear::{linear, linear_gelu, linear_gelu_erf};
pub use lora::{LowRank, linear_low_rank, linear_low_rank_gelu, linear_low_rank_gelu_erf};
pub use modulate::modulate;
pub use norm::{layer_norm, layer_norm_in, layer_norm_modulate};
pub use residual::residual;

use candle_core::{
    CpuStorage, DType, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, bail,
};

/// Whether kernels take these tensors: the CPU's f32, a GPU's f32 and bf16; all in one place and of one type.
fn is_fused(tensors: &[&Tensor]) -> bool {
    let Some(first) = tensors.first() else {
        return false;
    };
    let (device, dtype) = (first.device(), first.dtype());
    let known = match device {
        Device::Cpu => dtype == DType::F32,
        Device::Cuda(_) => cfg!(feature = "cuda") && matches!(dtype, DType::F32 | DType::BF16),
        Device::Metal(_) => false,
    };
    let alike = |t: &&Tensor| t.dtype() == dtype && t.device().same_device(device);
    // A launch of no blocks is an error; an empty sum is not.
    known && tensors.iter().all(alike) && (device.is_cpu() || first.elem_count() > 0)
}

/// The same of operations on a residual stream, which on a GPU may be f32 where all the others are bf16.
fn is_fused_with(stream: &Tensor, others: &[&Tensor]) -> bool {
    let mixed = stream.device().is_cuda()
        && stream.dtype() == DType::F32
        && others.iter().all(|t| t.dtype() == DType::BF16);
    let near = |t: &&Tensor| t.device().same_device(stream.device());
    is_fused(&[stream])
        && is_fused(others)
        && others.iter().all(near)
        && (mixed || others.iter().all(|t| t.dtype() == stream.dtype()))
}

/// The same for operations that have a kernel on the CPU only.
fn is_fused_on_cpu(tensors: &[&Tensor]) -> bool {
    is_fused(tensors) && tensors.iter().all(|t| t.device().is_cpu())
}

/// The same of x on a GPU with weights that are rounded to its type.
#[cfg(feature = "cuda")]
fn is_fused_on_gpu(x: &Tensor, weights: &[Option<&Tensor>]) -> bool {
    let mut weights = weights.iter().flatten();
    x.device().is_cuda()
        && is_fused(&[x])
        && weights.all(|w| is_fused(&[w]) && w.device().same_device(x.device()))
}

/// The f32 values of a contiguous operand.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("a fused operation needs contiguous operands"),
    }
}

/// A tensor's f32 values on the host, contiguous.
pub(crate) struct Host {
    tensor: Tensor,
}

impl Host {
    pub(crate) fn new(tensor: &Tensor) -> Result<Self> {
        Ok(Self {
            tensor: tensor.contiguous()?,
        })
    }

    /// Calls `f` with the values; the storage stays locked for reading meanwhile.
    pub(crate) fn read(&self) -> Result<HostValues<'_>> {
        let (guard, layout) = self.tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("a fused operation needs contiguous operands")
        };
        Ok(HostValues { guard, start, end })
    }
}

pub(crate) struct HostValues<'a> {
    guard: StorageRef<'a>,
    start: usize,
    end: usize,
}

impl HostValues<'_> {
    pub(crate) fn get(&self) -> Result<&[f32]> {
        match &*self.guard {
            Storage::Cpu(cpu) => Ok(&cpu.as_slice::<f32>()?[self.start..self.end]),
            _ => bail!("a fused operation needs its operands on the CPU"),
        }
    }
}

/// Reads several tensors' values at once: `host!(x, w => |x, w| …)`.
macro_rules! host {
    ($($t:expr => $name:ident),+ ; $body:expr) => {{
        $( let $name = $crate::ops::Host::new($t)?; )+
        $( let $name = $name.read()?; )+
        $( let $name = $name.get()?; )+
        $body
    }};
}
pub(crate) use host;

/// A kernel's output as an untracked CPU tensor.
fn tensor(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}
