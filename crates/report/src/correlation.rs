//! Rank correlation.

/// Spearman's rho, with mean ranks for ties; none for fewer than four points or constant data.
pub(crate) fn rank_correlation(points: &[(f64, f64)]) -> Option<f64> {
    if points.len() < 4 {
        return None;
    }
    let ranks = |values: Vec<f64>| -> Vec<f64> {
        let rank = |v: &f64| {
            let below = values.iter().filter(|w| *w < v).count() as f64;
            let equal = values.iter().filter(|w| *w == v).count() as f64;
            below + (equal - 1.0) / 2.0
        };
        values.iter().map(rank).collect()
    };
    let x = ranks(points.iter().map(|p| p.0).collect());
    let y = ranks(points.iter().map(|p| p.1).collect());
    let mean = (points.len() - 1) as f64 / 2.0;
    let product = |a: &[f64], b: &[f64]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - mean) * (b - mean))
            .sum::<f64>()
    };
    let norm = (product(&x, &x) * product(&y, &y)).sqrt();
    (norm > 0.0).then(|| product(&x, &y) / norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_correlation_is_spearmans() {
        let up: Vec<(f64, f64)> = (0..5).map(|i| (f64::from(i), f64::from(i * i))).collect();
        assert_eq!(rank_correlation(&up), Some(1.0));
        let down: Vec<(f64, f64)> = up.iter().map(|(x, y)| (*x, -y)).collect();
        assert_eq!(rank_correlation(&down), Some(-1.0));
        // By hand: ranks x 0..4, y 1,0,3,2: 1 - 6·4/(4·15) = 0.6.
        let mixed = [(0.0, 1.0), (1.0, 0.0), (2.0, 3.0), (3.0, 2.0)];
        assert!((rank_correlation(&mixed).unwrap() - 0.6).abs() < 1e-12);
        assert_eq!(rank_correlation(&[(0.0, 1.0); 5]), None);
        assert_eq!(rank_correlation(&up[..3]), None);
    }
}
