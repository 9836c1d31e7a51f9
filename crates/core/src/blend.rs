use candle_core::{DType, Device, Tensor};

use crate::{BlockCall, BlockPlan, BlockStack, Error, Index, Plan, Result, Rows};

/// A block's column of a mask, and what the host knows of it.
#[derive(Debug, Clone)]
pub struct Gate {
    /// m (B,)
    mask: Tensor,
    /// Per sample whether m is 1; otherwise it is 0.
    kept: Option<Vec<bool>>,
}

impl Gate {
    /// By a column `mask` (B,) of any values.
    pub fn new(mask: Tensor) -> Self {
        Self { mask, kept: None }
    }

    /// By a column `mask` (B,) that is 1 for the samples that are `kept`, and 0 for the others. What is on a GPU is
    /// taken on trust, as the point is not to wait for it.
    pub fn known(mask: Tensor, kept: Vec<bool>) -> Result<Self> {
        let batch = mask.dims1()?;
        if batch != kept.len() {
            return Err(Error::usage(format!(
                "a mask of {batch} samples, of which {} are known",
                kept.len()
            )));
        }
        if mask.device().is_cpu() {
            let values = mask.detach().to_dtype(DType::F32)?.to_vec1::<f32>()?;
            let other = |&(&m, &kept): &(&f32, &bool)| m != f32::from(u8::from(kept));
            if let Some((m, kept)) = values.iter().zip(&kept).find(other) {
                return Err(Error::usage(format!(
                    "a sample's mask is {m}, and it is said to be kept: {kept}"
                )));
            }
        }
        Ok(Self {
            mask,
            kept: Some(kept),
        })
    }

    /// m as (B, 1, 1) in h's dtype.
    fn column(&self, h: &Tensor) -> Result<Tensor> {
        let shape = (self.mask.elem_count(), 1, 1);
        Ok(self.mask.reshape(shape)?.to_dtype(h.dtype())?)
    }
}

/// How a batch parts at a block: into the samples that are kept and those that are dropped, if there are any.
pub(crate) struct Split {
    kept: Option<Index>,
    dropped: Option<Index>,
    /// [`Parts::place`]
    place: Tensor,
}

impl Split {
    /// Of every blended block of a plan. All indices go to the device in one copy.
    pub(crate) fn of(plan: &Plan) -> Result<Vec<Option<Self>>> {
        let orders: Vec<Option<Order>> = kept(plan)?
            .iter()
            .map(|kept| kept.as_deref().map(Order::new))
            .collect();
        let device = plan.blocks.iter().find_map(|block| match block {
            BlockPlan::Blend(gate) => Some(gate.mask.device()),
            _ => None,
        });
        let Some(device) = device else {
            return Ok(orders.iter().map(|_| None).collect());
        };
        let all: Vec<u32> = orders
            .iter()
            .flatten()
            .flat_map(|order| order.samples.iter().chain(&order.back).copied())
            .collect();
        let all = Tensor::new(all, device)?; // (blocks·2·B,)
        let mut start = 0;
        orders
            .iter()
            .map(|order| {
                let Some(order) = order else { return Ok(None) };
                let n = order.samples.len();
                start += 2 * n;
                order.split(&all.narrow(0, start - 2 * n, 2 * n)?).map(Some)
            })
            .collect()
    }
}

/// The samples of a batch with the kept ones first.
struct Order {
    samples: Vec<u32>,
    /// How many are kept.
    kept: usize,
    /// Per sample of the batch where it stands in `samples`.
    back: Vec<u32>,
}

impl Order {
    fn new(kept: &[bool]) -> Self {
        let (mut samples, dropped): (Vec<u32>, Vec<u32>) =
            (0..kept.len() as u32).partition(|&b| kept[b as usize]);
        let kept = samples.len();
        samples.extend(dropped);
        let mut back = vec![0; samples.len()];
        for (at, &b) in samples.iter().enumerate() {
            back[b as usize] = at as u32;
        }
        Self {
            samples,
            kept,
            back,
        }
    }

    /// With `samples` and then `back`, which is the split's `place`, on the device, (2·B,).
    fn split(&self, device: &Tensor) -> Result<Split> {
        let n = self.samples.len();
        let index = |from: usize, to: usize| -> Result<Option<Index>> {
            if from == to {
                return Ok(None);
            }
            Ok(Some(Index {
                host: Tensor::new(&self.samples[from..to], &Device::Cpu)?,
                device: device.narrow(0, from, to - from)?,
            }))
        };
        Ok(Split {
            kept: index(0, self.kept)?,
            dropped: index(self.kept, n)?,
            place: device.narrow(0, n, n)?,
        })
    }
}

