//! What must hold for any features.

use proptest::prelude::*;
use tinyfusion_fid::{
    Accumulator, FeatureMatrix, Gaussian, KidConfig, PrecisionRecallConfig, Splits, Statistics,
    frechet_distance, inception_score, kid, kid_of_subsets, precision_recall,
};

use crate::golden_file::{Matrix, all_close, close};

/// n × d values, among them duplicates, dead columns and an offset.
fn matrix(rows: std::ops::RangeInclusive<usize>, columns: usize) -> impl Strategy<Value = Matrix> {
    let value = prop_oneof![3 => -4.0f32..4.0, 1 => Just(0.0f32), 1 => Just(1.5f32)];
    (rows, any::<bool>(), any::<bool>()).prop_flat_map(move |(rows, dead, offset)| {
        proptest::collection::vec(value.clone(), rows * columns).prop_map(move |mut values| {
            for (i, value) in values.iter_mut().enumerate() {
                if dead && i % columns == 0 {
                    *value = 0.25;
                }
                if offset {
                    *value += 100.0;
                }
            }
            Matrix {
                values,
                rows,
                columns,
            }
        })
    })
}

/// Two sets of the same dimension, below and above it in size.
fn two() -> impl Strategy<Value = (Matrix, Matrix)> {
    (1usize..9).prop_flat_map(|d| (matrix(6..=24, d), matrix(6..=24, d)))
}

fn distance(a: &Matrix, b: &Matrix) -> f64 {
    let [a, b] = [a, b].map(|x| Gaussian::from_features(x.view()).unwrap());
    frechet_distance(&a, &b).unwrap().distance
}

