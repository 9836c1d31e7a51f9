//! The kernels of `cuda/*.cu`, launched on candle's CUDA storage: the third way of an operation beside the fused CPU
//! kernel and the composition.

pub(crate) mod attention;
pub(crate) mod blend;
pub(crate) mod elementwise;
pub(crate) mod linear;
pub(crate) mod lora;
mod lt;
pub(crate) mod norm;
mod product;
mod sums;
pub(crate) mod update;
mod weights;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, LaunchConfig, PushKernelArg, SyncOnDrop, sys,
};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Layout, Result, Shape, Storage, StorageRef, Tensor,
    bail,
};

/// A file of kernels.
pub(crate) struct Module {
    name: &'static str,
    ptx: &'static str,
}

macro_rules! module {
    ($name:literal) => {
        $crate::cuda::Module {
            name: concat!("tinyfusion-nn/", $name),
            ptx: include_str!(concat!(env!("OUT_DIR"), "/", $name, ".ptx")),
        }
    };
}
use module;

/// The values of a contiguous operand.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    storage: &'a CudaStorage,
    start: usize,
}

impl<'a> View<'a> {
    pub(crate) fn new(storage: &'a CudaStorage, layout: &Layout) -> Result<Self> {
        match layout.contiguous_offsets() {
            Some((start, _)) => Ok(Self { storage, start }),
            None => bail!(
                "a kernel needs contiguous operands, found {:?} with strides {:?}",
                layout.dims(),
                layout.stride()
            ),
        }
    }

    /// All of a storage.
    fn whole(storage: &'a CudaStorage) -> Self {
        Self { storage, start: 0 }
    }

    /// The values from `offset` on.
    pub(crate) fn at(self, offset: usize) -> Self {
        Self {
            start: self.start + offset,
            ..self
        }
    }

    fn device(self) -> &'a CudaDevice {
        &self.storage.device
    }

    fn dtype(self) -> DType {
        self.storage.dtype()
    }
}

/// A tensor on a GPU, contiguous.
pub(crate) struct Operand(Tensor);

impl Operand {
    pub(crate) fn new(tensor: &Tensor) -> Result<Self> {
        Ok(Self(tensor.contiguous()?))
    }

    /// The storage stays locked for reading meanwhile.
    pub(crate) fn read(&self) -> Reading<'_> {
        let (guard, layout) = self.0.storage_and_layout();
        Reading { guard, layout }
    }
}

pub(crate) struct Reading<'a> {
    guard: StorageRef<'a>,
    layout: &'a Layout,
}

impl Reading<'_> {
    pub(crate) fn view(&self) -> Result<View<'_>> {
        match &*self.guard {
            Storage::Cuda(storage) => View::new(storage, self.layout),
            other => bail!(
                "a kernel needs its operands on a GPU, found one on {:?}",
                other.device().location()
            ),
        }
    }
}

/// Reads several tensors at once: `on_gpu!(x => x, w => w; …)`.
macro_rules! on_gpu {
    ($($t:expr => $name:ident),+ ; $body:expr) => {{
        $( let $name = $crate::cuda::Operand::new($t)?; )+
        $( let $name = $name.read(); )+
        $( let $name = $name.view()?; )+
        $body
    }};
}
pub(crate) use on_gpu;

