use tinyfusion_core::{BlockStack, Result, Selection};
use tinyfusion_diffusion::Objective;
use tinyfusion_mask::random_selection;

use super::{Choice, Criterion, Judgement, Subject};

/// A mask drawn uniformly from those allowed: the control of every other criterion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Random;

impl<S: BlockStack, O: Objective<S>> Criterion<S, O> for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn passes(&self, _: &Subject<'_, S, O>) -> u64 {
        0
    }

    fn choose(self: Box<Self>, subject: &Subject<'_, S, O>) -> Result<Judgement> {
        Ok(Judgement {
            selection: draw(subject, 0)?,
            blocks: Vec::new(),
            masks: Vec::new(),
        })
    }
}

/// Masks drawn in place of one that would empty a stage, before that is called hopeless.
const REDRAWS: u64 = 1000;

/// The random mask number `draw` of the subject's seed; one that would empty a stage is drawn again, so that those that do not
/// are equally likely.
pub(super) fn draw<S: BlockStack, O: Objective<S>>(
    subject: &Subject<'_, S, O>,
    draw: u64,
) -> Result<Selection> {
    let pools = subject.choice.pools(subject.layout().depth());
    let groups: Vec<_> = pools.into_iter().map(|(_, group)| group).collect();
    let mut drawn = random_selection(&groups, subject.seed, draw)?;
    // Numbers that no draw of the search has.
    let mut others = (1..=REDRAWS).map(|again| draw + (again << 32));
    while subject.emptied(&drawn.kept).is_some()
        && let Some(other) = others.next()
    {
        drawn = random_selection(&groups, subject.seed, other)?;
    }
    // One that empties a stage after all is refused there.
    let checked = subject.selection("random", drawn.settings.clone(), drawn.kept.clone())?;
    match subject.choice {
        Choice::Groups(_) => Ok(drawn),
        // Its one group would cross the network's stages.
        Choice::Any(_) => Ok(checked),
    }
}