fn reversed(x: &Matrix) -> Matrix {
    let values = x
        .values
        .chunks(x.columns)
        .rev()
        .flatten()
        .copied()
        .collect();
    Matrix { values, ..*x }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frechet_is_symmetric_and_not_negative((a, b) in two()) {
        let there = distance(&a, &b);
        close("symmetry", there, distance(&b, &a), 1e-12, 1e-10);
        prop_assert!(there > -1e-10, "{}", there);
    }

    #[test]
    fn frechet_of_a_set_with_itself_is_zero((a, _) in two()) {
        close("features", distance(&a, &a), 0.0, 0.0, 1e-10);
        let stored = Gaussian::from_statistics(&Statistics::of(a.view()).unwrap()).unwrap();
        close("statistics", frechet_distance(&stored, &stored).unwrap().distance, 0.0, 0.0, 1e-10);
    }

    /// Adding v to every row of one set adds |v|² when the means were equal.
    #[test]
    fn frechet_of_a_shifted_set_is_the_shift((a, _) in two(), shift in -8i8..8) {
        let shift = f32::from(shift) * 0.5;
        // Quantised, so that the shift is exact in f32.
        let a = Matrix { values: a.values.iter().map(|v| (v * 64.0).round() / 64.0).collect(), ..a };
        let b = Matrix { values: a.values.iter().map(|v| v + shift).collect(), ..a };
        let expected = a.columns as f64 * f64::from(shift * shift);
        close("shift", distance(&a, &b), expected, 1e-10, 1e-10);
    }

    /// Scaling both sets by s scales the distance by s².
    #[test]
    fn frechet_scales_with_the_square((a, b) in two(), power in -30i32..30) {
        let scale = 2.0f32.powi(power);
        let by = |x: &Matrix| Matrix { values: x.values.iter().map(|v| v * scale).collect(), ..*x };
        let square = f64::from(scale) * f64::from(scale);
        close("scale", distance(&by(&a), &by(&b)) / square, distance(&a, &b), 1e-10, 1e-10);
    }

    #[test]
    fn frechet_agrees_between_features_and_statistics((a, b) in two()) {
        let [first, second] = [&a, &b].map(|x| {
            Gaussian::from_statistics(&Statistics::of(x.view()).unwrap()).unwrap()
        });
        let stored = frechet_distance(&first, &second).unwrap().distance;
        // A covariance has lost what lies below 1e-16 of its largest entry; its root is 1e-8.
        close("paths", stored, distance(&a, &b), 1e-6, 1e-6);
    }

    #[test]
    fn order_of_rows_does_not_matter((a, b) in two()) {
        let (ra, rb) = (reversed(&a), reversed(&b));
        close("frechet", distance(&ra, &rb), distance(&a, &b), 1e-10, 1e-10);
        let config = PrecisionRecallConfig::default();
        let found = precision_recall(a.view(), b.view(), &config).unwrap();
        let other = precision_recall(ra.view(), rb.view(), &config).unwrap();
        prop_assert_eq!((found.precision, found.recall), (other.precision, other.recall));
        let score = inception_score(a.view(), &Splits::ADM).unwrap().mean;
        close("inception score", inception_score(ra.view(), &Splits::ADM).unwrap().mean, score, 1e-12, 0.0);
    }

    #[test]
    fn shards_make_the_whole((a, _) in two(), cut in 0.0f64..1.0, other in 0.0f64..1.0) {
        let whole = Statistics::of(a.view()).unwrap();
        let mut cuts = [cut, other].map(|cut| (cut * a.rows as f64) as usize);
        cuts.sort_unstable();
        let mut merged = Accumulator::new(a.columns).unwrap();
        // Three shards, some of them empty, the later ones merged before they join.
        let shard = |from: usize, to: usize| {
            let mut sums = Accumulator::new(a.columns).unwrap();
            if to > from {
                let values = &a.values[from * a.columns..to * a.columns];
                sums.push(FeatureMatrix::new(values, to - from, a.columns).unwrap()).unwrap();
            }
            sums
        };
        let mut later = shard(cuts[0], cuts[1]);
        later.merge(&shard(cuts[1], a.rows)).unwrap();
        merged.merge(&shard(0, cuts[0])).unwrap();
        merged.merge(&later).unwrap();
        let merged = merged.finish().unwrap();
        prop_assert_eq!(merged.n(), whole.n());
        all_close("mean", merged.mean(), whole.mean(), 1e-12);
        // The offset of 100 enters the scatter squared, so the rounding of the merge does too.
        let largest = whole.mean().iter().fold(1.0f64, |m, v| m.max(v.abs()));
        for (&found, &expected) in merged.covariance().iter().zip(whole.covariance()) {
            close("covariance", found, expected, 1e-12, 1e-14 * largest * largest);
        }
        // Finished statistics merge too, where each side has a covariance.
        let half = a.rows / 2;
        let [first, second] = [(0, half), (half, a.rows)].map(|(from, to)| shard(from, to).finish().unwrap());
        all_close("merged mean", first.merge(&second).unwrap().mean(), whole.mean(), 1e-12);
    }

    /// Each row is within the radius of its own copy.
    #[test]
    fn a_set_covers_itself((a, _) in two(), block in 1usize..9) {
        let config = PrecisionRecallConfig { neighbour: 3, block };
        let found = precision_recall(a.view(), a.view(), &config).unwrap();
        prop_assert_eq!((found.precision, found.recall), (1.0, 1.0));
        prop_assert_eq!(found.reference_radii_squared, found.sample_radii_squared);
    }

    /// By the definition, with the whole matrix of exact differences.
    #[test]
    fn precision_recall_is_its_definition((a, b) in two(), neighbour in 1usize..5, block in 1usize..9) {
        let exact = |x: &[f32], y: &[f32]| -> f64 {
            x.iter().zip(y).map(|(&u, &v)| (f64::from(u) - f64::from(v)).powi(2)).sum()
        };
        let radii = |x: &Matrix| -> Vec<f64> {
            x.view().iter().map(|u| {
                let mut row: Vec<f64> = x.view().iter().map(|v| exact(u, v)).collect();
                row.sort_by(f64::total_cmp);
                row[neighbour]
            }).collect()
        };
        let covered = |x: &Matrix, by: &Matrix, radii: &[f64]| -> Vec<bool> {
            x.view().iter().map(|u| {
                by.view().iter().zip(radii).any(|(v, &radius)| exact(u, v) <= radius)
            }).collect()
        };
        let config = PrecisionRecallConfig { neighbour, block };
        let found = precision_recall(a.view(), b.view(), &config).unwrap();
        prop_assert_eq!(&found.reference_radii_squared, &radii(&a));
        prop_assert_eq!(&found.sample_radii_squared, &radii(&b));
        prop_assert_eq!(found.sample_covered, covered(&b, &a, &radii(&a)));
        prop_assert_eq!(found.reference_covered, covered(&a, &b, &radii(&b)));
    }

    #[test]
    fn precision_and_recall_swap_with_the_sides((a, b) in two()) {
        let config = PrecisionRecallConfig::default();
        let there = precision_recall(a.view(), b.view(), &config).unwrap();
        let back = precision_recall(b.view(), a.view(), &config).unwrap();
        prop_assert_eq!((there.precision, there.recall), (back.recall, back.precision));
    }

    /// Between 1 and the number of classes, and unmoved by a constant added to a row.
    #[test]
    fn inception_score_is_bounded((a, _) in two(), shift in -64i8..64) {
        let found = inception_score(a.view(), &Splits::Adm { size: 5 }).unwrap();
        for &score in &found.scores {
            prop_assert!(score > 1.0 - 1e-12 && score < a.columns as f64 + 1e-9, "{}", score);
        }
        let a = Matrix { values: a.values.iter().map(|v| (v * 64.0).round() / 64.0).collect(), ..a };
        let shifted = Matrix { values: a.values.iter().map(|v| v + f32::from(shift)).collect(), ..a };
        close(
            "shift",
            inception_score(shifted.view(), &Splits::ADM).unwrap().mean,
            inception_score(a.view(), &Splits::ADM).unwrap().mean,
            1e-12,
            0.0,
        );
    }

    #[test]
    fn kid_is_deterministic_and_follows_its_definition((a, b) in two(), seed in any::<u32>()) {
        let config = KidConfig { subsets: 3, subset_size: 5, seed };
        let found = kid(a.view(), b.view(), &config).unwrap();
        prop_assert_eq!(&found, &kid(a.view(), b.view(), &config).unwrap());

        let rows = vec![vec![0, 2, 4]];
        let others = vec![vec![1, 3, 5]];
        let kernel = |x: &Matrix, i: usize, y: &Matrix, j: usize| -> f64 {
            let dot: f64 = x.view().row(i).iter().zip(y.view().row(j))
                .map(|(&u, &v)| f64::from(u) * f64::from(v)).sum();
            (dot / x.columns as f64 + 1.0).powi(3)
        };
        let (mut within, mut between, mut size) = (0.0, 0.0, 0.0f64);
        for i in 0..3 {
            for j in 0..3 {
                if i != j {
                    within += kernel(&a, rows[0][i], &a, rows[0][j]) / 6.0;
                    within += kernel(&b, others[0][i], &b, others[0][j]) / 6.0;
                }
                let cross = kernel(&a, rows[0][i], &b, others[0][j]);
                between += 2.0 * cross / 9.0;
                size = size.max(cross.abs());
            }
        }
        let found = kid_of_subsets(a.view(), b.view(), &rows, &others).unwrap();
        close("mmd", found.mean, within - between, 0.0, 1e-12 * (size + within.abs()));
        prop_assert_eq!(found.std, None);
    }

    #[test]
    fn statistics_survive_serde((a, _) in two()) {
        let statistics = Statistics::of(a.view()).unwrap();
        let read: Statistics = serde_json::from_str(&serde_json::to_string(&statistics).unwrap()).unwrap();
        prop_assert_eq!(read.n(), statistics.n());
        all_close("mean", read.mean(), statistics.mean(), 1e-15);
        all_close("covariance", read.covariance(), statistics.covariance(), 1e-15);
    }
}

