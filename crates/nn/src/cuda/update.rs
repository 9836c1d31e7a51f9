use candle_core::{DType, Result, Tensor, bail};

use super::weights::mutate;
use super::{Arg, Grid, Module, View, launch, module, on_gpu, tensor, unwritten};
use crate::kernels::matmul::Into;
use crate::update::{Parameter, Pass, Scale};

static UPDATE: Module = module!("update");

/// One AdamW step of a parameter, its moments and its average, in one pass.
pub(crate) fn adamw(at: &Parameter, grad: &Tensor, scale: &Scale, pass: &Pass) -> Result<()> {
    let Parameter { var, m, v, average } = at;
    if grad.dtype() != DType::F32 {
        bail!(
            "adamw: a gradient {:?} of type {:?}, expected F32",
            grad.dims(),
            grad.dtype()
        );
    }
    let run = |p: Arg<'_>, m: Arg<'_>, v: Arg<'_>, average: Arg<'_>| {
        on_gpu!(grad => grad; match scale {
            Scale::Host(_) => launch_adamw([p, m, v, average], grad, Arg::Null, pass, var.elem_count()),
            Scale::Device(by) => on_gpu!(by => by; {
                launch_adamw([p, m, v, average], grad, Arg::In(by), pass, var.elem_count())
            }),
        })
    };
    mutate(var, |p, p_at| {
        mutate(m, |m, m_at| {
            mutate(v, |v, v_at| {
                let (p, m, v) = (Arg::Out(p, p_at), Arg::Out(m, m_at), Arg::Out(v, v_at));
                match average {
                    None => run(p, m, v, Arg::Null),
                    Some(average) => mutate(average, |a, a_at| run(p, m, v, Arg::Out(a, a_at))),
                }
            })
        })
    })
}

fn launch_adamw(
    values: [Arg<'_>; 4],
    grad: View<'_>,
    scale: Arg<'_>,
    pass: &Pass,
    n: usize,
) -> Result<()> {
    let mut args = Vec::from(values);
    args.extend([
        Arg::In(grad),
        scale,
        // The order of `Pass` in `cuda/update.cu`.
        Arg::Floats([
            pass.m.0,
            pass.m.1,
            pass.v.0,
            pass.v.1,
            pass.scale,
            pass.keep,
            pass.step,
            pass.root_c2,
            pass.eps,
            pass.share,
        ]),
        Arg::Size(n),
    ]);
    launch(grad.device(), &UPDATE, "adamw_f32", Grid::flat(n), args)
}

/// Values that a block squares, at least, and the most blocks per tensor.
const SHARE: usize = 4096;
const MOST_BLOCKS: usize = 1024;

fn blocks(t: &Tensor) -> usize {
    t.elem_count().div_ceil(SHARE).clamp(1, MOST_BLOCKS)
}

/// Partial sums (n,) f64 of the squares of all of `tensors`, in an order that their sizes alone fix.
pub(crate) fn partial_squares(tensors: &[Tensor]) -> Result<Tensor> {
    let Some(first) = tensors.first() else {
        bail!("a sum of squares over no tensor")
    };
    let count = tensors.iter().map(blocks).sum();
    let mut partial = on_gpu!(first => first; unwritten(first.device(), count, DType::F64)?);
    let mut at = 0;
    for t in tensors {
        if t.dtype() != DType::F32 {
            bail!(
                "a sum of squares over {:?} of type {:?}, expected F32",
                t.dims(),
                t.dtype()
            );
        }
        on_gpu!(t => values; {
            let args = vec![
                Arg::In(values),
                Arg::out(&mut partial),
                Arg::count(at)?,
                Arg::Size(t.elem_count()),
            ];
            let grid = Grid::threads([blocks(t), 1, 1], 256);
            launch(values.device(), &UPDATE, "squares_f32", grid, args)?;
        });
        at += blocks(t);
    }
    Ok(tensor(partial, count))
}

/// The norm that partial sums of squares make, and the factor min(1, clip/(norm + 1e-6)): NaN where the norm or the loss is
/// not finite. Both are f32 scalars.
pub(crate) fn clip(partial: &Tensor, loss: &Tensor, clip: Option<f64>) -> Result<(Tensor, Tensor)> {
    on_gpu!(partial => sums, loss => loss; {
        let mut norm = unwritten(sums.device(), 1, DType::F32)?;
        let mut scale = unwritten(sums.device(), 1, DType::F32)?;
        let args = vec![
            Arg::In(sums),
            Arg::count(partial.elem_count())?,
            Arg::In(loss),
            Arg::F32(clip.map_or(-1.0, |clip| clip as f32)),
            Arg::out(&mut norm),
            Arg::out(&mut scale),
        ];
        launch(sums.device(), &UPDATE, "clip_f32", Grid::threads([1, 1, 1], 256), args)?;
        Ok((tensor(norm, ()), tensor(scale, ())))
    })
}

/// sum ← x, or sum ← sum + x, in place.
pub(crate) fn accumulate(sum: &Tensor, x: &Tensor, into: Into) -> Result<()> {
    let n = sum.elem_count();
    if x.dtype() != DType::F32 || x.elem_count() != n {
        bail!(
            "a gradient {:?} of type {:?} for a sum {:?} in f32",
            x.dims(),
            x.dtype(),
            sum.dims()
        );
    }
    mutate(sum, |sum, from| {
        on_gpu!(x => x; {
            let add = Arg::U32(u32::from(into == Into::Accumulate));
            let args = vec![Arg::Out(sum, from), Arg::In(x), add, Arg::Size(n)];
            launch(x.device(), &UPDATE, "accumulate_f32", Grid::flat(n), args)
        })
    })
}
