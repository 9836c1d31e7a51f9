use std::cell::Cell;
use std::sync::Mutex;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Shape, Tensor, bail};

/// Values on their way out of a tensor and into the output of an operation, which returns them as its own without a copy.
pub(crate) struct Handed {
    values: Mutex<Option<Values>>,
    shape: Shape,
}

enum Values {
    Cpu(CpuStorage),
    #[cfg(feature = "cuda")]
    Cuda(CudaStorage),
}

impl Handed {
    /// Takes the values of an operation's output. Whoever still holds the tensor finds none in it.
    pub(crate) fn take(tensor: &Tensor) -> Result<Self> {
        let taken = Take(Cell::new(None));
        tensor.inplace_op1(&taken)?;
        Ok(Self {
            values: Mutex::new(taken.0.take()),
            shape: tensor.shape().clone(),
        })
    }

    fn values(&self) -> Option<Values> {
        self.values.lock().ok()?.take()
    }

    pub(crate) fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.values() {
            Some(Values::Cpu(storage)) => Ok((storage, self.shape.clone())),
            _ => bail!("values were asked for twice, or on another device"),
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.values() {
            Some(Values::Cuda(storage)) => Ok((storage, self.shape.clone())),
            _ => bail!("values were asked for twice, or on another device"),
        }
    }
}

struct Take(Cell<Option<Values>>);

impl InplaceOp1 for Take {
    fn name(&self) -> &'static str {
        "take"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(values) = &*storage else {
            bail!("only f32 is handed on by a CPU, found {:?}", layout.dims())
        };
        if layout.contiguous_offsets() != Some((0, values.len())) {
            bail!("only whole tensors are handed on");
        }
        let values = std::mem::replace(storage, CpuStorage::F32(Vec::new()));
        self.0.set(Some(Values::Cpu(values)));
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        if layout.start_offset() != 0 || !layout.is_contiguous() {
            bail!("only whole tensors are handed on");
        }
        // A GPU has no tensors of nothing.
        let nothing = storage
            .device()
            .zeros_impl(&Shape::from(1), storage.dtype())?;
        let values = std::mem::replace(storage, nothing);
        self.0.set(Some(Values::Cuda(values)));
        Ok(())
    }
}
