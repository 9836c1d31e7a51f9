use tinyfusion_core::{BlockStack, Result};
use tinyfusion_diffusion::Objective;
use tinyfusion_mask::oracle_selection;

use super::{Criterion, Judgement, Subject};

/// BK-SDM's oracle (Kim et al., 2305.15798), which looks at no data and knows one mask: see [`oracle_selection`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Oracle;

impl<S: BlockStack, O: Objective<S>> Criterion<S, O> for Oracle {
    fn name(&self) -> &'static str {
        "oracle"
    }

    fn passes(&self, _: &Subject<'_, S, O>) -> u64 {
        0
    }

    fn choose(self: Box<Self>, subject: &Subject<'_, S, O>) -> Result<Judgement> {
        Ok(Judgement {
            selection: oracle_selection(subject.layout())?,
            blocks: Vec::new(),
            masks: Vec::new(),
        })
    }
}
