use candle_core::{CudaDevice, CudaStorage, DType, Result, Tensor};

use super::{
    Arg, Grid, Module, View, keys, launch, module, most_shared, on_gpu, tensor, typed, unwritten,
};
use crate::kernels::attention::{Dropped, Shape};

/// A module for each type: the driver compiles all of one when the first of its kernels is used.
static F32: Module = module!("attention_f32");
static BF16: Module = module!("attention_bf16");

/// Rows of its own that a block has, and its threads: `OWN` and `BLOCK` in `cuda/attention.cuh`.
const OWN: usize = 64;
const BLOCK: u32 = 128;

/// Sizes for which there are kernels: the widest head, and rows of the other side in a tile of f32 and of bf16, for dK and
/// dV of bf16 at last.
const SIZES: [(usize, usize, usize, usize); 4] = [
    (32, 32, 64, 64),
    (64, 32, 64, 64),
    (80, 32, 64, 32),
    (128, 32, 64, 32),
];

/// The kernels for a head size and a type.
#[derive(Debug, Clone, Copy)]
struct Kernels {
    widest: usize,
    columns: usize,
    columns_dkv: usize,
    dtype: DType,
}

impl Kernels {
    fn of(e: usize, dtype: DType) -> Option<Self> {
        let &(widest, f32, bf16, bf16_dkv) = SIZES.iter().find(|size| e <= size.0)?;
        let (columns, columns_dkv) = match dtype {
            DType::F32 => (f32, f32),
            DType::BF16 => (bf16, bf16_dkv),
            _ => return None,
        };
        Some(Self {
            widest,
            columns,
            columns_dkv,
            dtype,
        })
    }

    /// Bytes of shared memory with tiles of `columns` rows: `Shared` in `cuda/attention.cuh`.
    fn shared(self, columns: usize) -> usize {
        let size = self.dtype.size_in_bytes();
        let pad = 16 / size;
        let tiles = 2 * (OWN + columns) * (self.widest + pad) * size;
        let weights = OWN * (columns + pad) * size;
        let scores = OWN * (columns + 4) * size_of::<f32>();
        tiles + weights + scores
    }

    fn module(self) -> &'static Module {
        match self.dtype {
            DType::BF16 => &BF16,
            _ => &F32,
        }
    }

    fn name(self, what: &str) -> Result<String> {
        typed(&format!("{what}_{}", self.widest), &[self.dtype])
    }
}

/// Whether there is a kernel for heads of `e` values, and this device has the shared memory for it.
pub(crate) fn fits(device: &CudaDevice, e: usize, dtype: DType) -> Result<bool> {
    match Kernels::of(e, dtype) {
        None => Ok(false),
        Some(kernels) => Ok(kernels.shared(kernels.columns) <= most_shared(device)?),
    }
}

/// A packed qkv (B, T, 3, H, E) with what is dropped of its probabilities.
struct Problem<'a> {
    batch: usize,
    shape: Shape,
    kernels: Kernels,
    /// (B,), and which values they drop.
    keys: Option<View<'a>>,
    threshold: u32,
    kept: f32,
}

impl<'a> Problem<'a> {
    fn rows(&self) -> usize {
        self.batch * self.shape.heads * self.shape.t
    }

    fn launch<'b>(
        &self,
        what: &str,
        columns: usize,
        mut args: Vec<Arg<'b>>,
        like: View<'_>,
    ) -> Result<()>
    where
        'a: 'b,
    {
        let Shape { t, heads, e } = self.shape;
        args.extend([
            Arg::count(t)?,
            Arg::count(heads)?,
            Arg::count(e)?,
            Arg::F32(1.0 / (e as f32).sqrt()),
            self.keys.map_or(Arg::Null, Arg::In),
            Arg::U32(self.threshold),
            Arg::F32(self.kept),
        ]);
        let grid = Grid {
            blocks: [t.div_ceil(OWN), heads, self.batch],
            threads: (BLOCK, 1),
            shared: self.kernels.shared(columns),
        };
        launch(
            like.device(),
            self.kernels.module(),
            &self.kernels.name(what)?,
            grid,
            args,
        )
    }
}

/// Calls `with` the problem that this qkv, of so many samples, is.
fn with_problem<R>(
    qkv: View<'_>,
    batch: usize,
    shape: Shape,
    dropped: Dropped<'_>,
    with: impl FnOnce(&Problem<'_>) -> Result<R>,
) -> Result<R> {
    let Some(kernels) = Kernels::of(shape.e, qkv.dtype()) else {
        candle_core::bail!(
            "attention: no kernel for heads of {} values in {:?}; there are for up to 128 in f32 and bf16",
            shape.e,
            qkv.dtype()
        )
    };
    let problem = Problem {
        batch,
        shape,
        kernels,
        keys: None,
        threshold: 0,
        kept: 1.0,
    };
    match dropped {
        None => with(&problem),
        Some((drop, of)) => {
            let keys = keys(of, qkv.device())?;
            on_gpu!(&keys => keys; with(&Problem {
                keys: Some(keys),
                threshold: drop.threshold,
                kept: drop.scale,
                ..problem
            }))
        }
    }
}

/// softmax(q·kᵀ/√E)·v (B, T, H·E), and log₂ of every row's sum of exponentials (B, H, T) for [`backward`].
pub(crate) fn forward(
    qkv: View<'_>,
    batch: usize,
    shape: Shape,
    dropped: Dropped<'_>,
) -> Result<(CudaStorage, Tensor)> {
    with_problem(qkv, batch, shape, dropped, |problem| {
        let n = problem.rows() * shape.e;
        let mut out = unwritten(qkv.device(), n, qkv.dtype())?;
        let mut lse = unwritten(qkv.device(), problem.rows(), DType::F32)?;
        let args = vec![Arg::In(qkv), Arg::out(&mut out), Arg::out(&mut lse)];
        problem.launch("attention", problem.kernels.columns, args, qkv)?;
        Ok((out, tensor(lse, problem.rows())))
    })
}

/// Gradient for the packed qkv, from the output and what [`forward`] kept.
pub(crate) fn backward(
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    dout: &Tensor,
    shape: Shape,
    dropped: Dropped<'_>,
) -> Result<Tensor> {
    let batch = qkv.dim(0)?;
    let dqkv = on_gpu!(qkv => x, out => out, lse => lse, dout => dout; {
        with_problem(x, batch, shape, dropped, |problem| {
            let mut delta = unwritten(x.device(), problem.rows(), DType::F32)?;
            let args = vec![
                Arg::In(dout),
                Arg::In(out),
                Arg::out(&mut delta),
                Arg::count(shape.t)?,
                Arg::count(shape.heads)?,
                Arg::count(shape.e)?,
                Arg::count(problem.rows())?,
            ];
            let name = typed("attention_delta", &[x.dtype()])?;
            launch(x.device(), problem.kernels.module(), &name, Grid::warps(problem.rows()), args)?;
            let mut dqkv = unwritten(x.device(), 3 * problem.rows() * shape.e, x.dtype())?;
            for (what, columns) in [
                ("attention_dq", problem.kernels.columns),
                ("attention_dkv", problem.kernels.columns_dkv),
            ] {
                let args = vec![
                    Arg::In(x),
                    Arg::In(dout),
                    Arg::In(lse),
                    Arg::In(View::whole(&delta)),
                    Arg::out(&mut dqkv),
                ];
                problem.launch(what, columns, args, x)?;
            }
            Ok(dqkv)
        })?
    });
    Ok(tensor(dqkv, qkv.shape()))
}
