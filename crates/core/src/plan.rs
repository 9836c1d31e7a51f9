use candle_core::{Device, Tensor};

use crate::{BlockCall, BlockStack, Error, Result, Rows, stack::walk};

/// What to do with one block.
#[derive(Debug, Clone)]
pub enum BlockPlan {
    /// h' = block(h)
    Run,
    /// h' = h
    Skip,
    /// h' = m·block(h) + (1 − m)·h with a mask column m (B,), one value per sample
    /// (TinyFusion, eq. 2).
    Blend(Tensor),
}

/// What to do with every block, and whose outputs to keep.
#[derive(Debug, Clone)]
pub struct Plan {
    /// One entry per block.
    pub blocks: Vec<BlockPlan>,
    /// Block indices, ascending, whose outputs h_{i+1} the trace keeps.
    pub taps: Vec<usize>,
}

impl Plan {
    /// Every block runs.
    pub fn full(depth: usize) -> Self {
        Self {
            blocks: vec![BlockPlan::Run; depth],
            taps: Vec::new(),
        }
    }

    /// Only the blocks in `kept` run.
    pub fn keep(depth: usize, kept: &[usize]) -> Self {
        let blocks = (0..depth)
            .map(|i| {
                if kept.contains(&i) {
                    BlockPlan::Run
                } else {
                    BlockPlan::Skip
                }
            })
            .collect();
        Self {
            blocks,
            taps: Vec::new(),
        }
    }