/// Per blended block which samples keep it. Masks that the host does not know it reads, all at once: a GPU is waited for
/// once in a pass and not at every block.
fn kept(plan: &Plan) -> Result<Vec<Option<Vec<bool>>>> {
    let mut all = vec![None; plan.blocks.len()];
    let (mut places, mut masks) = (Vec::new(), Vec::new());
    for (i, block) in plan.blocks.iter().enumerate() {
        match block {
            BlockPlan::Blend(Gate {
                kept: Some(kept), ..
            }) => all[i] = Some(kept.clone()),
            BlockPlan::Blend(gate) => {
                places.push(i);
                masks.push(gate.mask.detach());
            }
            BlockPlan::Run | BlockPlan::Skip => {}
        }
    }
    if masks.is_empty() {
        return Ok(all);
    }
    let values = Tensor::stack(&masks, 0)?.to_dtype(DType::F32)?; // (blocks, B)
    for (i, values) in places.into_iter().zip(values.to_vec2::<f32>()?) {
        if let Some(v) = values.iter().find(|v| **v != 0.0 && **v != 1.0) {
            return Err(Error::usage(format!(
                "the exact blend needs masks of 0 and 1, found {v}"
            )));
        }
        all[i] = Some(values.iter().map(|v| *v == 1.0).collect());
    }
    Ok(all)
}

/// h' = h + m·(block(h) − h), every sample through the block: the oracle for [`exact_blend`].
pub(crate) fn plain_blend<S: BlockStack>(
    h: &Tensor,
    gate: &Gate,
    call: &BlockCall<'_, S>,
) -> Result<Tensor> {
    let delta = (call.all(h)? - h)?; // (B, T, D)
    Ok((h + delta.broadcast_mul(&gate.column(h)?)?)?)
}

/// The same for an m of zeros and ones, as [`run_exact`](crate::run_exact) says.
pub(crate) fn exact_blend<S: BlockStack>(
    h: &Tensor,
    gate: &Gate,
    split: &Split,
    call: &BlockCall<'_, S>,
    untracked: &S,
) -> Result<Tensor> {
    let m = gate.column(h)?; // (B, 1, 1)
    let Some(dropped) = &split.dropped else {
        return kept_rows(&call.all(h)?, h, &m);
    };
    let h_dropped = call.pick(h, &dropped.device)?; // (R0, T, D)
    let shadow = call.rows_untracked(untracked, &h_dropped, dropped)?;
    let Some(kept) = &split.kept else {
        return dropped_rows(&shadow, &h_dropped, &m);
    };
    let h_kept = call.pick(h, &kept.device)?; // (R1, T, D)
    call.join(&Parts {
        h,
        mask: &m,
        kept: Part {
            index: &kept.device,
            before: &h_kept,
            after: &call.rows(&h_kept, kept)?,
        },
        dropped: Part {
            index: &dropped.device,
            before: &h_dropped,
            after: &shadow,
        },
        place: &split.place,
    })
}

/// A batch at a block that ran for some of its samples as it is, and for the others without a graph.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// The whole batch before the block (B, T, D).
    pub h: &'a Tensor,
    /// m (B, 1, 1): 1 for the samples that are kept, 0 for the others.
    pub mask: &'a Tensor,
    /// The samples that go through the block.
    pub kept: Part<'a>,
    /// Those that go past it; what the block would have made of them is for the gradient of m alone.
    pub dropped: Part<'a>,
    /// (B,) u32: where each sample of the batch stands among the kept ones with the dropped ones behind them.
    pub place: &'a Tensor,
}

/// Some samples of a batch, before and behind a block.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// Which they are, (R,) u32.
    pub index: &'a Tensor,
    /// (R, T, D)
    pub before: &'a Tensor,
    /// (R, T, D)
    pub after: &'a Tensor,
}

impl Parts<'_> {
    /// The batch behind the block (B, T, D): the kept samples as the block made them, the others as they were. Its
    /// gradient for m is ⟨g, block(h) − h⟩ of every sample.
    pub fn joined(&self) -> Result<Tensor> {
        let Self { kept, dropped, .. } = self;
        let mask = |part: &Part<'_>| self.mask.select(part.index); // (R, 1, 1)
        let out_kept = kept_rows(kept.after, kept.before, &mask(kept)?)?;
        let out_dropped = dropped_rows(dropped.after, dropped.before, &mask(dropped)?)?;
        Tensor::cat(&[out_kept, out_dropped], 0)?.select(self.place)
    }
}

/// Samples with m = 0: value h, with the gate's gradient ⟨g, block(h) − h⟩ added.
fn dropped_rows(shadow: &Tensor, h: &Tensor, m: &Tensor) -> Result<Tensor> {
    let delta = (shadow - h.detach())?;
    Ok((h + delta.broadcast_mul(m)?)?)
}

/// Samples with m = 1: value block(h), with the gate's gradient added.
fn kept_rows(out: &Tensor, h: &Tensor, m: &Tensor) -> Result<Tensor> {
    if !m.track_op() {
        return Ok(out.clone());
    }
    let delta = (out.detach() - h.detach())?;
    Ok((out + delta.broadcast_mul(&(m - 1.0)?)?)?)
}