/// Rows that differ by far less than the rounding of |u|² − 2uv + |v|² are still told apart.
#[test]
fn near_duplicates_are_told_apart() {
    // Far from the origin, in numbers whose products f64 must round; only the first column differs,
    // by steps that vanish in |u|² ≈ 5e10.
    let columns = 256;
    let at_steps = |steps: std::ops::Range<usize>| Matrix {
        rows: steps.len(),
        columns,
        values: steps
            .flat_map(|step| {
                (0..columns).map(move |column| match column {
                    0 => step as f32 / 1_048_576.0,
                    _ => 16_000.0 / (1.0 + 0.001 * column as f32),
                })
            })
            .collect(),
    };
    let (reference, samples) = (at_steps(0..40), at_steps(42..46));
    let found = precision_recall(
        reference.view(),
        samples.view(),
        &PrecisionRecallConfig::default(),
    )
    .unwrap();
    let squares =
        |steps: &[f64]| -> Vec<f64> { steps.iter().map(|s| (s / 1_048_576.0).powi(2)).collect() };
    let mut inner = vec![2.0; 40];
    (inner[0], inner[39]) = (3.0, 3.0);
    assert_eq!(found.reference_radii_squared, squares(&inner));
    assert_eq!(found.sample_radii_squared, squares(&[3.0, 2.0, 2.0, 3.0]));
    // Only the last reference row and the first sample reach each other, each exactly on the border.
    assert_eq!((found.precision, found.recall), (1.0 / 4.0, 1.0 / 40.0));
}

