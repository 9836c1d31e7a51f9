use candle_core::DType;
use serde_json::Value;
use tinyfusion_core::{BlockStack, Error, Result};
use tinyfusion_diffusion::Objective;

use super::ranking::keep_highest;
use super::{BlockScore, Criterion, Judgement, Subject};

/// The mean absolute weight of a block, without any data. The blocks of the smallest weights go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Magnitude;

impl<S: BlockStack, O: Objective<S>> Criterion<S, O> for Magnitude {
    fn name(&self) -> &'static str {
        "magnitude"
    }

    fn passes(&self, _: &Subject<'_, S, O>) -> u64 {
        0
    }

    fn choose(self: Box<Self>, subject: &Subject<'_, S, O>) -> Result<Judgement> {
        let name = Criterion::<S, O>::name(&*self);
        // Σ|w| and the number of weights, block by block.
        let mut sums = vec![(0.0, 0); subject.layout().depth()];
        for (key, tensor) in subject.weights.iter() {
            let Some(block) = (subject.block_of)(key) else {
                continue;
            };
            let Some((sum, count)) = sums.get_mut(block) else {
                return Err(Error::usage(format!(
                    "`{key}` belongs to block {block}, but the network has {}",
                    sums.len()
                )));
            };
            let total = tensor.to_dtype(DType::F64)?.abs()?.sum_all()?;
            *sum += total.to_scalar::<f64>()?;
            *count += tensor.elem_count();
        }
        if let Some(block) = sums.iter().position(|(_, count)| *count == 0) {
            return Err(Error::usage(format!("block {block} has no weights")));
        }
        let score = |(block, (sum, count)): (usize, (f64, usize))| BlockScore {
            block,
            score: sum / count as f64,
            standard_error: None,
        };
        let blocks: Vec<BlockScore> = sums.into_iter().enumerate().map(score).collect();
        let kept = keep_highest(&subject.choice, &blocks, name)?;
        Ok(Judgement {
            selection: subject.selection(name, Value::Null, kept)?,
            blocks,
            masks: Vec::new(),
        })
    }
}
