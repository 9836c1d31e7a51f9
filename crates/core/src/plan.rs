use candle_core::Tensor;

use crate::blend::{Gate, Split, exact_blend, plain_blend};
use crate::{BlockCall, BlockStack, Error, Result, stack::walk};

/// What to do with one block.
#[derive(Debug, Clone)]
pub enum BlockPlan {
    /// h' = block(h)
    Run,
    /// h' = h
    Skip,
    /// h' = m·block(h) + (1 − m)·h with one m per sample (TinyFusion, eq. 2).
    Blend(Gate),
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
        let gates = columns(mask)?.into_iter().map(Gate::new).collect();
        Ok(Self::blend_by(gates))
    }

    /// The same where the host knows the mask: `kept` says per block and sample whether m is 1, which it is or 0. Then
    /// [`run_exact`] need not read the mask, for which it would wait for a GPU.
    pub fn blend_known(mask: &Tensor, kept: Vec<Vec<bool>>) -> Result<Self> {
        let columns = columns(mask)?;
        if columns.len() != kept.len() {
            return Err(Error::usage(format!(
                "a mask of {} blocks, of which {} are known",
                columns.len(),
                kept.len()
            )));
        }
        let gates = columns.into_iter().zip(kept);
        let gates = gates.map(|(m, kept)| Gate::known(m, kept));
        Ok(Self::blend_by(gates.collect::<Result<_>>()?))
    }

    fn blend_by(gates: Vec<Gate>) -> Self {
        Self {
            blocks: gates.into_iter().map(BlockPlan::Blend).collect(),
            taps: Vec::new(),
        }
    }

    /// The same plan, keeping the outputs of `taps`.
    pub fn with_taps(mut self, taps: impl Into<Vec<usize>>) -> Self {
        self.taps = taps.into();
        self
    }
}

/// The columns (B,) of a mask (B, depth), each in one piece.
fn columns(mask: &Tensor) -> Result<Vec<Tensor>> {
    let (_, depth) = mask.dims2()?;
    let columns = mask.t()?.contiguous()?; // (depth, B)
    (0..depth).map(|i| Ok(columns.get(i)?)).collect()
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
    run_with(net, input, plan, |_, h, gate, call| {
        plain_blend(h, gate, call)
    })
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
    let splits = Split::of(plan)?;
    run_with(net, input, plan, |i, h, gate, call| match &splits[i] {
        None => plain_blend(h, gate, call),
        Some(split) => exact_blend(h, gate, split, call, untracked),
    })
}

fn run_with<S: BlockStack>(
    net: &S,
    input: &S::Input,
    plan: &Plan,
    blend: impl Fn(usize, &Tensor, &Gate, &BlockCall<'_, S>) -> Result<Tensor>,
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
            BlockPlan::Blend(gate) => blend(i, h, gate, &call)?,
        };
        if plan.taps.contains(&i) {
            taps.push(h.clone());
        }
        Ok(h)
    })?;
    Ok(Trace { output, taps })
}
