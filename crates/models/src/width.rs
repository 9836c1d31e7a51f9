//! Blocks that are narrower than their model: with fewer heads, or fewer channels in their MLP.

use serde::{Deserialize, Serialize};
use tinyfusion_checkpoint::keep_groups;
use tinyfusion_core::{Error, GroupRows, Result, StateDict, WidthGroups, WidthPart};

use crate::{DiTConfig, SiTConfig};

/// Heads and hidden MLP channels of one block. Heads keep their size, and blocks what they read and write (the width D):
/// only what is between gets narrower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockWidth {
    /// Heads of the attention.
    pub heads: usize,
    /// Channels of the MLP's hidden layer.
    pub hidden: usize,
}

/// Checks `widths`, one for each block, against those of the dense blocks; `what` starts the error.
pub(crate) fn check_widths(what: &str, widths: &[BlockWidth], dense: &[BlockWidth]) -> Result<()> {
    let fail = |fault: String| Err(Error::usage(format!("{what}: {fault}")));
    if widths.len() != dense.len() {
        return fail(format!(
            "widths has {} entries for {} blocks; every block needs one",
            widths.len(),
            dense.len()
        ));
    }
    for (i, (width, dense)) in widths.iter().zip(dense).enumerate() {
        for (name, value, most) in [
            ("heads", width.heads, dense.heads),
            ("hidden", width.hidden, dense.hidden),
        ] {
            if !(1..=most).contains(&value) {
                return fail(format!(
                    "widths[{i}].{name} is {value}; it must be in 1..={most}, for a block can only be narrower than the \
                     dense model's"
                ));
            }
        }
    }
    Ok(())
}

/// Where the block whose tensors start with `prefix` can be narrowed: its heads of `head_size` values each, then its
/// hidden channels, under timm's names.
pub(crate) fn groups_of_block(
    block: usize,
    prefix: &str,
    width: BlockWidth,
    head_size: usize,
) -> [WidthGroups; 2] {
    let rows = |name: &str, axis: usize, parts: usize, size: usize| GroupRows {
        tensor: format!("{prefix}.{name}"),
        axis,
        parts,
        size,
    };
    [
        WidthGroups {
            block,
            part: WidthPart::Heads,
            count: width.heads,
            rows: vec![
                rows("attn.qkv.weight", 0, 3, head_size),  // (3·heads·E, D)
                rows("attn.qkv.bias", 0, 3, head_size),    // (3·heads·E,)
                rows("attn.proj.weight", 1, 1, head_size), // (D, heads·E)
            ],
        },
        WidthGroups {
            block,
            part: WidthPart::Hidden,
            count: width.hidden,
            rows: vec![
                rows("mlp.fc1.weight", 0, 1, 1), // (hidden, D)
                rows("mlp.fc1.bias", 0, 1, 1),   // (hidden,)
                rows("mlp.fc2.weight", 1, 1, 1), // (D, hidden)
            ],
        },
    ]
}

/// The widths of every block once only the groups `kept` are left, for groups in the order of [`groups_of_block`],
/// block by block.
fn widths_of_kept(kept: &[Vec<usize>]) -> Vec<BlockWidth> {
    let blocks = kept.chunks_exact(2);
    blocks
        .map(|kept| BlockWidth {
            heads: kept[0].len(),
            hidden: kept[1].len(),
        })
        .collect()
}

/// The weights with only the groups `kept`, and the widths of the blocks that are left.
pub(crate) fn narrow(
    weights: &StateDict,
    groups: &[WidthGroups],
    kept: &[Vec<usize>],
) -> Result<(Vec<BlockWidth>, StateDict)> {
    let weights = keep_groups(weights, groups, kept)?;
    Ok((widths_of_kept(kept), weights))
}

/// What a config says of blocks of these widths: nothing where they are the dense ones.
pub(crate) fn stated(widths: Vec<BlockWidth>, dense: &[BlockWidth]) -> Option<Vec<BlockWidth>> {
    Some(widths).filter(|widths| widths != dense)
}

impl DiTConfig {
    /// Values of a head; narrower blocks have fewer of them, not smaller ones.
    ///
    /// # Panics
    /// When `num_heads` is 0.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    pub(crate) fn dense_width(&self) -> BlockWidth {
        BlockWidth {
            heads: self.num_heads,
            hidden: self.mlp_hidden(),
        }
    }

    /// Heads and MLP channels of block `i`.
    pub fn block_width(&self, i: usize) -> BlockWidth {
        let stated = self.widths.as_ref().and_then(|widths| widths.get(i));
        stated.copied().unwrap_or_else(|| self.dense_width())
    }

    /// The same network with blocks of these widths, one entry for each.
    #[must_use]
    pub fn with_widths(&self, widths: Vec<BlockWidth>) -> Self {
        Self {
            widths: stated(widths, &vec![self.dense_width(); self.depth]),
            ..self.clone()
        }
    }

    /// Where the network can be narrowed: the heads and the hidden channels of block 0, then of block 1, …
    ///
    /// # Panics
    /// When `num_heads` is 0.
    pub fn width_groups(&self) -> Vec<WidthGroups> {
        let of_block = |i: usize| {
            let prefix = format!("blocks.{i}");
            groups_of_block(i, &prefix, self.block_width(i), self.head_size())
        };
        (0..self.depth).flat_map(of_block).collect()
    }

    /// The network with only the groups `kept` of each of its [`width_groups`](Self::width_groups): its sizes and its
    /// part of `weights`.
    pub fn narrow(&self, weights: &StateDict, kept: &[Vec<usize>]) -> Result<(Self, StateDict)> {
        let (widths, weights) = narrow(weights, &self.width_groups(), kept)?;
        Ok((self.with_widths(widths), weights))
    }

    /// Width of all heads of block `i` together, and of its MLP's hidden layer.
    pub(crate) fn inner(&self, i: usize) -> (usize, usize) {
        let BlockWidth { heads, hidden } = self.block_width(i);
        (heads * self.head_size(), hidden)
    }
}

impl SiTConfig {
    /// The sizes of the network cut to its blocks `kept`, each as wide as it was.
    #[must_use]
    pub fn with_blocks(&self, kept: &[usize]) -> Self {
        Self(self.0.with_blocks(kept))
    }

    /// As [`DiTConfig::width_groups`].
    ///
    /// # Panics
    /// When `num_heads` is 0.
    pub fn width_groups(&self) -> Vec<WidthGroups> {
        self.0.width_groups()
    }

    /// As [`DiTConfig::narrow`].
    pub fn narrow(&self, weights: &StateDict, kept: &[Vec<usize>]) -> Result<(Self, StateDict)> {
        let (config, weights) = self.0.narrow(weights, kept)?;
        Ok((Self(config), weights))
    }
}