/// Every row the same: radii are exactly 0 and nothing is divided by them.
#[test]
fn collapsed_samples() {
    let reference = Matrix {
        values: (0..60).map(|i| (i % 7) as f32).collect(),
        rows: 20,
        columns: 3,
    };
    let samples = Matrix {
        values: [0.1, 0.7, 0.3].repeat(30),
        rows: 30,
        columns: 3,
    };
    let found = precision_recall(
        reference.view(),
        samples.view(),
        &PrecisionRecallConfig::default(),
    )
    .unwrap();
    assert_eq!(found.sample_radii_squared, vec![0.0; 30]);
    assert_eq!(found.recall, 0.0);
    assert!(distance(&reference, &samples).is_finite());
    close(
        "collapsed with itself",
        distance(&samples, &samples),
        0.0,
        0.0,
        0.0,
    );
    assert_eq!(
        inception_score(samples.view(), &Splits::ADM)
            .unwrap()
            .mean
            .round(),
        1.0
    );
}

/// Matrices large enough that products and decompositions are divided among the threads: last digits may differ, 1e-10
/// (relative) must not.
#[test]
fn threads_change_the_distance_in_its_last_digits_at_most() {
    let set = |rows: usize, seed: usize| {
        let columns = 384;
        let value = |i: usize| {
            let mixed = (i + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            (mixed >> 40) as f32 / 16_777_216.0 + 0.1 * (i % columns % 7) as f32
        };
        Matrix {
            values: (0..rows * columns).map(value).collect(),
            rows,
            columns,
        }
    };
    // More rows than columns, and fewer.
    for (a, b) in [
        (set(1500, 1), set(1100, 7_000_003)),
        (set(300, 1), set(250, 9)),
    ] {
        let judged = || {
            let stored = [&a, &b]
                .map(|x| Gaussian::from_statistics(&Statistics::of(x.view()).unwrap()).unwrap());
            let config = KidConfig {
                subsets: 7,
                subset_size: 200,
                seed: 1,
            };
            let found = precision_recall(a.view(), b.view(), &PrecisionRecallConfig::default());
            let found = found.unwrap();
            [
                distance(&a, &b),
                frechet_distance(&stored[0], &stored[1]).unwrap().distance,
                kid(a.view(), b.view(), &config).unwrap().mean,
                inception_score(a.view(), &Splits::FIDELITY).unwrap().mean,
                found.precision,
                found.recall,
            ]
        };
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(judged)
        };
        let one = with(1);
        for threads in [2, 3] {
            for (metric, (found, expected)) in with(threads).into_iter().zip(one).enumerate() {
                let what = format!("metric {metric} of {} rows, {threads} threads", a.rows);
                close(&what, found, expected, 1e-10, 0.0);
            }
        }
    }
}
