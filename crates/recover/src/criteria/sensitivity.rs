use serde_json::json;
use tinyfusion_core::{BlockPlan, BlockStack, Plan, Result};
use tinyfusion_diffusion::Objective;

use super::calibration::each_batch;
use super::hidden::scores;
use super::ranking::keep_highest;
use super::{Criterion, Judgement, Subject};
use crate::running::Running;

/// Sensitivity analysis: how much the loss rises when one block alone is skipped. The least sensitive blocks go.
///
/// The rise is taken sample by sample on the same timesteps and noise, so that its standard error is that of a
/// difference and not of two losses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sensitivity;

impl<S, O> Criterion<S, O> for Sensitivity
where
    S: BlockStack + Sync,
    O: Objective<S> + Sync,
{
    fn name(&self) -> &'static str {
        "sensitivity"
    }

    fn passes(&self, subject: &Subject<'_, S, O>) -> u64 {
        subject.batch_count * (subject.layout().depth() as u64 + 1)
    }

    fn choose(self: Box<Self>, subject: &Subject<'_, S, O>) -> Result<Judgement> {
        let name = Criterion::<S, O>::name(&*self);
        let depth = subject.layout().depth();
        let without = |block: usize| {
            let mut plan = Plan::full(depth);
            plan.blocks[block] = BlockPlan::Skip;
            plan
        };
        let mut plans = vec![Plan::full(depth)];
        plans.extend((0..depth).map(without));
        let mut rises = vec![Running::default(); depth];
        let mut breaks = vec![false; depth];
        each_batch(subject, &plans, |losses| {
            let Some((whole, skipped)) = losses.split_first() else {
                return;
            };
            for ((rise, breaks), losses) in rises.iter_mut().zip(&mut breaks).zip(skipped) {
                // A loss that only the missing block makes infinite is no mistake: nothing is more sensitive.
                *breaks |= losses
                    .iter()
                    .zip(whole)
                    .any(|(with, base)| base.is_finite() && !with.is_finite());
                rise.extend(losses.iter().zip(whole).map(|(with, base)| with - base));
            }
        })?;
        let mut blocks = scores(&rises)?;
        for (block, _) in blocks
            .iter_mut()
            .zip(&breaks)
            .filter(|(_, breaks)| **breaks)
        {
            block.score = f64::INFINITY;
            block.standard_error = None;
        }
        let kept = keep_highest(&subject.choice, &blocks, name)?;
        Ok(Judgement {
            selection: subject.selection(name, json!({ "seed": subject.seed }), kept)?,
            blocks,
            masks: Vec::new(),
        })
    }
}
