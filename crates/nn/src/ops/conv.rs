use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::{is_fused_on_cpu, values};
use crate::kernels::conv as kernel;

/// How a convolution moves over its input; kernels are square.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2d {
    /// Pixels from one output to the next.
    pub stride: usize,
    /// Zeros before the first row and column.
    pub before: usize,
    /// Zeros after the last row and column.
    pub after: usize,
    /// Every input pixel counts as a square of so many equal ones: nearest-neighbour upsampling, never written out.
    pub upsample: usize,
}

impl Conv2d {
    /// Stride 1 and as many zeros on every side.
    pub fn padded(padding: usize) -> Self {
        Self {
            stride: 1,
            before: padding,
            after: padding,
            upsample: 1,
        }
    }
}

/// Convolution (cross-correlation) of x (B, C, H, W) with weight (O, C, k, k) and bias (O,) → (B, O, H', W'), where
/// H' = (H·upsample + before + after − k)/stride + 1 and W' likewise.
///
/// For inference: fused it has **no backward**, and a backward that reaches it is an error (candle's
/// `BackwardNotSupported`), not a gradient that is cut. On a CPU candle's own convolution writes out the k²-fold of its input
/// at once (4.5 GiB at 512 channels of 512×512 pixels); this one a band at a time.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, conv: Conv2d) -> Result<Tensor> {
    let (batch, inputs, height, width) = x.dims4()?;
    let (outputs, weight_inputs, kernel, kernel_width) = weight.dims4()?;
    let shape = kernel::Shape {
        batch,
        inputs,
        outputs,
        size: [height, width],
        kernel,
        stride: conv.stride,
        padding: [conv.before, conv.after],
        upsample: conv.upsample,
    };
    let fits = weight_inputs == inputs
        && kernel_width == kernel
        && bias.dims() == [outputs]
        && conv.stride > 0
        && conv.upsample > 0
        && x.elem_count() > 0
        && weight.elem_count() > 0;
    let (true, Some(out)) = (fits, fits.then(|| shape.output_size()).flatten()) else {
        bail!(
            "convolution: x {:?}, weight {:?} and bias {:?} do not fit, moved by {conv:?}",
            x.dims(),
            weight.dims(),
            bias.dims()
        )
    };
    let (weight, bias) = (&weight.to_dtype(x.dtype())?, &bias.to_dtype(x.dtype())?);
    if !is_fused_on_cpu(&[x, weight, bias]) {
        return conv2d_composed(x, weight, bias, conv);
    }
    x.contiguous()?.apply_op3(
        &weight.contiguous()?,
        &bias.contiguous()?,
        Convolution { shape, out },
    )
}

/// The same from candle's operations.
fn conv2d_composed(x: &Tensor, weight: &Tensor, bias: &Tensor, conv: Conv2d) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let x = if conv.upsample > 1 {
        x.upsample_nearest2d(h * conv.upsample, w * conv.upsample)?
    } else {
        x.clone()
    };
    x.pad_with_zeros(2, conv.before, conv.after)?
        .pad_with_zeros(3, conv.before, conv.after)?
        .conv2d(weight, 0, conv.stride, 1, 1)? // (B, O, H', W')
        .broadcast_add(&bias.reshape((1, bias.elem_count(), 1, 1))?)
}

struct Convolution {
    shape: kernel::Shape,
    out: [usize; 2],
}

impl CustomOp3 for Convolution {
    fn name(&self) -> &'static str {
        "conv2d for inference"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w, b) = (values(x, xl)?, values(w, wl)?, values(b, bl)?);
        let y = kernel::conv2d(x, w, b, self.shape, self.out);
        let dims = (
            self.shape.batch,
            self.shape.outputs,
            self.out[0],
            self.out[1],
        );
        Ok((CpuStorage::F32(y), dims.into()))
    }
}
