//! Products with their bias and activation in the epilogue, by cublasLt: y is written once, and no kernel passes over it
//! again.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as DeviceAttribute;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaSlice, DevicePtrMut};
use candle_core::{CudaDevice, CudaStorage, DType, Error, Result, bail};

use super::elementwise::act;
use super::{View, pointer, pointer_mut, unwritten};
use crate::kernels::elementwise::Act;

use sys::cublasLtEpilogue_t as Epilogue;
use sys::cublasLtMatmulDescAttributes_t as Of;
use sys::cublasLtMatmulPreferenceAttributes_t as Preferred;

type Called<T> = std::result::Result<T, CublasError>;

/// Of x (rows, I), W (O, I) and y (rows, O).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Sizes {
    pub(crate) rows: usize,
    pub(crate) o: usize,
    pub(crate) i: usize,
}

/// act(x·Wᵀ + b), and x·Wᵀ + b where it is kept and not the same; both (rows, O).
pub(crate) struct Written {
    pub(crate) y: CudaStorage,
    pub(crate) pre: Option<CudaStorage>,
}

/// act(x·Wᵀ + b) with sums in f32, `keeps` saying whether a backward will want x·Wᵀ + b. None where it is not for cublasLt.
///
/// Taken are operands of bf16 on GPUs of compute capability 8 and above, with I and O multiples of 8 and every operand
/// beginning at a multiple of 16 bytes: then all rows do, which the fast kernels want, and what GELU keeps for its backward
/// must have rows of a multiple of 8 values. Sizes for which the library knows no algorithm are not taken.
///
/// The bias is added in the epilogue. GELU-tanh is computed there on compute capability 9 to 11, of the sums before they
/// are rounded; elsewhere cublasLt's is slower than a kernel behind the product (github.com/karpathy/llm.c/pull/591,
/// github.com/sgl-project/sglang/pull/34350). Other activations are a kernel behind the product everywhere: the epilogue
/// has none of them.
pub(crate) fn linear(
    [x, w, b]: [View<'_>; 3],
    sizes: Sizes,
    kind: Option<Act>,
    keeps: bool,
) -> Result<Option<Written>> {
    // Allocations begin at multiples of 256 bytes.
    let fits = |view: View<'_>| view.dtype() == DType::BF16 && view.start.is_multiple_of(8);
    if !sizes.fit() || ![x, w, b].into_iter().all(fits) {
        return Ok(None);
    }
    let lt = Lt::of(x.device())?;
    if lt.capability < 8 {
        return Ok(None);
    }
    let gelu = matches!(kind, Some(Act::GeluTanh)) && (9..12).contains(&lt.capability);
    let epilogue = match (gelu, keeps) {
        (false, _) => Epilogue::CUBLASLT_EPILOGUE_BIAS,
        (true, false) => Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
        (true, true) => Epilogue::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
    };
    let n = sizes.rows * sizes.o;
    let mut y = unwritten(x.device(), n, DType::BF16)?;
    let mut pre = match gelu && keeps {
        true => Some(unwritten(x.device(), n, DType::BF16)?),
        false => None,
    };
    if !lt.product([x, w, b], &mut y, pre.as_mut(), sizes, epilogue)? {
        return Ok(None);
    }
    Ok(Some(match kind {
        Some(kind) if !gelu => Written {
            y: act(kind, View::whole(&y), n)?,
            pre: keeps.then_some(y),
        },
        _ => Written { y, pre },
    }))
}

impl Sizes {
    fn fit(self) -> bool {
        let counts = [self.rows, self.o, self.i];
        counts.iter().all(|&n| n > 0 && i32::try_from(n).is_ok())
            && self.o.is_multiple_of(8)
            && self.i.is_multiple_of(8)
    }
}

/// What an algorithm is chosen by.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    sizes: Sizes,
    epilogue: Epilogue,
    /// Bytes that the addresses of all operands are a multiple of.
    alignment: u32,
}

#[derive(Clone, Copy)]
struct Algorithm {
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// Bytes of workspace that it needs.
    workspace: usize,
}

/// cublasLt on one GPU, kept as long as the program runs.
struct Lt {
    handle: sys::cublasLtHandle_t,
    /// The handle's, which must outlive it.
    context: Arc<CudaContext>,
    /// The first digit of the GPU's compute capability.
    capability: i32,
    /// Choosing one takes the library tens of microseconds.
    algorithms: Mutex<HashMap<Key, Option<Algorithm>>>,
}

