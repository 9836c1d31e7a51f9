use candle_core::{CudaStorage, DType, Result, Tensor, bail};

use crate::kernels::matmul::Into;
use crate::tape::found_so_far;

use super::{
    Arg, Grid, Module, View, launch, module, on_gpu, sums, tensor, typed, unwritten, zeros,
};

static NORM: Module = module!("norm");

/// Rows of a LayerNorm, and how they are scaled and shifted: y = x̂·(base + scale) + shift.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) rows: usize,
    pub(crate) d: usize,
    /// Rows that share a scale and a shift.
    pub(crate) t: usize,
    /// Distance between those of neighbouring groups; 0 where there is one group.
    pub(crate) stride: usize,
    /// 1 for adaLN (1 + scale), 0 for a weight.
    pub(crate) base: f32,
    pub(crate) eps: f32,
}

impl Rows {
    fn push(self, args: &mut Vec<Arg<'_>>) -> Result<()> {
        args.extend([
            Arg::Size(self.rows),
            Arg::count(self.d)?,
            Arg::Size(self.t),
            Arg::Size(self.stride),
            Arg::F32(self.base),
            Arg::F32(self.eps),
        ]);
        Ok(())
    }

    fn launch(
        self,
        name: &str,
        (x, scale, y): (View<'_>, View<'_>, DType),
        mut args: Vec<Arg<'_>>,
    ) -> Result<()> {
        self.push(&mut args)?;
        let name = typed(name, &[x.dtype(), scale.dtype(), y])?;
        launch(x.device(), &NORM, &name, Grid::warps(self.rows), args)
    }
}

/// LayerNorm of every row of x, scaled and shifted, in `dtype`.
pub(crate) fn layer_norm(
    x: View<'_>,
    scale: View<'_>,
    shift: View<'_>,
    rows: Rows,
    dtype: DType,
) -> Result<CudaStorage> {
    let mut y = unwritten(x.device(), rows.rows * rows.d, dtype)?;
    let args = vec![Arg::In(x), Arg::In(scale), Arg::In(shift), Arg::out(&mut y)];
    rows.launch("layer_norm", (x, scale, dtype), args)?;
    Ok(y)
}

/// dx if it is wanted, with what was found of it so far, and (mean, 1/σ) of every row.
fn backward(
    dy: View<'_>,
    x: View<'_>,
    scale: View<'_>,
    rows: Rows,
    of: &Tensor,
) -> Result<(Option<CudaStorage>, CudaStorage)> {
    let mut dx = match of.track_op() {
        true => Some(unwritten(x.device(), rows.rows * rows.d, x.dtype())?),
        false => None,
    };
    let mut stats = unwritten(x.device(), 2 * rows.rows, DType::F32)?;
    let mut run = |onto: Arg<'_>| {
        let args = vec![
            Arg::In(dy),
            Arg::In(x),
            Arg::In(scale),
            onto,
            Arg::out_or_null(dx.as_mut()),
            Arg::out(&mut stats),
        ];
        rows.launch("layer_norm_backward", (x, scale, dy.dtype()), args)
    };
    match found_so_far(of) {
        Some(onto) if onto.dims() != of.dims() || onto.dtype() != of.dtype() => bail!(
            "a norm's input {:?} of {:?} has a gradient {:?} of {:?}",
            of.dims(),
            of.dtype(),
            onto.dims(),
            onto.dtype()
        ),
        Some(onto) => on_gpu!(&onto => onto; run(Arg::In(onto)))?,
        None => run(Arg::Null)?,
    }
    Ok((dx, stats))
}

/// Gradients for what is tracked of x and of the packed projection `m` (groups, width), whose chunks begin at `scale`
/// and `shift`.
pub(crate) fn modulated_backward(
    dy: &Tensor,
    x: &Tensor,
    m: &Tensor,
    (scale, shift): (usize, usize),
    rows: Rows,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let groups = rows.rows / rows.t;
    let (dx, dm) = on_gpu!(dy => dy, x => xs, m => ms; {
        let (dx, stats) = backward(dy, xs, ms.at(scale), rows, x)?;
        let dm = match m.track_op() {
            true => {
                let over = sums::Rows { groups, t: rows.t, d: rows.d };
                let place = sums::Place { stride: rows.stride, at: [scale, shift], into: Into::Overwrite };
                let mut dm = zeros(xs.device(), groups * rows.stride, m.dtype())?;
                sums::norm(dy, xs, View::whole(&stats), over)?.write(&mut dm, 0, place)?;
                Some(dm)
            }
            false => None,
        };
        (dx, dm)
    });
    Ok((
        dx.map(|dx| tensor(dx, x.shape())),
        dm.map(|dm| tensor(dm, m.shape())),
    ))
}

/// Gradients for what is tracked of x, weight and bias.
pub(crate) fn affine_backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    rows: Rows,
) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let d = rows.d;
    let (dx, sums) = on_gpu!(dy => dy, x => xs, weight => weights; {
        let (dx, stats) = backward(dy, xs, weights, rows, x)?;
        let sums = match weight.track_op() || bias.track_op() {
            true => {
                let over = sums::Rows { groups: 1, t: rows.rows, d };
                let place = sums::Place { stride: 2 * d, at: [0, d], into: Into::Overwrite };
                let mut sums = unwritten(xs.device(), 2 * d, weight.dtype())?;
                sums::norm(dy, xs, View::whole(&stats), over)?.write(&mut sums, 0, place)?;
                Some(tensor(sums, (2, d)))
            }
            false => None,
        };
        (dx, sums)
    });
    let part = |i: usize, wanted: bool| match &sums {
        Some(sums) if wanted => sums.get(i).map(Some),
        _ => Ok(None),
    };
    Ok((
        dx.map(|dx| tensor(dx, x.shape())),
        part(0, weight.track_op())?,
        part(1, bias.track_op())?,
    ))
}
