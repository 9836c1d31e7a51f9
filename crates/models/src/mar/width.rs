//! A MAR cut in width.

use tinyfusion_core::{Result, StateDict, WidthGroups};

use super::MarConfig;
use super::config::Stage;
use crate::width::{self, BlockWidth};

impl Stage {
    /// Values of a head.
    pub(super) fn head_size(&self) -> usize {
        self.width / self.heads
    }

    fn dense(&self) -> BlockWidth {
        BlockWidth {
            heads: self.heads,
            hidden: self.hidden,
        }
    }
}

impl MarConfig {
    /// The widths of all blocks were they dense, the encoder's first.
    pub(super) fn dense_widths(&self) -> Vec<BlockWidth> {
        let of_stage = |stage: Stage| vec![stage.dense(); stage.depth];
        [0, 1].map(|s| of_stage(self.stage(s))).concat()
    }

    /// Stage of block `i`, numbered over both stages, and its number within the stage.
    fn place(&self, i: usize) -> (Stage, usize) {
        match i.checked_sub(self.encoder_depth) {
            None => (self.stage(0), i),
            Some(i) => (self.stage(1), i),
        }
    }

    /// Heads and MLP channels of block `i`, numbered over both stages.
    pub fn block_width(&self, i: usize) -> BlockWidth {
        let stated = self.widths.as_ref().and_then(|widths| widths.get(i));
        stated.copied().unwrap_or_else(|| self.place(i).0.dense())
    }

    /// The same network with blocks of these widths, one entry for each.
    #[must_use]
    pub fn with_widths(&self, widths: Vec<BlockWidth>) -> Self {
        Self {
            widths: width::stated(widths, &self.dense_widths()),
            ..self.clone()
        }
    }

    /// Where the network can be narrowed: the heads and the hidden channels of every block, the encoder's first.
    ///
    /// # Panics
    /// When a stage has no heads.
    pub fn width_groups(&self) -> Vec<WidthGroups> {
        let of_block = |i: usize| {
            let (stage, within) = self.place(i);
            let prefix = format!("{}.{within}", stage.name);
            width::groups_of_block(i, &prefix, self.block_width(i), stage.head_size())
        };
        let depth = self.encoder_depth + self.decoder_depth;
        (0..depth).flat_map(of_block).collect()
    }

    /// The network with only the groups `kept` of each of its [`width_groups`](Self::width_groups): its sizes and its
    /// part of `weights`.
    pub fn narrow(&self, weights: &StateDict, kept: &[Vec<usize>]) -> Result<(Self, StateDict)> {
        let (widths, weights) = width::narrow(weights, &self.width_groups(), kept)?;
        Ok((self.with_widths(widths), weights))
    }
}
