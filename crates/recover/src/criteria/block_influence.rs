use candle_core::{D, Tensor};
use serde_json::json;
use tinyfusion_core::{BlockStack, Result};
use tinyfusion_diffusion::Objective;

use super::hidden::block_distances;
use super::ranking::keep_highest;
use super::{Criterion, Judgement, Subject};

/// ShortGPT's block influence (Men et al., 2403.03853): BI_i = 1 − E\[cos(h_i, h_{i+1})\], the cosine taken token by token.
/// The blocks of the lowest influence go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockInfluence {
    /// As TinyFusion's public code scores: on inputs without noise, of which the network was trained to expect some, and
    /// with a last block that always stays. Without it the inputs are those of training.
    pub reference: bool,
}

impl<S: BlockStack, O: Objective<S>> Criterion<S, O> for BlockInfluence {
    fn name(&self) -> &'static str {
        "block-influence"
    }

    fn passes(&self, subject: &Subject<'_, S, O>) -> u64 {
        subject.batch_count
    }

    fn choose(self: Box<Self>, subject: &Subject<'_, S, O>) -> Result<Judgement> {
        let name = Criterion::<S, O>::name(&*self);
        let input = |draw: &O::Draw| {
            if self.reference {
                subject.objective.noise_free(draw)
            } else {
                subject.objective.input(draw)
            }
        };
        let blocks = block_distances(subject, input, one_minus_cosine)?;
        let mut ranked = blocks.clone();
        if self.reference
            && let Some(last) = ranked.last_mut()
            && !last.score.is_nan()
        {
            last.score = f64::INFINITY;
        }
        let kept = keep_highest(&subject.choice, &ranked, name)?;
        let settings = json!({ "reference": self.reference, "seed": subject.seed });
        Ok(Judgement {
            selection: subject.selection(name, settings, kept)?,
            blocks,
            masks: Vec::new(),
        })
    }
}

/// 1 − cos(a, b) per token, averaged over tokens: (B, T, D) twice → (B,). Norms below 1e-8 count as that, as in PyTorch.
fn one_minus_cosine(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let norm = |x: &Tensor| x.sqr()?.sum(D::Minus1)?.sqrt()?.maximum(1e-8); // (B, T)
    let cosine = (a * b)?.sum(D::Minus1)?.div(&(norm(a)? * norm(b)?)?)?; // (B, T)
    Ok(cosine.mean(1)?.affine(-1.0, 1.0)?) // (B,)
}
