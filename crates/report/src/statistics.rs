//! Few numbers per method: mean and spread, the paired t-test, and a correction for many tests.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// Mean and standard deviation of a sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moments {
    /// Numbers.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Standard deviation with n − 1 in the denominator; none for a single number.
    pub deviation: Option<f64>,
}

impl Moments {
    /// Of at least one number.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        Some(Self {
            n,
            mean,
            deviation: (n > 1).then(|| (squares / (n - 1) as f64).sqrt()),
        })
    }
}

impl Moments {
    /// One deviation below and above the mean; the mean itself for a single number.
    pub fn ends(&self) -> [f64; 2] {
        let deviation = self.deviation.unwrap_or(0.0);
        [self.mean - deviation, self.mean + deviation]
    }
}

/// A paired t-test (Student 1908), two-sided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Paired {
    /// Pairs.
    pub n: usize,
    /// Mean of a − b.
    pub difference: f64,
    /// The 95 % confidence interval of the mean difference.
    pub interval: (f64, f64),
    /// How often chance alone makes a difference at least as large.
    pub p: f64,
}

impl Paired {
    /// Of pairs (a, b).
    ///
    /// t = d̄ / (s / √n) with n − 1 degrees of freedom, where s is the standard deviation of the differences. None for
    /// fewer than two pairs, and where the differences do not vary: then there is no noise to measure them by.
    pub fn of(pairs: &[(f64, f64)]) -> Option<Self> {
        let differences: Vec<f64> = pairs.iter().map(|(a, b)| a - b).collect();
        let Moments { n, mean, deviation } = Moments::of(&differences)?;
        let largest = pairs
            .iter()
            .fold(0.0f64, |m, (a, b)| m.max(a.abs()).max(b.abs()));
        // What is left of equal differences after rounding is no noise either.
        let deviation = deviation.filter(|s| s.is_finite() && *s > 1e-12 * largest)?;
        let error = deviation / (n as f64).sqrt();
        let t = StudentsT::new(0.0, 1.0, (n - 1) as f64).ok()?;
        let half = t.inverse_cdf(0.975) * error;
        Some(Self {
            n,
            difference: mean,
            interval: (mean - half, mean + half),
            p: 2.0 * t.sf((mean / error).abs()),
        })
    }
}

/// The p values of a family of tests, corrected by Holm's step-down method (1979): below α with probability at most α if
/// there is nothing in any of them. In the order given.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let (mut corrected, mut least) = (vec![0.0; p.len()], 0.0f64);
    for (rank, &i) in order.iter().enumerate() {
        least = least.max(p[i] * (p.len() - rank) as f64).min(1.0);
        corrected[i] = least;
    }
    corrected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deviation_has_n_less_one_below() {
        let m = Moments::of(&[2.0, 4.0, 9.0]).unwrap();
        // By hand: mean 5, squares 9 + 1 + 16 = 26, 26 / 2 = 13.
        assert_eq!((m.n, m.mean, m.deviation), (3, 5.0, Some(13f64.sqrt())));
        assert_eq!(Moments::of(&[7.0]).unwrap().deviation, None);
        assert_eq!(Moments::of(&[]), None);
    }

    /// Two-sided 5 % points of Student's t, from published tables (for example NIST/SEMATECH, section 1.3.6.7.2).
    const POINTS: [(usize, f64); 6] = [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (9, 2.262),
        (29, 2.045),
    ];

    #[test]
    fn the_interval_and_p_follow_the_published_quantiles() {
        for (degrees, point) in POINTS {
            // Differences with mean 0 and known deviation: half of them +1, half −1 (and a 0 if odd).
            let n = degrees + 1;
            let zero_mean: Vec<f64> = (0..n)
                .map(|i| match i {
                    i if i + 1 == n && n % 2 == 1 => 0.0,
                    i if i % 2 == 0 => 1.0,
                    _ => -1.0,
                })
                .collect();
            let error = Moments::of(&zero_mean).unwrap().deviation.unwrap() / (n as f64).sqrt();
            // Shifted by `point` standard errors, p is 5 % and the interval ends at 0.
            let shift = point * error;
            let pairs: Vec<_> = zero_mean.iter().map(|d| (d + shift, 0.0)).collect();
            let test = Paired::of(&pairs).unwrap();
            assert!((test.difference - shift).abs() < 1e-12);
            // The tables round the points to three digits: half a unit moves p by at most 2 · density · 0.0005.
            assert!((test.p - 0.05).abs() < 6e-5, "{degrees}: {test:?}");
            assert!(test.interval.0.abs() < 6e-4 * error, "{degrees}: {test:?}");
            assert!((test.interval.1 - 2.0 * shift).abs() < 6e-4 * error);
        }
    }

    #[test]
    fn a_test_with_three_seeds_by_hand() {
        // Differences −2, −3, −4: mean −3, deviation 1, t = −3√3 with 2 degrees of freedom, where the distribution has
        // a closed form: p = 1 − |t| / √(2 + t²).
        let test = Paired::of(&[(8.0, 10.0), (9.0, 12.0), (10.0, 14.0)]).unwrap();
        let t = 27f64.sqrt();
        assert!((test.p - (1.0 - t / (2.0 + t * t).sqrt())).abs() < 1e-9);
        let half = 4.302_652_729_9 / 3f64.sqrt();
        assert!((test.interval.0 + 3.0 + half).abs() < 1e-8);
        assert!((test.interval.1 + 3.0 - half).abs() < 1e-8);
        // Swapped, the sign changes and nothing else.
        let other = Paired::of(&[(10.0, 8.0), (12.0, 9.0), (14.0, 10.0)]).unwrap();
        assert_eq!((other.difference, other.p), (3.0, test.p));
    }

    #[test]
    fn without_noise_there_is_no_test() {
        assert_eq!(Paired::of(&[(1.0, 2.0)]), None);
        assert_eq!(Paired::of(&[(1.0, 2.0), (3.0, 4.0)]), None);
        assert_eq!(Paired::of(&[(0.1, 0.3), (0.2, 0.4), (0.3, 0.5)]), None);
        assert_eq!(Paired::of(&[]), None);
    }

    #[test]
    fn holm_steps_down() {
        // By hand: sorted 0.01, 0.02, 0.04 times 3, 2, 1, never falling.
        let found = holm(&[0.04, 0.01, 0.02]);
        for (a, b) in found.iter().zip([0.04, 0.03, 0.04]) {
            assert!((a - b).abs() < 1e-15, "{found:?}");
        }
        assert_eq!(holm(&[0.6, 0.7]), [1.0, 1.0]);
        assert!(holm(&[]).is_empty());
    }
}
