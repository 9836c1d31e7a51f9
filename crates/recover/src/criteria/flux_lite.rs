use candle_core::Tensor;
use serde_json::json;
use tinyfusion_core::{BlockStack, Result};
use tinyfusion_diffusion::Objective;

use super::hidden::block_distances;
use super::ranking::keep_highest;
use super::{Criterion, Judgement, Subject};

/// Flux.1-lite's criterion: the mean squared difference between a block's input and its output. The blocks that change
/// least go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FluxLite;

impl<S: BlockStack, O: Objective<S>> Criterion<S, O> for FluxLite {
    fn name(&self) -> &'static str {
        "flux-lite"
    }

    fn passes(&self, subject: &Subject<'_, S, O>) -> u64 {
        subject.batch_count
    }

    fn choose(self: Box<Self>, subject: &Subject<'_, S, O>) -> Result<Judgement> {
        let name = Criterion::<S, O>::name(&*self);
        let blocks = block_distances(subject, |draw| subject.objective.input(draw), squared)?;
        let kept = keep_highest(&subject.choice, &blocks, name)?;
        Ok(Judgement {
            selection: subject.selection(name, json!({ "seed": subject.seed }), kept)?,
            blocks,
            masks: Vec::new(),
        })
    }
}

/// Mean of (a − b)² over tokens and channels: (B, T, D) twice → (B,).
fn squared(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok((a - b)?.sqr()?.flatten_from(1)?.mean(1)?)
}
