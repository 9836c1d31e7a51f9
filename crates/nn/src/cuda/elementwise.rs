use candle_core::{CudaStorage, DType, Result, Tensor};

use super::{
    Arg, Grid, Module, View, keys, launch, module, on_gpu, sums, tensor, typed, unwritten, zeros,
};
use crate::kernels::dropout::Drop;
use crate::kernels::elementwise::{Act, Chunks};
use crate::kernels::matmul::Into;

static ELEMENTWISE: Module = module!("elementwise");

/// As `Act` in `cuda/elementwise.cu`.
fn number(act: Option<Act>) -> Arg<'static> {
    Arg::U32(match act {
        None => 0,
        Some(Act::GeluTanh) => 1,
        Some(Act::GeluErf) => 2,
        Some(Act::Silu) => 3,
    })
}

fn run(like: View<'_>, name: &str, grid: Grid, args: Vec<Arg<'_>>) -> Result<()> {
    let name = typed(name, &[like.dtype()])?;
    launch(like.device(), &ELEMENTWISE, &name, grid, args)
}

/// y = act(x), n values.
pub(crate) fn act(kind: Act, x: View<'_>, n: usize) -> Result<CudaStorage> {
    let mut y = unwritten(x.device(), n, x.dtype())?;
    let args = vec![
        Arg::In(x),
        Arg::out(&mut y),
        number(Some(kind)),
        Arg::Size(n),
    ];
    run(x, "activate", Grid::flat(n), args)?;
    Ok(y)
}

/// dx = dy·act′(x).
pub(crate) fn act_backward(kind: Act, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let n = x.elem_count();
    let dx = on_gpu!(x => x, dy => dy; {
        let mut dx = unwritten(x.device(), n, x.dtype())?;
        let args = vec![Arg::In(x), Arg::In(dy), Arg::out(&mut dx), number(Some(kind)), Arg::Size(n)];
        run(x, "activate_backward", Grid::flat(n), args)?;
        dx
    });
    Ok(tensor(dx, x.shape()))
}

/// y (rows, d) += bias, in place; and act(y) where there is an activation.
pub(crate) fn bias_act(
    y: &mut CudaStorage,
    bias: View<'_>,
    act: Option<Act>,
    (rows, d): (usize, usize),
) -> Result<Option<CudaStorage>> {
    let mut out = match act {
        Some(_) => Some(unwritten(bias.device(), rows * d, bias.dtype())?),
        None => None,
    };
    let args = vec![
        Arg::out(y),
        Arg::In(bias),
        Arg::out_or_null(out.as_mut()),
        number(act),
        Arg::count(rows)?,
        Arg::count(d)?,
    ];
    run(bias, "bias_act", Grid::matrix(rows, d), args)?;
    Ok(out)
}

/// y = x·(1 + scale) + shift for `rows` rows of x and of the packed projection m.
pub(crate) fn modulate(x: View<'_>, m: View<'_>, rows: usize, c: Chunks) -> Result<CudaStorage> {
    let mut y = unwritten(x.device(), rows * c.d, x.dtype())?;
    let mut args = vec![Arg::In(x), Arg::In(m), Arg::out(&mut y)];
    for count in [rows, c.d, c.width, c.shift, c.scale] {
        args.push(Arg::count(count)?);
    }
    run(x, "modulate", Grid::matrix(rows, c.d), args)?;
    Ok(y)
}

/// Gradients of [`modulate`] for what is tracked of x and m.
pub(crate) fn modulate_backward(
    dy: &Tensor,
    x: &Tensor,
    m: &Tensor,
    c: Chunks,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let rows = x.elem_count() / c.d;
    let (want_dx, want_dm) = (x.track_op(), m.track_op());
    let (dx, dm) = on_gpu!(dy => dy, x => xs, m => ms; {
        let wanted = |yes: bool, n: usize, zero: bool| match (yes, zero) {
            (false, _) => Ok(None),
            (true, true) => zeros(xs.device(), n, xs.dtype()).map(Some),
            (true, false) => unwritten(xs.device(), n, xs.dtype()).map(Some),
        };
        let mut dx = wanted(want_dx, rows * c.d, false)?;
        let mut dm = wanted(want_dm, rows * c.width, true)?;
        let mut args = vec![
            Arg::In(dy),
            Arg::In(xs),
            Arg::In(ms),
            Arg::out_or_null(dx.as_mut()),
            Arg::out_or_null(dm.as_mut()),
        ];
        for count in [rows, c.d, c.width, c.shift, c.scale] {
            args.push(Arg::count(count)?);
        }
        run(xs, "modulate_backward", Grid::matrix(rows, c.d), args)?;
        (dx, dm)
    });
    Ok((
        dx.map(|dx| tensor(dx, x.shape())),
        dm.map(|dm| tensor(dm, m.shape())),
    ))
}