// SAFETY: the library allows calls from several threads with one handle, and the handle has no settings that they could
// change under each other.
#[allow(unsafe_code)]
unsafe impl Send for Lt {}
#[allow(unsafe_code)]
unsafe impl Sync for Lt {}

static KNOWN: Mutex<Vec<&'static Lt>> = Mutex::new(Vec::new());

impl Lt {
    fn of(device: &CudaDevice) -> Result<&'static Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let Ok(mut known) = KNOWN.lock() else {
            bail!("cublasLt: an earlier call panicked")
        };
        let same = |lt: &&&Self| lt.context.ordinal() == context.ordinal();
        if let Some(lt) = known.iter().find(same) {
            return Ok(*lt);
        }
        context.bind_to_thread().w()?;
        let major = DeviceAttribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        let lt: &'static Self = Box::leak(Box::new(Self {
            handle: result::create_handle()
                .map_err(|e| Error::msg(format!("cublasLtCreate: {:?}", e.0)))?,
            context: context.clone(),
            capability: context.attribute(major).w()?,
            algorithms: Mutex::default(),
        }));
        known.push(lt);
        Ok(lt)
    }

    /// Goes on the device's stream, and nothing waits for it. False, and nothing done, where there is no algorithm.
    fn product(
        &self,
        [x, w, b]: [View<'_>; 3],
        y: &mut CudaStorage,
        pre: Option<&mut CudaStorage>,
        sizes: Sizes,
        epilogue: Epilogue,
    ) -> Result<bool> {
        let (device, stream) = (x.device(), x.device().cuda_stream());
        let Sizes { rows, o, i } = sizes;
        let named = |call: &'static str| {
            move |error: CublasError| {
                let product = format!("({rows}, {i}) by the transpose of ({o}, {i}), {epilogue:?}");
                Error::msg(format!("{call} for {product}: {:?}", error.0))
            }
        };
        self.context.bind_to_thread().w()?;
        let mut workspace = None;
        // While a guard lives, other streams that want the same memory wait for this product.
        let mut guards = Vec::with_capacity(6);
        let mut operands = [0; 3];
        for (operand, view) in operands.iter_mut().zip([x, w, b]) {
            let (start, guard) = pointer(view.storage, &stream)?;
            guards.push(guard);
            *operand = start + (view.start * view.dtype().size_in_bytes()) as u64;
        }
        let [x, w, bias] = operands;
        let (y, guard) = pointer_mut(y, &stream)?;
        guards.push(guard);
        let pre = match pre {
            Some(pre) => {
                let (pre, guard) = pointer_mut(pre, &stream)?;
                guards.push(guard);
                pre
            }
            None => 0,
        };

        let problem = Problem::new(sizes, epilogue, bias, pre).map_err(named("a descriptor"))?;
        let addresses = 256 | x | w | bias | y | pre;
        let key = Key {
            sizes,
            epilogue,
            alignment: 1 << addresses.trailing_zeros(),
        };
        let Ok(mut algorithms) = self.algorithms.lock() else {
            bail!("cublasLt: an earlier call panicked")
        };
        let chosen = match algorithms.get(&key) {
            Some(&chosen) => chosen,
            None => {
                let chosen = self.choose(&problem, key.alignment);
                let chosen = chosen.map_err(named("cublasLtMatmulAlgoGetHeuristic"))?;
                algorithms.insert(key, chosen);
                chosen
            }
        };
        drop(algorithms);
        let Some(chosen) = chosen else {
            return Ok(false);
        };
        let workspace = match chosen.workspace {
            0 => 0,
            bytes => {
                let (start, guard) = workspace
                    .insert(scratch(device, bytes)?)
                    .device_ptr_mut(&stream);
                guards.push(guard);
                start
            }
        };
        let (one, zero) = (1.0f32, 0.0f32);
        // SAFETY: the operands have the sizes that the descriptors say, checked by the callers; the guards keep the
        // memory and its order on other streams. y is not read, as it is multiplied by zero.
        #[allow(unsafe_code)]
        let done = unsafe {
            result::matmul(
                self.handle,
                problem.operation.raw,
                ptr::from_ref(&one).cast(),
                ptr::from_ref(&zero).cast(),
                w as *const c_void,
                problem.w.raw,
                x as *const c_void,
                problem.x.raw,
                y as *const c_void,
                problem.y.raw,
                y as *mut c_void,
                problem.y.raw,
                &chosen.algorithm,
                workspace as *mut c_void,
                chosen.workspace,
                stream.cu_stream().cast(),
            )
        };
        done.map_err(named("cublasLtMatmul"))?;
        Ok(true)
    }

    /// The library's first choice among algorithms that keep all partial sums in f32, if it has any.
    fn choose(&self, problem: &Problem, alignment: u32) -> Called<Option<Algorithm>> {
        let preference = Owned {
            raw: result::create_matmul_pref()?,
            destroy: result::destroy_matmul_pref,
        };
        let set = result::set_matmul_pref_attribute;
        // What NVIDIA recommends (cublasSetWorkspace in cuBLAS's documentation).
        let workspace: u64 = if self.capability >= 9 {
            32 << 20
        } else {
            4 << 20
        };
        let most = Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        preference.set(set, most, &workspace)?;
        let sums = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        let mask = Preferred::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
        preference.set(set, mask, &sums)?;
        for matrix in [
            Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(set, matrix, &alignment)?;
        }
        // SAFETY: all descriptors live, and describe matrices that do not overlap.
        #[allow(unsafe_code)]
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle,
                problem.operation.raw,
                problem.w.raw,
                problem.x.raw,
                problem.y.raw,
                problem.y.raw,
                preference.raw,
            )
        };
        match found {
            Ok(found) => Ok(Some(Algorithm {
                algorithm: found.algo,
                workspace: found.workspaceSize,
            })),
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Workspace for one product alone: where threads have streams of their own, products of several run at the same time. It
/// comes from the device's pool, which hands the same memory to the stream's next product.
fn scratch(device: &CudaDevice, bytes: usize) -> Result<CudaSlice<u8>> {
    // SAFETY: u8 holds any bits, and nothing but the product reads them.
    #[allow(unsafe_code)]
    unsafe {
        device.alloc(bytes)
    }
}

/// yᵀ = W·xᵀ + b as cublasLt, which counts along columns, sees it: A is W, transposed; B is x; a column of D is a row of y.
struct Problem {
    operation: Owned<sys::cublasLtMatmulDesc_t>,
    w: Owned<sys::cublasLtMatrixLayout_t>,
    x: Owned<sys::cublasLtMatrixLayout_t>,
    y: Owned<sys::cublasLtMatrixLayout_t>,
}

impl Problem {
    /// With the addresses of the bias, and of what the epilogue keeps beside y or 0.
    fn new(Sizes { rows, o, i }: Sizes, epilogue: Epilogue, bias: u64, pre: u64) -> Called<Self> {
        let matrix = |rows: usize, columns: usize| {
            let bf16 = sys::cudaDataType_t::CUDA_R_16BF;
            Ok(Owned {
                raw: result::create_matrix_layout(bf16, rows as u64, columns as u64, rows as i64)?,
                destroy: result::destroy_matrix_layout,
            })
        };
        let operation = Owned {
            raw: result::create_matmul_desc(
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cudaDataType_t::CUDA_R_32F,
            )?,
            destroy: result::destroy_matmul_desc,
        };
        let set = result::set_matmul_desc_attribute;
        let transposed = 1i32; // CUBLAS_OP_T
        operation.set(set, Of::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
        operation.set(set, Of::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        operation.set(set, Of::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        if pre != 0 {
            let at = Of::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER;
            operation.set(set, at, &pre)?;
            let leading = Of::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD;
            operation.set(set, leading, &(o as i64))?;
        }
        Ok(Self {
            operation,
            w: matrix(i, o)?,
            x: matrix(i, rows)?,
            y: matrix(o, rows)?,
        })
    }
}

/// A descriptor of the library's, destroyed with its scope.
struct Owned<T: Copy> {
    raw: T,
    destroy: unsafe fn(T) -> Called<()>,
}

impl<T: Copy> Owned<T> {
    fn set<A, V>(
        &self,
        set: unsafe fn(T, A, *const c_void, usize) -> Called<()>,
        attribute: A,
        value: &V,
    ) -> Called<()> {
        // SAFETY: the descriptor lives; the library copies a value of the size that is given, or refuses it.
        #[allow(unsafe_code)]
        unsafe {
            set(
                self.raw,
                attribute,
                ptr::from_ref(value).cast(),
                size_of::<V>(),
            )
        }
    }
}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // The library refuses only what it has not made.
        // SAFETY: it made this one, and this is its only owner.
        #[allow(unsafe_code)]
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}
