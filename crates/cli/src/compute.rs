//! Where networks run, and in what numbers.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use anyhow::Result;
#[cfg(feature = "cuda")]
use candle_core::cuda_backend::{
    WrapErr,
    cudarc::driver::{result, sys},
};
use candle_core::{DType, Device};
use serde::Serialize;
use tinyfusion::core::Error;

use crate::output::note;

/// Where a network runs that computes in f32 alone.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct DeviceOption {
    /// Where the network runs: auto (a GPU if this build and this machine have one, else the CPU), cpu, cuda, cuda:1, metal
    /// [default: auto]
    #[arg(long, value_name = "DEVICE")]
    device: Option<Place>,
}

/// The flags of every command that runs a network.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct ComputeOptions {
    #[command(flatten)]
    place: DeviceOption,
    /// Numbers that it computes in: f32; tf32 (a GPU's products of f32 are rounded to TF32); bf16 (a GPU's blocks are, while
    /// trained weights, norms, softmax, losses and averages stay f32) [default: f32]
    #[arg(long, value_name = "TYPE")]
    dtype: Option<Precision>,
}

/// What `--device` says.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Place {
    #[default]
    Auto,
    Cpu,
    Cuda(usize),
    Metal,
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let expected = || "expected auto, cpu, cuda, cuda:N or metal".to_string();
        match text.split_once(':') {
            None => match text {
                "auto" => Ok(Self::Auto),
                "cpu" => Ok(Self::Cpu),
                "cuda" => Ok(Self::Cuda(0)),
                "metal" => Ok(Self::Metal),
                _ => Err(expected()),
            },
            Some(("cuda", number)) => number.parse().map(Self::Cuda).map_err(|_| expected()),
            Some(_) => Err(expected()),
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, clap::ValueEnum)]
enum Precision {
    #[default]
    F32,
    Tf32,
    Bf16,
}

impl Precision {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
        }
    }
}

/// A device that is there, and the type of a network's blocks on it.
#[derive(Debug, Clone)]
pub(crate) struct Compute {
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    precision: Precision,
}

/// What a run's config.toml says of where and in what it computes.
#[derive(Debug, Serialize)]
pub(crate) struct Computed {
    device: &'static str,
    dtype: &'static str,
}

impl Compute {
    /// For what is only read, cut and written.
    pub(crate) fn on_cpu() -> Self {
        Self::on(Device::Cpu, DType::F32)
    }

    /// A device that is open, with products in f32 or bf16.
    pub(crate) fn on(device: Device, dtype: DType) -> Self {
        let precision = match dtype {
            DType::BF16 => Precision::Bf16,
            _ => Precision::F32,
        };
        Self {
            device,
            dtype,
            precision,
        }
    }

    /// The numbers that it computes in, as `--dtype` calls them: beside every result that depends on them.
    pub(crate) fn numbers(&self) -> &'static str {
        self.precision.name()
    }

    /// For a run's settings.
    pub(crate) fn computed(&self) -> Computed {
        Computed {
            device: match &self.device {
                Device::Cpu => "cpu",
                Device::Cuda(_) => "cuda",
                Device::Metal(_) => "metal",
            },
            dtype: self.numbers(),
        }
    }

    /// How many pieces of work are worth doing side by side, of so many for the CPU's cores: a GPU is full with one.
    pub(crate) fn lanes(&self, on_cpu: usize) -> usize {
        if self.device.is_cpu() { on_cpu } else { 1 }
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Computed { device, dtype } = self.computed();
        write!(f, "{device}, {dtype}")
    }
}

impl DeviceOption {
    /// Opens the device that is asked for.
    pub(crate) fn open(&self) -> Result<Device> {
        let device = match self.device.unwrap_or_default() {
            Place::Cpu => Device::Cpu,
            Place::Cuda(number) => cuda(number)?,
            Place::Metal => Device::new_metal(0).map_err(|e| no_device("metal", &e))?,
            Place::Auto => auto(),
        };
        // A process uses one device.
        let _ = OPENED.set(device.clone());
        Ok(device)
    }
}

impl ComputeOptions {
    /// An error where a GPU is asked for by `whom`, which runs on the CPU alone.
    pub(crate) fn refuse_gpu(&self, whom: &str) -> Result<()> {
        match self.place.device.unwrap_or_default() {
            Place::Auto | Place::Cpu => Ok(()),
            Place::Cuda(_) | Place::Metal => Err(Error::usage(format!(
                "{whom} runs on the CPU alone: leave --device out"
            ))
            .into()),
        }
    }

    /// Opens the device that is asked for.
    pub(crate) fn open(&self) -> Result<Compute> {
        let device = self.place.open()?;
        let precision = self.dtype.unwrap_or_default();
        let dtype = match precision {
            Precision::F32 => DType::F32,
            other if device.is_cpu() => {
                return Err(Error::usage(format!(
                    "--dtype {} needs a GPU: a CPU computes in f32",
                    other.name()
                ))
                .into());
            }
            Precision::Tf32 => {
                round_products_to_tf32();
                DType::F32
            }
            Precision::Bf16 => DType::BF16,
        };
        let found = Compute {
            device,
            dtype,
            precision,
        };
        tracing::info!("running on {found}");
        Ok(found)
    }
}

