use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Result};

use super::{Arg, Grid, Module, View, launch, module, typed, unwritten};
use crate::kernels::matmul::Into;

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

/// Partial sums (groups, chunks, sums, d).
pub(super) struct Partial {
    values: CudaStorage,
    rows: Rows,
    sums: usize,
}

/// Where sums go: that of group g from g·stride + at[0] on, and where there are two the second from g·stride + at[1] on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) stride: usize,
    pub(super) at: [usize; 2],
    pub(super) into: Into,
}

/// Σ a over the rows of each group.
pub(super) fn rows(a: View<'_>, rows: Rows) -> Result<Partial> {
    partial(&typed("sum_rows", &[a.dtype()])?, &[a], rows, 1)
}

/// Σ a·b.
pub(super) fn products(a: View<'_>, b: View<'_>, rows: Rows) -> Result<Partial> {
    let name = typed("sum_products", &[a.dtype(), b.dtype()])?;
    partial(&name, &[a, b], rows, 1)
}

/// Σ dy·x̂ and Σ dy, from (mean, 1/σ) of every row of x.
pub(super) fn norm(dy: View<'_>, x: View<'_>, stats: View<'_>, rows: Rows) -> Result<Partial> {
    let name = typed("sum_norm", &[x.dtype(), dy.dtype()])?;
    partial(&name, &[x, dy, stats], rows, 2)
}

fn partial(name: &str, of: &[View<'_>], rows: Rows, sums: usize) -> Result<Partial> {
    let device = of[0].device();
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
    launch(device, &SUMS, name, grid, args)?;
    Ok(Partial { values, rows, sums })
}

impl Partial {
    /// Writes the sums to `out`, from its value `from` on.
    pub(super) fn write(&self, out: &mut CudaStorage, from: usize, place: Place) -> Result<()> {
        let name = typed("finish_sums", &[out.dtype()])?;
        let args = vec![
            Arg::In(View::whole(&self.values)),
            Arg::Out(out, from),
            Arg::count(self.rows.d)?,
            Arg::count(self.rows.chunks())?,
            Arg::Size(place.stride),
            Arg::count(place.at[0])?,
            Arg::count(place.at[1])?,
            Arg::U32(u32::from(place.into == Into::Accumulate)),
        ];
        let blocks = [self.rows.d.div_ceil(128), self.sums, self.rows.groups];
        let grid = Grid::threads(blocks, 128);
        launch(&self.values.device, &SUMS, &name, grid, args)
    }
}
