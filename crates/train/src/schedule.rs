use serde::{Deserialize, Serialize};

/// A learning rate over the steps of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct LrSchedule {
    /// Right after the warm-up.
    pub peak: f64,
    /// At the last step of a half cosine from `peak`; equal to `peak` for a constant rate.
    pub last: f64,
    /// Steps over which the rate rises in a line: the first has `peak / warmup`, the last `peak`.
    pub warmup: u64,
}

impl LrSchedule {
    /// The same rate throughout.
    pub fn constant(lr: f64) -> Self {
        Self {
            peak: lr,
            last: lr,
            warmup: 0,
        }
    }

    /// The rate of step `step` (from 0) of `total`.
    pub fn at(&self, step: u64, total: u64) -> f64 {
        if step < self.warmup {
            return self.peak * ((step + 1) as f64 / self.warmup as f64);
        }
        let span = total.saturating_sub(self.warmup).saturating_sub(1).max(1);
        let done = ((step - self.warmup) as f64 / span as f64).min(1.0);
        self.last + (self.peak - self.last) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_then_falls_to_the_last_rate() {
        let lr = LrSchedule {
            peak: 1.0,
            last: 0.5,
            warmup: 4,
        };
        assert_eq!(lr.at(0, 100), 0.25);
        assert_eq!(lr.at(3, 100), 1.0);
        assert_eq!(lr.at(4, 100), 1.0);
        assert!((lr.at(99, 100) - 0.5).abs() < 1e-12);
        assert!((1..100).skip(4).all(|s| lr.at(s, 100) <= lr.at(s - 1, 100)));
        assert_eq!(LrSchedule::constant(0.1).at(7, 10), 0.1);
    }
}
