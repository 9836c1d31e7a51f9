use std::ops::Range;

/// How many blocks a stack has and where its stages meet.
///
/// DiT and SiT have one stage; MAR has two (encoder, decoder) with a bridge between them that no
/// group of an N:M pattern may cross.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockLayout {
    stages: Vec<usize>,
}

impl BlockLayout {
    /// One stage of `depth` blocks.
    pub fn single(depth: usize) -> Self {
        Self {
            stages: vec![depth],
        }
    }

    /// Several stages, for example `[16, 16]` for MAR-L.
    pub fn stages(stages: impl Into<Vec<usize>>) -> Self {
        Self {
            stages: stages.into(),
        }
    }

    /// Number of blocks over all stages.
    pub fn depth(&self) -> usize {
        self.stages.iter().sum()
    }

    /// Blocks per stage.
    pub fn stage_depths(&self) -> &[usize] {
        &self.stages
    }

    /// Global block indices of every stage, in order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.stages.iter().scan(0, |start, &n| {
            let range = *start..*start + n;
            *start += n;
            Some(range)
        })
    }
}
