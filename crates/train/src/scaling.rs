/// How a learning rate that was found at one batch size is carried to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LrScaling {
    /// The same rate at every batch size.
    Constant,
    /// By the root of the batch size: the rule for Adam, whose steps are as long as the rate whatever the gradient's
    /// length, so that its noise has to be scaled (Malladi et al. 2022, arXiv 2205.10287).
    Sqrt,
    /// By the batch size: the rule for SGD (Goyal et al. 2017, arXiv 1706.02677).
    Linear,
}

impl LrScaling {
    /// The factor on a rate that was found at `reference` samples per step, for `batch` samples per step.
    pub fn factor(self, batch: usize, reference: usize) -> f64 {
        let times = batch as f64 / reference as f64;
        match self {
            Self::Constant => 1.0,
            Self::Sqrt => times.sqrt(),
            Self::Linear => times,
        }
    }
}

/// The decay per step of an average that has forgotten half of what it held after `half_life` more samples, at `batch`
/// samples per step: ½^(batch / half-life).
///
/// A decay that is fixed per step remembers more samples at a larger batch; scaled so, decay^(batch ratio), the average
/// is the same at every batch size (Busbridge et al. 2023, arXiv 2307.13813; the half-life as EDM states it, Karras et
/// al. 2022).
pub fn ema_decay(half_life: f64, batch: usize) -> f64 {
    0.5f64.powf(batch as f64 / half_life)
}

/// The decay of the average at a step, given that of a long run and the updates before it: the half-life is at most
/// `rampup` times what was seen so far, so that the average lets go of the weights it started from (EDM's ramp-up,
/// Karras et al. 2022). Without a ramp-up it is `decay`; at the first update of a ramp-up it is 0.
pub(crate) fn ramped(decay: f64, rampup: Option<f64>, updates_before: u64) -> f64 {
    match rampup {
        None => decay,
        // A half-life of h updates is a decay of ½^(1/h); the shorter half-life is the smaller decay.
        Some(share) => decay.min(0.5f64.powf(1.0 / (share * updates_before as f64))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_life_in_samples_is_the_same_at_every_batch_size() {
        for batch in [1usize, 16, 64, 256] {
            // After 1024 samples, whatever they come in, half is left.
            let left = ema_decay(1024.0, batch).powf(1024.0 / batch as f64);
            assert!((left - 0.5).abs() < 1e-12, "batch {batch}: {left}");
        }
        // Four times the batch: the fourth power of the decay.
        let (small, large) = (ema_decay(4096.0, 64), ema_decay(4096.0, 256));
        assert!((small.powi(4) - large).abs() < 1e-15);
        assert!((ema_decay(64.0, 64) - 0.5).abs() < 1e-15);
    }

    #[test]
    fn a_ramp_up_forgets_the_start_and_then_leaves_the_decay_alone() {
        assert_eq!(ramped(0.999, None, 0), 0.999);
        assert_eq!(ramped(0.999, Some(0.05), 0), 0.0, "nothing to remember yet");
        // After 100 updates a half-life of five.
        assert!((ramped(0.999, Some(0.05), 100) - 0.5f64.powf(0.2)).abs() < 1e-15);
        // ln ½ / ln 0.999 = 692.8 updates of half-life: reached after 13,856.
        assert!(ramped(0.999, Some(0.05), 13_800) < 0.999);
        assert_eq!(ramped(0.999, Some(0.05), 13_900), 0.999);
        // What is left of the start is nothing, where a fixed decay of 0.99 over 60 steps leaves more than half.
        let left: f64 = (0..60).map(|u| ramped(0.99, Some(0.05), u)).product();
        assert_eq!(left, 0.0);
        assert!(0.99f64.powi(60) > 0.54);
    }

    #[test]
    fn rates_are_scaled_by_the_rule() {
        for (rule, want) in [
            (LrScaling::Constant, 1.0),
            (LrScaling::Sqrt, 4.0),
            (LrScaling::Linear, 16.0),
        ] {
            assert_eq!(rule.factor(256, 16), want);
            assert!((rule.factor(16, 256) - 1.0 / want).abs() < 1e-15);
            assert_eq!(rule.factor(16, 16), 1.0);
        }
    }
}
