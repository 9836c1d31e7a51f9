use tinyfusion_core::{BlockStack, Error, Result, Selection};
use tinyfusion_diffusion::Objective;
use tinyfusion_mask::candidates;

use super::{BlockScore, Choice, Criterion, Judgement, Subject};
use crate::{LearnConfig, RunContext, Teacher, learn};

/// The mask learned together with a weight update: [`learn`] as one criterion among others. A block's score is the
/// probability that it is kept.
pub struct LearnedMask<'a, S, F> {
    /// Settings of the search; its pattern is the subject's choice.
    pub config: LearnConfig,
    /// The network that is masked and updated.
    pub teacher: Teacher<'a, S>,
    /// The training batch of a step.
    pub batches: F,
    /// Where the search runs.
    pub context: RunContext<'a>,
}

impl<S, O, F> Criterion<S, O> for LearnedMask<'_, S, F>
where
    S: BlockStack + Sync,
    O: Objective<S> + Sync,
    F: FnMut(u64) -> Result<O::Batch> + Send,
{
    fn name(&self) -> &'static str {
        "learned"
    }

    /// None: the search shows its own progress.
    fn passes(&self, _: &Subject<'_, S, O>) -> u64 {
        0
    }

    fn choose(self: Box<Self>, subject: &Subject<'_, S, O>) -> Result<Judgement> {
        let groups = self.config.pattern.groups(subject.layout())?;
        if subject.choice != Choice::Groups(groups) {
            return Err(Error::usage(
                "a mask is learned within the groups of a pattern, not over any so many blocks of the network",
            ));
        }
        let Self {
            config,
            teacher,
            batches,
            context,
        } = *self;
        let selection = learn(&config, teacher, subject.objective, batches, context)?.selection;
        Ok(Judgement {
            blocks: keep_probabilities(&selection)?,
            selection,
            masks: Vec::new(),
        })
    }
}

/// The probability of every block to be kept, from the decisions of a learned selection.
pub fn keep_probabilities(selection: &Selection) -> Result<Vec<BlockScore>> {
    let mut scores = Vec::with_capacity(selection.depth);
    for (group, decision) in selection.groups.iter().zip(&selection.decisions) {
        let start = scores.len();
        let mut kept = vec![0.0; group.m];
        for (mask, probability) in candidates(*group)?.iter().zip(&decision.probabilities) {
            for &i in mask {
                kept[i] += probability;
            }
        }
        scores.extend(kept.into_iter().enumerate().map(|(i, score)| BlockScore {
            block: start + i,
            score,
            standard_error: None,
        }));
    }
    Ok(scores)
}
