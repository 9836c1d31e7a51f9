use candle_core::{CudaStorage, DType, Result};

use super::{Arg, Grid, Module, View, launch, module, typed, unwritten};

static SUMS: Module = module!("sums");

/// Rows of `d` values in groups of `t`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) groups: usize,
    pub(super) t: usize,
    pub(super) d: usize,
}

/// Rows that a block adds up, and the most blocks per column that the second pass adds up.
const CHUNK: usize = 128;
const MOST_CHUNKS: usize = 256;

impl Rows {
    /// Rows of a block: from the sizes alone, so that the order of the additions is that of every GPU.
    fn chunk(self) -> usize {
        CHUNK.max(self.t.div_ceil(MOST_CHUNKS))
    }

    fn chunks(self) -> usize {
        self.t.div_ceil(self.chunk())
    }
}

/// Partial sums (groups, chunks, sums, d), of values of type `dtype`.
pub(super) struct Partial {
    values: CudaStorage,
    rows: Rows,
    sums: usize,
    dtype: DType,
}

/// Σ a over the rows of each group.
pub(super) fn rows(a: View<'_>, rows: Rows) -> Result<Partial> {
    partial("sum_rows", &[a], rows, 1)
}

/// Σ a·b.
pub(super) fn products(a: View<'_>, b: View<'_>, rows: Rows) -> Result<Partial> {
    partial("sum_products", &[a, b], rows, 1)
}

/// Σ dy·x̂ and Σ dy, from (mean, 1/σ) of every row of x.
pub(super) fn norm(dy: View<'_>, x: View<'_>, stats: View<'_>, rows: Rows) -> Result<Partial> {
    partial("sum_norm", &[dy, x, stats], rows, 2)
}

fn partial(name: &str, of: &[View<'_>], rows: Rows, sums: usize) -> Result<Partial> {
    let (device, dtype) = (of[0].device(), of[0].dtype());
    let n = rows.groups * rows.chunks() * sums * rows.d;
    let mut values = unwritten(device, n, DType::F32)?;
    let mut args: Vec<Arg<'_>> = of.iter().map(|view| Arg::In(*view)).collect();
    args.push(Arg::out(&mut values));
    for count in [rows.t, rows.d, rows.chunk()] {
        args.push(Arg::count(count)?);
    }
    let grid = Grid {
        blocks: [rows.d.div_ceil(32), rows.chunks(), rows.groups],
        threads: (32, 8),
        shared: 0,
    };
    launch(device, &SUMS, &typed(name, dtype)?, grid, args)?;
    Ok(Partial {
        values,
        rows,
        sums,
        dtype,
    })
}

impl Partial {
    /// The sums of group g to `out`, from g·stride + at[0] on, those of the second from g·stride + at[1] on.
    pub(super) fn write(&self, out: &mut CudaStorage, stride: usize, at: [usize; 2]) -> Result<()> {
        let args = vec![
            Arg::In(View::whole(&self.values)),
            Arg::out(out),
            Arg::count(self.rows.d)?,
            Arg::count(self.rows.chunks())?,
            Arg::Size(stride),
            Arg::count(at[0])?,
            Arg::count(at[1])?,
        ];
        let blocks = [self.rows.d.div_ceil(128), self.sums, self.rows.groups];
        let name = typed("finish_sums", self.dtype)?;
        launch(
            &self.values.device,
            &SUMS,
            &name,
            Grid::threads(blocks, 128),
            args,
        )
    }
}
