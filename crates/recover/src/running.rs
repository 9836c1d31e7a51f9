use tinyfusion_core::{Error, Result};

use crate::LossEstimate;

/// Mean and sum of squares of values that come one by one (Welford 1962), in f64.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Running {
    count: u64,
    mean: f64,
    squares: f64,
}

impl Running {
    pub(crate) fn push(&mut self, value: f64) {
        self.count += 1;
        let off = value - self.mean;
        self.mean += off / self.count as f64;
        self.squares += off * (value - self.mean);
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn mean(&self) -> f64 {
        self.mean
    }

    /// σ/√n with n − 1 in σ; NaN for fewer than two values.
    pub(crate) fn standard_error(&self) -> f64 {
        if self.count < 2 {
            return f64::NAN;
        }
        let variance = self.squares / (self.count - 1) as f64;
        (variance / self.count as f64).sqrt()
    }

    /// The same as a loss over samples; an error for fewer than two.
    pub(crate) fn estimate(&self, what: &str) -> Result<LossEstimate> {
        if self.count < 2 {
            return Err(Error::usage(format!(
                "{what} needs at least 2 samples, found {}",
                self.count
            )));
        }
        Ok(LossEstimate {
            loss: self.mean,
            standard_error: self.standard_error(),
            images: self.count,
        })
    }
}

impl Extend<f64> for Running {
    fn extend<I: IntoIterator<Item = f64>>(&mut self, values: I) {
        values.into_iter().for_each(|value| self.push(value));
    }
}
