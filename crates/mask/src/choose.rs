//! Masks that need no learning.

use serde_json::json;
use tinyfusion_core::{BlockLayout, Error, Group, Result, Selection, StepRng, stream};

/// A mask drawn uniformly from those of a pattern: independently per group, every subset equally
/// likely. `draw` numbers the masks of one seed. One group over the whole depth draws from all
/// C(L, n) masks.
pub fn random_selection(groups: &[Group], seed: u64, draw: u64) -> Result<Selection> {
    if let Some(group) = groups.iter().find(|g| g.n > g.m) {
        return Err(Error::usage(format!(
            "a group cannot keep {} of {} blocks",
            group.n, group.m
        )));
    }
    let mut rng = StepRng::new(seed, draw, stream::CRITERION);
    let (mut start, mut kept) = (0, Vec::new());
    for group in groups {
        // The first n of a uniformly random order are a uniformly random subset.
        let mut chosen = rng.permutation(group.m);
        chosen.truncate(group.n);
        chosen.sort_unstable();
        kept.extend(chosen.into_iter().map(|i| start + i));
        start += group.m;
    }
    selection(
        "random",
        json!({ "seed": seed, "draw": draw }),
        groups.to_vec(),
        kept,
    )
}

/// The BK-SDM oracle: pairs of blocks, of which the first half of the network keeps the first and the
/// second half the last (28 blocks: 0, 2, …, 12, 15, 17, …, 27).
///
/// A pair belongs to the first half if its first block does. Pairs never cross stages; the last block
/// of a stage of odd depth stays alone and is kept.
pub fn oracle_selection(layout: &BlockLayout) -> Result<Selection> {
    let half = layout.depth().div_ceil(2);
    let (mut groups, mut kept) = (Vec::new(), Vec::new());
    for blocks in layout.ranges() {
        for start in blocks.clone().step_by(2) {
            let m = (blocks.end - start).min(2);
            groups.push(Group { n: 1, m });
            kept.push(if start < half { start } else { start + m - 1 });
        }
    }
    selection("oracle", serde_json::Value::Null, groups, kept)
}

fn selection(
    criterion: &str,
    settings: serde_json::Value,
    groups: Vec<Group>,
    kept: Vec<usize>,
) -> Result<Selection> {
    Selection {
        depth: groups.iter().map(|g| g.m).sum(),
        kept,
        groups,
        criterion: criterion.into(),
        settings,
        decisions: Vec::new(),
        source_sha256: None,
    }
    .validated()
}