/// Where the gate of a sample stands: `at` in rows of `width` of the packed projection; for `t` rows of `d` values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gate {
    pub(crate) at: usize,
    pub(crate) width: usize,
    pub(crate) t: usize,
    pub(crate) d: usize,
}

/// x + gate·y, or gate·y, for `rows` rows, in `dtype`, which x has too.
pub(crate) fn gated(
    x: Option<View<'_>>,
    y: View<'_>,
    m: View<'_>,
    rows: usize,
    gate: Gate,
    dtype: DType,
) -> Result<CudaStorage> {
    let mut out = unwritten(y.device(), rows * gate.d, dtype)?;
    let mut args = vec![
        x.map_or(Arg::Null, Arg::In),
        Arg::In(y),
        Arg::In(m),
        Arg::out(&mut out),
    ];
    for count in [rows, gate.t, gate.d, gate.width, gate.at] {
        args.push(Arg::count(count)?);
    }
    let name = typed("gated", &[dtype, y.dtype(), m.dtype()])?;
    launch(
        y.device(),
        &ELEMENTWISE,
        &name,
        Grid::matrix(rows, gate.d),
        args,
    )?;
    Ok(out)
}

/// Gradients of x + gate·y for what is tracked of y (B, T, D) and m.
pub(crate) fn gated_backward(
    dout: &Tensor,
    y: &Tensor,
    m: &Tensor,
    gate: Gate,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let rows = y.elem_count() / gate.d;
    let groups = rows / gate.t;
    let dy = match y.track_op() {
        true => {
            let dy = on_gpu!(dout => dout, m => ms; gated(None, dout, ms, rows, gate, y.dtype())?);
            Some(tensor(dy, y.shape()))
        }
        false => None,
    };
    let dm = match m.track_op() {
        true => {
            let over = sums::Rows {
                groups,
                t: gate.t,
                d: gate.d,
            };
            let place = sums::Place {
                stride: gate.width,
                at: [gate.at; 2],
                into: Into::Overwrite,
            };
            let dm = on_gpu!(dout => dout, y => ys; {
                let mut dm = zeros(ys.device(), groups * gate.width, m.dtype())?;
                sums::products(dout, ys, over)?.write(&mut dm, 0, place)?;
                dm
            });
            Some(tensor(dm, m.shape()))
        }
        false => None,
    };
    Ok((dy, dm))
}

/// x + y in the type of x; n values.
pub(crate) fn residual(x: View<'_>, y: View<'_>, n: usize) -> Result<CudaStorage> {
    let mut out = unwritten(x.device(), n, x.dtype())?;
    let args = vec![Arg::In(x), Arg::In(y), Arg::out(&mut out), Arg::Size(n)];
    let name = typed("residual", &[x.dtype(), y.dtype()])?;
    launch(x.device(), &ELEMENTWISE, &name, Grid::flat(n), args)?;
    Ok(out)
}

/// x with its values dropped by their samples' keys; n values.
pub(crate) fn dropout(x: View<'_>, n: usize, of: &[u64], drop: Drop) -> Result<CudaStorage> {
    let mut y = unwritten(x.device(), n, x.dtype())?;
    let keys = keys(of, x.device())?;
    on_gpu!(&keys => keys; {
        let args = vec![
            Arg::In(x),
            Arg::out(&mut y),
            Arg::Size(n),
            Arg::Size(n / of.len()),
            Arg::In(keys),
            Arg::U32(drop.threshold),
            Arg::F32(drop.scale),
        ];
        run(x, "dropout", Grid::flat(n), args)?;
    });
    Ok(y)
}
