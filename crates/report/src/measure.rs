//! The measured columns of a row.

use crate::results::ResultRow;
use crate::statistics::Moments;
use crate::svg::short;

/// A number that rows are measured by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// [`ResultRow::calibration_loss`]
    CalibrationLoss,
    /// [`ResultRow::held_out_loss`]
    HeldOutLoss,
    /// [`ResultRow::fid`]
    Fid,
    /// [`ResultRow::sfid`]
    Sfid,
    /// [`ResultRow::inception_score`]
    InceptionScore,
    /// [`ResultRow::precision`]
    Precision,
    /// [`ResultRow::recall`]
    Recall,
    /// [`ResultRow::kid`]
    Kid,
    /// [`ResultRow::accuracy`]
    Accuracy,
    /// [`ResultRow::images_per_second`]
    Speed,
}

impl Measure {
    /// In the order of the tables.
    pub const ALL: [Self; 10] = [
        Self::CalibrationLoss,
        Self::HeldOutLoss,
        Self::Fid,
        Self::Sfid,
        Self::InceptionScore,
        Self::Precision,
        Self::Recall,
        Self::Kid,
        Self::Accuracy,
        Self::Speed,
    ];

    /// The column's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::CalibrationLoss => "calibration loss",
            Self::HeldOutLoss => "held-out loss",
            Self::Fid => "FID",
            Self::Sfid => "sFID",
            Self::InceptionScore => "IS",
            Self::Precision => "P",
            Self::Recall => "R",
            Self::Kid => "KID",
            Self::Accuracy => "accuracy",
            Self::Speed => "images/s",
        }
    }

    /// Whether a lower number is the better one.
    pub fn lower_is_better(self) -> bool {
        matches!(
            self,
            Self::CalibrationLoss | Self::HeldOutLoss | Self::Fid | Self::Sfid | Self::Kid
        )
    }

    /// The row's number: none where it was not measured, is not finite, or scores what a diverged model drew.
    pub fn of(self, row: &ResultRow) -> Option<f64> {
        let sound = !row.diverged();
        let value = match self {
            Self::CalibrationLoss => row.calibration_loss,
            Self::HeldOutLoss => row.held_out_loss,
            Self::Fid => row.fid.filter(|_| sound),
            Self::Sfid => row.sfid.filter(|_| sound),
            Self::InceptionScore => row.inception_score.filter(|_| sound),
            Self::Precision => row.precision.filter(|_| sound),
            Self::Recall => row.recall.filter(|_| sound),
            Self::Kid => row.kid.filter(|_| sound),
            Self::Accuracy => row.accuracy.filter(|_| sound),
            Self::Speed => row.images_per_second,
        };
        value.filter(|v| v.is_finite())
    }

    /// Over the rows that have it.
    pub fn over<'a>(self, rows: impl IntoIterator<Item = &'a ResultRow>) -> Option<Moments> {
        let values: Vec<f64> = rows.into_iter().filter_map(|r| self.of(r)).collect();
        Moments::of(&values)
    }
}

/// `26.1 ± 1.2`: the deviation to two significant digits, and the mean as far; without a deviation as [`short`].
pub fn plus_minus(m: Moments) -> String {
    let Some(deviation) = m.deviation.filter(|d| d.is_finite()) else {
        return short(m.mean);
    };
    // What is left of equal numbers is rounding.
    if deviation <= 1e-12 * m.mean.abs() {
        return format!("{} ± 0", short(m.mean));
    }
    let digits = (1 - deviation.log10().floor() as i32).clamp(0, 12) as usize;
    format!("{:.digits$} ± {deviation:.digits$}", m.mean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deviation_sets_the_digits() {
        let of = |mean, deviation| {
            plus_minus(Moments {
                n: 3,
                mean,
                deviation,
            })
        };
        assert_eq!(of(26.123, Some(1.234)), "26.1 ± 1.2");
        assert_eq!(of(0.8, Some(1.3e-16)), "0.8 ± 0");
        assert_eq!(of(0.0, Some(0.0)), "0 ± 0");
        assert_eq!(of(0.037_123, Some(0.000_456)), "0.03712 ± 0.00046");
        assert_eq!(of(1234.5, Some(150.0)), "1234 ± 150");
        assert_eq!(of(2.5, Some(0.0)), "2.5 ± 0");
        assert_eq!(of(2.5, None), "2.5");
    }

    #[test]
    fn a_diverged_model_has_no_scores() {
        let mut rows = crate::sample::results().rows;
        let row = &mut rows[2];
        assert_eq!(Measure::Fid.of(row), Some(28.0));
        row.held_out_loss = None;
        assert!(row.diverged());
        assert_eq!(Measure::Fid.of(row), None);
        assert_eq!(Measure::Speed.of(row), Some(38.0));
    }
}