/// What a kernel is given; its parameters have these types in this order.
pub(crate) enum Arg<'a> {
    In(View<'a>),
    /// Written from this offset on.
    Out(&'a mut CudaStorage, usize),
    /// A null pointer: an operand that there is none of.
    Null,
    /// `uint32_t`, and `int` where that is what the kernel counts in.
    U32(u32),
    /// `size_t`
    Size(usize),
    F32(f32),
    /// A structure of so many `float`.
    Floats([f32; 10]),
}

impl<'a> Arg<'a> {
    /// All of a new output.
    fn out(storage: &'a mut CudaStorage) -> Self {
        Self::Out(storage, 0)
    }

    fn out_or_null(storage: Option<&'a mut CudaStorage>) -> Self {
        storage.map_or(Self::Null, Self::out)
    }

    /// A count; kernels count rows, columns and offsets in 32 bits.
    fn count(n: usize) -> Result<Self> {
        match u32::try_from(n) {
            Ok(n) if n <= i32::MAX as u32 => Ok(Self::U32(n)),
            _ => bail!(
                "a kernel counts up to {} in one direction, found {n}",
                i32::MAX
            ),
        }
    }
}

/// Blocks of a launch, threads of a block, and bytes of its dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    blocks: [usize; 3],
    threads: (u32, u32),
    shared: usize,
}

/// Blocks beyond which threads stride over the values instead: more than any GPU runs at once.
const MOST_BLOCKS: usize = 8192;

impl Grid {
    /// Threads that stride over `n` values, four or eight at a time where they can.
    fn flat(n: usize) -> Self {
        Self::threads([n.div_ceil(4 * 256).min(MOST_BLOCKS), 1, 1], 256)
    }

    /// The same over `rows` rows of `d`: 32 threads beside each other in each of 8 rows.
    fn matrix(rows: usize, d: usize) -> Self {
        Self {
            blocks: [d.div_ceil(4 * 32), rows.div_ceil(8).min(MOST_BLOCKS), 1],
            threads: (32, 8),
            shared: 0,
        }
    }

    /// One warp per row.
    fn warps(rows: usize) -> Self {
        Self::threads([rows.div_ceil(8), 1, 1], 256)
    }

    fn threads(blocks: [usize; 3], threads: u32) -> Self {
        Self {
            blocks,
            threads: (threads, 1),
            shared: 0,
        }
    }
}

/// A kernel's argument as the driver takes it.
enum Slot {
    Pointer(u64),
    U32(u32),
    F32(f32),
    Floats([f32; 10]),
}

/// Runs kernel `name` of `module`; it goes on the device's stream, and nothing waits for it.
pub(crate) fn launch(
    device: &CudaDevice,
    module: &Module,
    name: &str,
    grid: Grid,
    args: Vec<Arg<'_>>,
) -> Result<()> {
    let blocks = grid.blocks;
    if blocks[0] > i32::MAX as usize || blocks[1].max(blocks[2]) > 65_535 {
        bail!("{name}: a launch of {blocks:?} blocks; a GPU takes 2³¹ − 1 by 65535 by 65535");
    }
    let stream = device.cuda_stream();
    // While a guard lives, other streams that want the same memory wait for what is launched here.
    let mut guards = Vec::new();
    let mut slots = Vec::with_capacity(args.len());
    for arg in args {
        slots.push(match arg {
            Arg::In(view) => {
                let (pointer, guard) = pointer(view.storage, &stream)?;
                guards.push(guard);
                Slot::Pointer(pointer + (view.start * view.dtype().size_in_bytes()) as u64)
            }
            Arg::Out(storage, start) => {
                let size = storage.dtype().size_in_bytes();
                let (pointer, guard) = pointer_mut(storage, &stream)?;
                guards.push(guard);
                Slot::Pointer(pointer + (start * size) as u64)
            }
            Arg::Null => Slot::Pointer(0),
            Arg::U32(value) => Slot::U32(value),
            Arg::Size(value) => Slot::Pointer(value as u64),
            Arg::F32(value) => Slot::F32(value),
            Arg::Floats(values) => Slot::Floats(values),
        });
    }
    let function = device.get_or_load_custom_func(name, module.name, module.ptx)?;
    if grid.shared > DEFAULT_SHARED {
        let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(most, grid.shared as i32).w()?;
    }
    let mut builder = function.builder();
    for slot in &slots {
        match slot {
            Slot::Pointer(value) => builder.arg(value),
            Slot::U32(value) => builder.arg(value),
            Slot::F32(value) => builder.arg(value),
            Slot::Floats(values) => builder.arg(values),
        };
    }
    let config = LaunchConfig {
        grid_dim: (blocks[0] as u32, blocks[1] as u32, blocks[2] as u32),
        block_dim: (grid.threads.0, grid.threads.1, 1),
        shared_mem_bytes: grid.shared as u32,
    };
    // SAFETY: the callers (all in this module) give each kernel the parameters that its source declares, and outputs of
    // the sizes that it writes; the guards keep the memory and its order on other streams.
    #[allow(unsafe_code)]
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// Bytes of dynamic shared memory that a kernel may have without asking.
const DEFAULT_SHARED: usize = 48 * 1024;

/// Bytes of shared memory that a block may have on this device where its kernel asks.
pub(crate) fn most_shared(device: &CudaDevice) -> Result<usize> {
    let most = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    Ok(device.cuda_stream().context().attribute(most).w()? as usize)
}

fn pointer<'a>(storage: &'a CudaStorage, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
    use CudaStorageSlice as S;
    Ok(match &storage.slice {
        S::F32(slice) => slice.device_ptr(stream),
        S::BF16(slice) => slice.device_ptr(stream),
        S::F64(slice) => slice.device_ptr(stream),
        S::I64(slice) => slice.device_ptr(stream),
        S::U32(slice) => slice.device_ptr(stream),
        _ => bail!("no kernel reads {:?}", storage.dtype()),
    })
}

