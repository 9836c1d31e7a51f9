use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Tensor, bail,
};
use tinyfusion_core::Parts;

use super::{Arg, Grid, Module, View, launch, module, on_gpu, tensor, typed, unwritten, zeros};
use crate::tape::{apply1, apply3};

static BLEND: Module = module!("blend");

/// Rows `index` (R,) of h (B, …).
pub(crate) fn pick(h: &Tensor, index: &Tensor) -> Result<Tensor> {
    apply1(&h.contiguous()?, Pick(index.contiguous()?))
}

/// [`Parts::joined`]
pub(crate) fn join(parts: &Parts<'_>) -> Result<Tensor> {
    let op = Join {
        dropped: parts.dropped.after.detach(),
        kept: parts.kept.after.dim(0)?,
        place: parts.place.contiguous()?,
    };
    let (h, kept) = (parts.h.contiguous()?, parts.kept.after.contiguous()?);
    apply3(&h, &kept, &parts.mask.contiguous()?, op)
}

/// A kernel over `rows` rows of `n` values, of whose operands `like` is one.
fn run(
    name: &str,
    like: View<'_>,
    (rows, n): (usize, usize),
    mut args: Vec<Arg<'_>>,
) -> Result<()> {
    args.extend([Arg::count(rows)?, Arg::count(n)?]);
    let name = typed(name, &[like.dtype()])?;
    launch(like.device(), &BLEND, &name, Grid::matrix(rows, n), args)
}

struct Pick(Tensor);

impl CustomOp1 for Pick {
    fn name(&self) -> &'static str {
        "pick"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("pick on a GPU: found its operand on the CPU")
    }

    fn cuda_fwd(&self, h: &CudaStorage, hl: &Layout) -> Result<(CudaStorage, Shape)> {
        let rows = self.0.elem_count();
        let mut dims = hl.dims().to_vec();
        let n = hl.shape().elem_count() / std::mem::replace(&mut dims[0], rows);
        let h = View::new(h, hl)?;
        let mut out = unwritten(h.device(), rows * n, h.dtype())?;
        on_gpu!(&self.0 => index; {
            let args = vec![Arg::In(h), Arg::In(index), Arg::out(&mut out)];
            run("pick", h, (rows, n), args)?;
        });
        Ok((out, Shape::from(dims)))
    }

    fn bwd(&self, h: &Tensor, _out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let rows = self.0.elem_count();
        let n = dout.elem_count() / rows;
        let dh = on_gpu!(dout => dout, &self.0 => index; {
            let mut dh = zeros(dout.device(), h.elem_count(), dout.dtype())?;
            let args = vec![Arg::In(dout), Arg::In(index), Arg::out(&mut dh)];
            run("put", dout, (rows, n), args)?;
            dh
        });
        Ok(Some(tensor(dh, h.shape())))
    }
}

/// Of h (B, T, D), what a block made of the kept samples (R1, T, D), and the mask (B, 1, 1).
struct Join {
    /// What it would have made of the others (R0, T, D).
    dropped: Tensor,
    /// R1
    kept: usize,
    /// [`Parts::place`]
    place: Tensor,
}

impl CustomOp3 for Join {
    fn name(&self) -> &'static str {
        "join"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("join on a GPU: found its operands on the CPU")
    }

    fn cuda_fwd(
        &self,
        h: &CudaStorage,
        hl: &Layout,
        kept: &CudaStorage,
        kl: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (b, n) = (hl.dims()[0], hl.shape().elem_count() / hl.dims()[0]);
        let (h, kept) = (View::new(h, hl)?, View::new(kept, kl)?);
        let mut out = unwritten(h.device(), b * n, h.dtype())?;
        on_gpu!(&self.place => place; {
            let args = vec![
                Arg::In(h),
                Arg::In(kept),
                Arg::In(place),
                Arg::count(self.kept)?,
                Arg::out(&mut out),
            ];
            run("join", h, (b, n), args)?;
        });
        Ok((out, hl.shape().clone()))
    }

    /// Kept samples hand their gradient to the block, the others to h; that of the mask is ⟨dout, block(h) − h⟩ of each.
    fn bwd(
        &self,
        h: &Tensor,
        kept: &Tensor,
        mask: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let b = h.dim(0)?;
        let n = h.elem_count() / b;
        on_gpu!(dout => g, h => hs, kept => ks, &self.dropped => ds, &self.place => place; {
            let mut dh = unwritten(g.device(), b * n, g.dtype())?;
            let mut dkept = unwritten(g.device(), self.kept * n, g.dtype())?;
            let args = vec![
                Arg::In(g),
                Arg::In(place),
                Arg::count(self.kept)?,
                Arg::out(&mut dh),
                Arg::out(&mut dkept),
            ];
            run("join_backward", g, (b, n), args)?;
            let dmask = match mask.track_op() {
                true => {
                    let chunks = n.div_ceil(SHARE);
                    let mut partial = unwritten(g.device(), b * chunks, DType::F32)?;
                    let args = vec![
                        Arg::In(g),
                        Arg::In(hs),
                        Arg::In(ks),
                        Arg::In(ds),
                        Arg::In(place),
                        Arg::count(self.kept)?,
                        Arg::out(&mut partial),
                        Arg::count(n)?,
                        Arg::count(SHARE)?,
                    ];
                    let grid = Grid::threads([chunks, b, 1], 256);
                    let name = typed("gate_sums", &[g.dtype()])?;
                    launch(g.device(), &BLEND, &name, grid, args)?;
                    let sums = tensor(partial, (b, chunks)).sum(1)?; // (B,)
                    Some(sums.reshape(mask.shape())?.to_dtype(mask.dtype())?)
                }
                false => None,
            };
            Ok((
                Some(tensor(dh, h.shape())),
                Some(tensor(dkept, kept.shape())),
                dmask,
            ))
        })
    }
}

/// Values of a sample that a block of threads adds up.
const SHARE: usize = 16384;
