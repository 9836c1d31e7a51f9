use serde_json::json;
use tinyfusion_core::{BlockStack, Error, Result};
use tinyfusion_diffusion::Objective;

use super::calibration::mask_losses;
use super::{Choice, Criterion, Judgement, MaskScore, Subject};

/// Sensitivity analysis one block after another: of the blocks that may still go, the one without which the loss is
/// lowest goes, until as few are left as are to be kept. Unlike [`Sensitivity`](super::Sensitivity) it sees that two
/// blocks can stand in for each other.
///
/// The masks of its judgement are those taken after each removal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Greedy;

impl<S, O> Criterion<S, O> for Greedy
where
    S: BlockStack + Sync,
    O: Objective<S> + Sync,
{
    fn name(&self) -> &'static str {
        "sensitivity-greedy"
    }

    fn passes(&self, subject: &Subject<'_, S, O>) -> u64 {
        // With several groups an upper bound: one that is done offers no more blocks.
        let tried: usize = (subject.choice.keeps() + 1..=subject.layout().depth()).sum();
        subject.batch_count * tried as u64
    }

    fn choose(self: Box<Self>, subject: &Subject<'_, S, O>) -> Result<Judgement> {
        let name = Criterion::<S, O>::name(&*self);
        let depth = subject.layout().depth();
        let mut kept: Vec<usize> = (0..depth).collect();
        let mut masks: Vec<MaskScore> = Vec::new();
        while kept.len() > subject.choice.keeps() {
            let candidates: Vec<Vec<usize>> = removable(&subject.choice, depth, &kept)
                .into_iter()
                .map(|block| kept.iter().copied().filter(|k| *k != block).collect())
                .filter(|left: &Vec<usize>| subject.emptied(left).is_none())
                .collect();
            if candidates.is_empty() {
                return Err(Error::usage(format!(
                    "{name}: {} blocks cannot be kept without leaving a stage of the network empty",
                    subject.choice.keeps()
                )));
            }
            let losses = mask_losses(subject, &candidates)?;
            // Of equal ones the first, whose removed block is the earliest.
            let best = losses
                .into_iter()
                .filter(|m| m.loss.is_some())
                .min_by(|a, b| {
                    let loss = |m: &MaskScore| m.loss.unwrap_or(f64::INFINITY);
                    loss(a).total_cmp(&loss(b))
                })
                .ok_or_else(|| {
                    Error::run(format!(
                        "{name}: no mask of {} blocks has a loss that is a number; are there NaN or infinite values in the \
                         model's weights?",
                        kept.len() - 1
                    ))
                })?;
            kept.clone_from(&best.kept);
            masks.push(best);
        }
        Ok(Judgement {
            selection: subject.selection(name, json!({ "seed": subject.seed }), kept)?,
            blocks: Vec::new(),
            masks,
        })
    }
}

/// Kept blocks of groups that still have more than they are to keep.
fn removable(choice: &Choice, depth: usize, kept: &[usize]) -> Vec<usize> {
    choice
        .pools(depth)
        .into_iter()
        .flat_map(|(start, group)| {
            let inside = |k: &usize| (start..start + group.m).contains(k);
            let here: Vec<usize> = kept.iter().copied().filter(inside).collect();
            if here.len() > group.n {
                here
            } else {
                Vec::new()
            }
        })
        .collect()
}
