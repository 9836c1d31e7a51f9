use candle_core::{CudaDevice, CudaStorage, DType, Result, Tensor};

use super::{
    Arg, Grid, Module, View, keys, launch, module, most_shared, on_gpu, tensor, typed, unwritten,
};
use crate::kernels::attention::{Dropped, Shape};

/// A module for each type, and for each head size of bf16: the driver compiles all of one when the first of its kernels is
/// used.
static F32: Module = module!("attention_f32");
static BF16: [(usize, Module); 5] = [
    (32, module!("attention_bf16_32")),
    (64, module!("attention_bf16_64")),
    (72, module!("attention_bf16_72")),
    (80, module!("attention_bf16_80")),
    (128, module!("attention_bf16_128")),
];
static DELTA: Module = module!("attention_delta");

/// Threads of a block: `BLOCK` in `cuda/attention.cuh`.
const BLOCK: u32 = 128;

/// What a block of a kernel has in shared memory: `Chosen` in `cuda/attention_f32.cu` and `cuda/attention_mma.cuh`.
#[derive(Debug, Clone, Copy)]
struct Tiles {
    /// Its own rows.
    own: usize,
    /// Rows of the other side at once.
    columns: usize,
    /// Matrices of its own rows; of the other side there are two, in bf16 twice.
    matrices: usize,
    /// Numbers for each row of the other side.
    numbers: usize,
}

impl Tiles {
    const fn new(own: usize, columns: usize, matrices: usize, numbers: usize) -> Self {
        Self {
            own,
            columns,
            matrices,
            numbers,
        }
    }
}

/// The kernels for a head size and a type.
#[derive(Clone, Copy)]
struct Kernels {
    module: &'static Module,
    widest: usize,
    dtype: DType,
    forward: Tiles,
    dq: Tiles,
    dkv: Tiles,
}

impl Kernels {
    fn of(e: usize, dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => {
                let all = Tiles::new(64, 32, 2, 0);
                Some(Self {
                    module: &F32,
                    widest: [32, 64, 80, 128].into_iter().find(|&widest| e <= widest)?,
                    dtype,
                    forward: all,
                    dq: all,
                    dkv: all,
                })
            }
            DType::BF16 => {
                let (widest, module) = BF16.iter().find(|(widest, _)| e <= *widest)?;
                let (columns, own) = if *widest <= 80 { (64, 128) } else { (32, 64) };
                Some(Self {
                    module,
                    widest: *widest,
                    dtype,
                    forward: Tiles::new(128, columns, 1, 0),
                    dq: Tiles::new(own, 32, 2, 0),
                    dkv: Tiles::new(own, 32, 2, 2),
                })
            }
            _ => None,
        }
    }

    /// Bytes of shared memory: `Shared` in `cuda/attention_fma.cuh` and `cuda/attention_tiles.cuh`.
    fn shared(self, tiles: Tiles) -> usize {
        let Tiles { own, columns, .. } = tiles;
        if self.dtype == DType::BF16 {
            let row = (self.widest.next_multiple_of(16) + 8) * 2;
            let numbers = 2 * tiles.numbers * columns * size_of::<f32>();
            return (tiles.matrices * own + 4 * columns) * row + numbers;
        }
        let matrices = 2 * (own + columns) * (self.widest + 4);
        let weights_and_scores = 2 * own * (columns + 4);
        (matrices + weights_and_scores) * size_of::<f32>()
    }

    /// The most that any of the kernels takes.
    fn most_shared(self) -> usize {
        let all = [self.forward, self.dq, self.dkv];
        all.map(|tiles| self.shared(tiles))
            .into_iter()
            .max()
            .unwrap_or(0)
    }

    fn name(self, what: &str) -> Result<String> {
        typed(&format!("{what}_{}", self.widest), &[self.dtype])
    }
}

/// Whether there is a kernel for heads of `e` values, and this device has the shared memory for it.
pub(crate) fn fits(device: &CudaDevice, e: usize, dtype: DType) -> Result<bool> {
    match Kernels::of(e, dtype) {
        None => Ok(false),
        Some(kernels) => Ok(kernels.most_shared() <= most_shared(device)?),
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
        tiles: Tiles,
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
            blocks: [t.div_ceil(tiles.own), heads, self.batch],
            threads: (BLOCK, 1),
            shared: self.kernels.shared(tiles),
        };
        launch(
            like.device(),
            self.kernels.module,
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
        problem.launch("attention", problem.kernels.forward, args, qkv)?;
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
            let grid = Grid::threads([problem.rows().div_ceil(32), 1, 1], 256);
            launch(x.device(), &DELTA, &name, grid, args)?;
            let mut dqkv = unwritten(x.device(), 3 * problem.rows() * shape.e, x.dtype())?;
            for (what, tiles) in [
                ("attention_dq", problem.kernels.dq),
                ("attention_dkv", problem.kernels.dkv),
            ] {
                let args = vec![
                    Arg::In(x),
                    Arg::In(dout),
                    Arg::In(lse),
                    Arg::In(View::whole(&delta)),
                    Arg::out(&mut dqkv),
                ];
                problem.launch(what, tiles, args, x)?;
            }
            Ok(dqkv)
        })?
    });
    Ok(tensor(dqkv, qkv.shape()))
}