fn pointer_mut<'a>(
    storage: &'a mut CudaStorage,
    stream: &'a CudaStream,
) -> Result<(u64, SyncOnDrop<'a>)> {
    fn of<'a, T>(slice: &'a mut CudaSlice<T>, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        slice.device_ptr_mut(stream)
    }
    use CudaStorageSlice as S;
    let dtype = storage.dtype();
    Ok(match &mut storage.slice {
        S::F32(slice) => of(slice, stream),
        S::BF16(slice) => of(slice, stream),
        S::F64(slice) => of(slice, stream),
        _ => bail!("no kernel writes {dtype:?}"),
    })
}

/// `name` for values of these types, as the sources export it.
fn typed(name: &str, dtypes: &[DType]) -> Result<String> {
    let mut full = name.to_string();
    for dtype in dtypes {
        full += match dtype {
            DType::F32 => "_f32",
            DType::BF16 => "_bf16",
            other => bail!("{name}: there are kernels for f32 and bf16, found {other:?}"),
        };
    }
    Ok(full)
}

/// Memory for `n` values, every one of which a kernel writes before any is read.
///
/// As with the CPU's `unwritten`, debug builds fill it with NaN.
fn unwritten(device: &CudaDevice, n: usize, dtype: DType) -> Result<CudaStorage> {
    let shape = Shape::from(n);
    // SAFETY: f32, bf16 and f64 hold any bits, and the callers (all in this module) launch a kernel that writes all n
    // values before they read one or hand the storage out.
    #[allow(unsafe_code)]
    let mut storage = unsafe { device.alloc_uninit(&shape, dtype)? };
    if cfg!(debug_assertions) && dtype == DType::F32 {
        storage.const_set(f32::NAN.into(), &Layout::contiguous(n))?;
    }
    Ok(storage)
}

fn zeros(device: &CudaDevice, n: usize, dtype: DType) -> Result<CudaStorage> {
    device.zeros_impl(&Shape::from(n), dtype)
}

/// A kernel's output as an untracked tensor.
fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// A sample's keys as a tensor (n,) of 64 bits, which kernels read unsigned.
fn keys(keys: &[u64], device: &CudaDevice) -> Result<Tensor> {
    let bits: Vec<i64> = keys.iter().map(|key| key.cast_signed()).collect();
    Tensor::from_vec(bits, keys.len(), &Device::Cuda(device.clone()))
}
