use tinyfusion_core::{
    BlockLayout, BlockStack, Error, Group, Result, Selection, StateDict, StepRng, stream,
};
use tinyfusion_diffusion::Objective;

/// Which masks a criterion may choose from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// So many blocks of each group.
    Groups(Vec<Group>),
    /// Any so many blocks of the whole network.
    Any(usize),
}

impl Choice {
    /// How many blocks stay.
    pub fn keeps(&self) -> usize {
        match self {
            Self::Groups(groups) => groups.iter().map(|g| g.n).sum(),
            Self::Any(n) => *n,
        }
    }

    /// The groups to choose within, each with its first block: one over the whole network where any will do.
    pub(super) fn pools(&self, depth: usize) -> Vec<(usize, Group)> {
        match self {
            Self::Groups(groups) => groups
                .iter()
                .scan(0, |start, group| {
                    let at = *start;
                    *start += group.m;
                    Some((at, *group))
                })
                .collect(),
            Self::Any(n) => vec![(0, Group { n: *n, m: depth })],
        }
    }
}

/// A network about to lose blocks, and what it is judged by.
pub struct Subject<'a, S: BlockStack, O: Objective<S>> {
    /// The network on detached weights: nothing is recorded.
    pub net: &'a S,
    /// Its weights by name.
    pub weights: &'a StateDict,
    /// The block that a weight belongs to, if it belongs to one.
    pub block_of: &'a dyn Fn(&str) -> Option<usize>,
    /// The loss.
    pub objective: &'a O,
    /// The masks to choose from.
    pub choice: Choice,
    /// The calibration batch k, the same whenever it is asked for.
    pub batches: &'a dyn Fn(u64) -> Result<O::Batch>,
    /// How many of them.
    pub batch_count: u64,
    /// Seed of timesteps, noise and random masks. Every plan sees the same draws.
    pub seed: u64,
    /// Passes that run side by side.
    pub lanes: usize,
    /// Told after every pass of a batch through the network; an error ends the work.
    pub passed: &'a (dyn Fn() -> Result<()> + Sync),
}

impl<S: BlockStack, O: Objective<S>> Subject<'_, S, O> {
    /// The network's stages.
    pub fn layout(&self) -> &BlockLayout {
        self.net.layout()
    }

    /// The calibration batch k with everything random drawn.
    pub(super) fn draw(&self, k: u64) -> Result<O::Draw> {
        let batch = (self.batches)(k)?;
        let mut rng = StepRng::new(self.seed, k, stream::HELD_OUT);
        self.objective.draw(&batch, &mut rng)
    }

    /// The first stage that would have no block left, if one would.
    pub(super) fn emptied(&self, kept: &[usize]) -> Option<usize> {
        let mut stages = self.layout().ranges();
        stages.position(|blocks| !kept.iter().any(|k| blocks.contains(k)))
    }

    /// The selection of the blocks `kept` under this choice.
    pub(super) fn selection(
        &self,
        criterion: &str,
        settings: serde_json::Value,
        kept: Vec<usize>,
    ) -> Result<Selection> {
        let layout = self.layout();
        if let Some(stage) = self.emptied(&kept) {
            return Err(Error::usage(format!(
                "{criterion} would leave stage {stage} of the network without a block; choose within groups, for \
                 example --pattern 1:2"
            )));
        }
        let groups = match &self.choice {
            Choice::Groups(groups) => groups.clone(),
            Choice::Any(_) => Selection::from_indices(layout, kept.clone())?.groups,
        };
        Selection {
            depth: layout.depth(),
            kept,
            groups,
            criterion: criterion.into(),
            settings,
            decisions: Vec::new(),
            source_sha256: None,
        }
        .validated()
    }
}