fn no_device(name: &str, cause: &candle_core::Error) -> Error {
    // The first line: behind it candle prints a backtrace.
    let cause = cause.to_string();
    let cause = match cause.lines().next().unwrap_or_default() {
        none if none.contains("CUDA_ERROR_NO_DEVICE") => "no NVIDIA driver or no GPU was found",
        none if none.contains("CUBLAS_STATUS_NOT_INITIALIZED") => {
            "cuBLAS does not open; libcublas.so.13 and libcublasLt.so.13 are needed on LD_LIBRARY_PATH, as CUDA 13 or \
             PyTorch for it brings them"
        }
        other => other,
    };
    Error::usage(format!(
        "--device {name}: {cause}; --device auto falls back to the CPU"
    ))
}

#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
fn cuda(number: usize) -> Result<Device> {
    // One stream for all threads: by default each has its own, and nothing would order them.
    let device = Device::new_cuda_with_stream(number)
        .map_err(|e| no_device(&format!("cuda:{number}"), &e))?;
    if let Device::Cuda(cuda) = &device {
        // Otherwise every tensor has events recorded and waited for at every launch, a dozen calls each.
        // SAFETY: they order several streams, and all tensors of this program are of this one.
        unsafe { cuda.disable_event_tracking() };
        keep_freed_memory(cuda).map_err(|e| no_device(&format!("cuda:{number}"), &e))?;
    }
    Ok(device)
}

/// A device's pool gives what is freed back to the driver whenever it is waited for, tens of gigabytes between two steps;
/// this one keeps it, as PyTorch's does.
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
fn keep_freed_memory(cuda: &candle_core::CudaDevice) -> candle_core::Result<()> {
    let mut all = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a u64, and the pool lives as long as the device.
    unsafe { result::mem_pool::set_attribute(pool(cuda)?, attribute, (&raw mut all).cast()) }.w()
}

#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
fn pool(cuda: &candle_core::CudaDevice) -> candle_core::Result<sys::CUmemoryPool> {
    let number = cuda.cuda_stream().context().cu_device();
    // SAFETY: the context holds the device.
    unsafe { result::device::get_default_mem_pool(number) }.w()
}

/// The device of this process, kept so that it can be asked after what ran on it has failed.
static OPENED: OnceLock<Device> = OnceLock::new();

/// Of the GPU that is open: the most memory that tensors had at once, and all that it has, in bytes.
pub(crate) fn memory() -> Option<(u64, u64)> {
    let device = OPENED.get()?;
    Some((peak_of(device)?, total_of(device)?))
}

#[cfg(feature = "cuda")]
fn total_of(device: &Device) -> Option<u64> {
    match device {
        Device::Cuda(cuda) => Some(cuda.cuda_stream().context().total_mem().ok()? as u64),
        _ => None,
    }
}

#[cfg(not(feature = "cuda"))]
fn total_of(_: &Device) -> Option<u64> {
    None
}

/// The most memory of a GPU that tensors had at once, in bytes; nothing on other devices.
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub(crate) fn peak_of(device: &Device) -> Option<u64> {
    let Device::Cuda(cuda) = device else {
        return None;
    };
    let mut bytes = 0u64;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: as in `keep_freed_memory`.
    unsafe {
        result::mem_pool::get_attribute(pool(cuda).ok()?, attribute, (&raw mut bytes).cast())
    }
    .ok()?;
    Some(bytes)
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn peak_of(_: &Device) -> Option<u64> {
    None
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Device> {
    Err(Error::usage(
        "--device cuda: this program was built without the feature `cuda`; `cargo xtask gpu` builds one with it",
    )
    .into())
}

/// The first GPU, or the CPU and a line that says so where this build could have used one.
fn auto() -> Device {
    if cfg!(feature = "cuda") {
        match cuda(0) {
            Ok(device) => return device,
            Err(why) => note(format_args!("no GPU, running on the CPU ({why:#})")),
        }
    } else {
        match Device::new_metal(0) {
            Ok(device) => return device,
            Err(_) => tracing::info!("built without a GPU's features: running on the CPU"),
        }
    }
    Device::Cpu
}

#[cfg(feature = "cuda")]
fn round_products_to_tf32() {
    candle_core::cuda::set_gemm_reduced_precision_f32(true);
}

#[cfg(not(feature = "cuda"))]
fn round_products_to_tf32() {}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read() {
        for (text, place) in [
            ("auto", Place::Auto),
            ("cpu", Place::Cpu),
            ("cuda", Place::Cuda(0)),
            ("cuda:3", Place::Cuda(3)),
            ("metal", Place::Metal),
        ] {
            assert_eq!(text.parse::<Place>().unwrap(), place);
        }
        for wrong in ["gpu", "cuda:", "cuda:-1", "metal:1", ""] {
            assert!(
                wrong.parse::<Place>().unwrap_err().contains("cuda:N"),
                "{wrong}"
            );
        }
    }

    #[test]
    fn the_cpu_computes_in_f32() {
        let options = |dtype| ComputeOptions {
            place: DeviceOption {
                device: Some(Place::Cpu),
            },
            dtype,
        };
        assert_eq!(options(None).open().unwrap().dtype, DType::F32);
        for dtype in [Precision::Bf16, Precision::Tf32] {
            let error = options(Some(dtype)).open().unwrap_err().to_string();
            assert!(error.contains("needs a GPU"), "{error}");
        }
    }
}
