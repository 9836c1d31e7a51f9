use std::cell::Cell;

use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp1, Layout, Result, Tensor, bail};

use super::{Arg, Grid, Module, View, launch, module, on_gpu, tensor, unwritten};
use crate::update::{Parameter, Pass, Scale};

static UPDATE: Module = module!("update");

/// Gives `change` a contiguous f32 tensor on a GPU, as its storage and the place of its first value, to be changed in
/// place.
fn mutate(
    tensor: &Tensor,
    change: impl FnOnce(&mut CudaStorage, usize) -> Result<()>,
) -> Result<()> {
    tensor.inplace_op1(&Mutate(Cell::new(Some(change))))
}

struct Mutate<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut CudaStorage, usize) -> Result<()>> InplaceOp1 for Mutate<F> {
    fn name(&self) -> &'static str {
        "mutate on a GPU"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, layout: &Layout) -> Result<()> {
        bail!(
            "mutate on a GPU: found a tensor {:?} on the CPU",
            layout.dims()
        )
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        match (layout.contiguous_offsets(), self.0.take()) {
            (Some((start, _)), Some(change)) if storage.as_cuda_slice::<f32>().is_ok() => {
                change(storage, start)
            }
            _ => bail!("values are changed in place only in a contiguous f32 tensor"),
        }
    }
}

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
