use serde::{Deserialize, Serialize};

/// A value that moves linearly from the first step to the last; constant if both ends are equal.
///
/// The reference has 4 → 0.1 for τ and 100 → 100 for the scale.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    /// Value at step 0.
    pub from: f64,
    /// Value at step `total − 1` and after.
    pub to: f64,
}

impl Linear {
    /// The same value at every step.
    pub fn constant(value: f64) -> Self {
        Self {
            from: value,
            to: value,
        }
    }

    /// The value at `step` (from 0) of `total` steps: from + (to − from)·step/(total − 1), as in the
    /// reference's training loop.
    pub fn at(&self, step: u64, total: u64) -> f64 {
        let last = total.saturating_sub(1);
        if step >= last && step > 0 {
            return self.to;
        }
        self.from + (self.to - self.from) * step as f64 / last.max(1) as f64
    }
}