    /// Every block blends by its column of `mask` (B, depth).
    pub fn blend(mask: &Tensor) -> Result<Self> {
        let (_, depth) = mask.dims2()?;
        let blocks = (0..depth)
            .map(|i| Ok(BlockPlan::Blend(mask.narrow(1, i, 1)?.squeeze(1)?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            blocks,
            taps: Vec::new(),
        })
    }

    /// The same plan, keeping the outputs of `taps`.
    pub fn with_taps(mut self, taps: impl Into<Vec<usize>>) -> Self {
        self.taps = taps.into();
        self
    }
}

/// What a run leaves behind.
#[derive(Debug, Clone)]
pub struct Trace {
    /// The network's output.
    pub output: Tensor,
    /// Outputs (B, T, D) of the tapped blocks, in the order of [`Plan::taps`].
    pub taps: Vec<Tensor>,
}

/// Runs `net` under `plan`. A blended block runs on every sample (the plain blend).
pub fn run<S: BlockStack>(net: &S, input: &S::Input, plan: &Plan) -> Result<Trace> {
    run_with(net, input, plan, |_, h, m, call| plain_blend(h, m, call))
}

/// As [`run`] for masks of exact zeros and ones, doing only the work that matters: same output,
/// same gradients.
///
/// Where m = 0 the block's output reaches the loss only through the gate's gradient
/// ⟨g, block(h) − h⟩, so dropped samples run on `untracked` (the same net on detached weights):
/// no saved activations and no backward. At 1:2 that is about 2/3 of the work of the plain blend.
pub fn run_exact<S: BlockStack>(
    net: &S,
    untracked: &S,
    input: &S::Input,
    plan: &Plan,
) -> Result<Trace> {
    let gates = hard_gates(plan)?;
    run_with(net, input, plan, |i, h, m, call| {
        exact_blend(h, m, &gates[i], call, untracked)
    })
}

/// The masks of all blended blocks, (B,) each; nothing of the others. Which samples run where decides the work, so the
/// host has to know: it reads them at once, and a GPU waits once in a pass and not at every block.
fn hard_gates(plan: &Plan) -> Result<Vec<Vec<f32>>> {
    let mut gates = vec![Vec::new(); plan.blocks.len()];
    let blended = plan
        .blocks
        .iter()
        .enumerate()
        .filter_map(|(i, block)| match block {
            BlockPlan::Blend(m) => Some((i, m.detach())),
            _ => None,
        });
    let (places, masks): (Vec<usize>, Vec<Tensor>) = blended.unzip();
    if masks.is_empty() {
        return Ok(gates);
    }
    let all = Tensor::stack(&masks, 0)?.to_dtype(candle_core::DType::F32)?; // (blocks, B)
    for (i, gate) in places.into_iter().zip(all.to_vec2::<f32>()?) {
        if let Some(v) = gate.iter().find(|v| **v != 0.0 && **v != 1.0) {
            return Err(Error::usage(format!(
                "the exact blend needs masks of 0 and 1, found {v}"
            )));
        }
        gates[i] = gate;
    }
    Ok(gates)
}

fn run_with<S: BlockStack>(
    net: &S,
    input: &S::Input,
    plan: &Plan,
    blend: impl Fn(usize, &Tensor, &Tensor, &BlockCall<'_, S>) -> Result<Tensor>,
) -> Result<Trace> {
    let depth = net.layout().depth();
    if plan.blocks.len() != depth {
        return Err(Error::usage(format!(
            "the plan speaks of {} blocks, the network has {depth}",
            plan.blocks.len()
        )));
    }
    if let Some(tap) = plan.taps.iter().find(|&&t| t >= depth) {
        return Err(Error::usage(format!(
            "block {tap} cannot be tapped: the network has {depth} blocks"
        )));
    }
    let mut taps = Vec::with_capacity(plan.taps.len());
    let output = walk(net, input, |i, h, call| {
        let h = match &plan.blocks[i] {
            BlockPlan::Run => call.all(h)?,
            BlockPlan::Skip => h.clone(),
            BlockPlan::Blend(m) => blend(i, h, m, &call)?,
        };
        if plan.taps.contains(&i) {
            taps.push(h.clone());
        }
        Ok(h)
    })?;
    Ok(Trace { output, taps })
}

/// h' = h + m·(block(h) − h), every sample through the block: the oracle for [`exact_blend`].
fn plain_blend<S: BlockStack>(h: &Tensor, m: &Tensor, call: &BlockCall<'_, S>) -> Result<Tensor> {
    let delta = (call.all(h)? - h)?; // (B, T, D)
    Ok((h + delta.broadcast_mul(&column(m, h)?)?)?)
}

fn exact_blend<S: BlockStack>(
    h: &Tensor,
    m: &Tensor,
    values: &[f32],
    call: &BlockCall<'_, S>,
    untracked: &S,
) -> Result<Tensor> {
    let m = column(m, h)?; // (B, 1, 1)
    let (kept, dropped): (Vec<u32>, Vec<u32>) =
        (0..values.len() as u32).partition(|&b| values[b as usize] == 1.0);
    let index = |rows: &[u32]| Tensor::new(rows, &Device::Cpu);
    if dropped.is_empty() {
        return kept_rows(&call.all(h)?, h, &m);
    }
    let dropped_index = index(&dropped)?;
    let h_dropped = h.select(&dropped_index)?; // (R0, T, D)
    let shadow = call.rows_untracked(untracked, &h_dropped, &dropped_index)?;
    // Value h, but d loss / d m = <g, block(h) - h>.
    let delta = (shadow - h_dropped.detach())?;
    let out_dropped = (&h_dropped + delta.broadcast_mul(&m.select(&dropped_index)?)?)?;
    if kept.is_empty() {
        return Ok(out_dropped);
    }
    let kept_index = index(&kept)?;
    let h_kept = h.select(&kept_index)?; // (R1, T, D)
    let out_kept = kept_rows(
        &call.rows(&h_kept, &kept_index)?,
        &h_kept,
        &m.select(&kept_index)?,
    )?;
    // Back into the batch's order.
    let mut place = vec![0u32; values.len()];
    for (at, &b) in kept.iter().chain(&dropped).enumerate() {
        place[b as usize] = at as u32;
    }
    Tensor::cat(&[out_kept, out_dropped], 0)?.select(&index(&place)?)
}

/// Samples with m = 1: value block(h), with the gate's gradient ⟨g, block(h) − h⟩ added.
fn kept_rows(out: &Tensor, h: &Tensor, m: &Tensor) -> Result<Tensor> {
    if !m.track_op() {
        return Ok(out.clone());
    }
    let delta = (out.detach() - h.detach())?;
    Ok((out + delta.broadcast_mul(&(m - 1.0)?)?)?)
}

/// m (B,) as (B, 1, 1) in h's dtype.
fn column(m: &Tensor, h: &Tensor) -> Result<Tensor> {
    Ok(m.reshape((m.elem_count(), 1, 1))?.to_dtype(h.dtype())?)
}
