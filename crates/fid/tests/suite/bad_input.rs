//! Bad input gets an error that says what was expected, what was found and what to do.

use tinyfusion_fid::{
    Accumulator, Config, Error, FeatureMatrix, Gaussian, Given, KidConfig, PrecisionRecallConfig,
    Splits, Statistics, evaluate, frechet_distance, inception_score, kid, kid_of_subsets,
    kid_subsets, precision_recall,
};

fn features(values: &[f32], columns: usize) -> FeatureMatrix<'_> {
    FeatureMatrix::new(values, values.len() / columns, columns).unwrap()
}

const VALUES: [f32; 12] = [0.0, 1.0, 2.0, 5.0, 4.0, 3.0, 7.0, 8.0, 9.0, 1.0, 0.5, 0.25];

#[track_caller]
fn says<T: std::fmt::Debug>(result: Result<T, Error>, words: &[&str]) {
    let message = result.unwrap_err().to_string();
    for word in words {
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
}

#[test]
fn matrices() {
    says(FeatureMatrix::new(&[], 0, 4), &["0 x 4"]);
    says(FeatureMatrix::new(&[], 4, 0), &["4 x 0"]);
    says(
        FeatureMatrix::new(&[1.0; 5], 2, 3),
        &["2 rows", "3 columns", "found 5"],
    );
    says(FeatureMatrix::new(&[1.0; 4], usize::MAX, 2), &["found 4"]);
    says(
        FeatureMatrix::new(&[0.0, 1.0, 2.0, f32::NAN], 2, 2),
        &["row 1", "column 1", "NaN"],
    );
    says(
        FeatureMatrix::new(&[0.0, f32::NEG_INFINITY], 1, 2),
        &["row 0", "column 1", "-inf"],
    );
}

#[test]
fn dimensions() {
    let (three, four) = (features(&VALUES, 3), features(&VALUES, 4));
    let words = &["feature dimensions", "3", "4"];
    let [a, b] = [three, four].map(|x| Gaussian::from_features(x).unwrap());
    says(frechet_distance(&a, &b), words);
    says(
        precision_recall(
            three,
            four,
            &PrecisionRecallConfig {
                neighbour: 1,
                block: 8,
            },
        ),
        words,
    );
    says(
        kid(
            three,
            four,
            &KidConfig {
                subset_size: 2,
                ..KidConfig::default()
            },
        ),
        words,
    );
    let mut sums = Accumulator::new(3).unwrap();
    says(sums.push(four), words);
    says(sums.merge(&Accumulator::new(4).unwrap()), words);
    says(Accumulator::new(0), &["x 0"]);
    let logits = features(&VALUES[..6], 2);
    says(
        evaluate(three, three, Some(logits), &Config::default()),
        &["logits", "4", "3"],
    );
    let statistics = Statistics::of(three).unwrap();
    let both = Given::Both {
        statistics: &statistics,
        features: four,
    };
    says(
        evaluate(both, three, None, &Config::default()),
        &["feature dimensions", "4", "3"],
    );
}

#[test]
fn too_few_rows() {
    let one = features(&VALUES, 12);
    says(Gaussian::from_features(one), &["at least 2", "found 1"]);
    says(Statistics::of(one), &["at least 2", "found 1"]);
    says(
        Accumulator::new(3).unwrap().finish(),
        &["at least 2", "found 0"],
    );
    let four = features(&VALUES, 3);
    let config = PrecisionRecallConfig {
        neighbour: 4,
        block: 8,
    };
    says(
        precision_recall(four, four, &config),
        &["at least 5", "found 4"],
    );
    says(
        kid(four, four, &KidConfig::default()),
        &["at least 1000", "found 4"],
    );
    says(
        inception_score(four, &Splits::FIDELITY),
        &["at least 10", "found 4"],
    );
}

#[test]
fn settings() {
    let x = features(&VALUES, 3);
    says(
        inception_score(x, &Splits::Adm { size: 0 }),
        &["split size", "5000"],
    );
    says(
        inception_score(
            x,
            &Splits::Fidelity {
                count: 0,
                shuffle_seed: None,
            },
        ),
        &["0 splits"],
    );
    says(
        precision_recall(
            x,
            x,
            &PrecisionRecallConfig {
                neighbour: 0,
                block: 8,
            },
        ),
        &["found 0 and 8"],
    );
    says(
        precision_recall(
            x,
            x,
            &PrecisionRecallConfig {
                neighbour: 1,
                block: 0,
            },
        ),
        &["found 1 and 0"],
    );
    says(
        kid_subsets(
            4,
            4,
            &KidConfig {
                subsets: 0,
                ..KidConfig::default()
            },
        ),
        &["found 0 of"],
    );
    says(
        kid_subsets(
            4,
            4,
            &KidConfig {
                subset_size: 1,
                ..KidConfig::default()
            },
        ),
        &["of 1"],
    );
    says(kid_of_subsets(x, x, &[vec![0, 1]], &[]), &["found 1 and 0"]);
    says(kid_of_subsets(x, x, &[], &[]), &["at least 1"]);
    says(
        kid_of_subsets(x, x, &[vec![0, 1]], &[vec![0]]),
        &["found 2 and 1"],
    );
    says(
        kid_of_subsets(x, x, &[vec![0, 1]], &[vec![0, 4]]),
        &["row 4", "4 rows"],
    );
    assert!(serde_json::from_str::<Config>(r#"{"presicion_recall": null}"#).is_err());
    assert_eq!(
        serde_json::from_str::<Config>("{}").unwrap(),
        Config::default()
    );
}

#[test]
fn statistics() {
    let make = |mean: &[f64], covariance: &[f64]| {
        Statistics::from_parts(None, mean.to_vec(), covariance.to_vec())
    };
    says(make(&[], &[]), &["mean is empty"]);
    says(make(&[0.0; 2], &[1.0; 3]), &["2 x 2", "it has 3"]);
    says(make(&[0.0, f64::NAN], &[1.0; 4]), &["mean[1]", "NaN"]);
    says(
        make(&[0.0; 2], &[1.0, 0.0, f64::INFINITY, 1.0]),
        &["covariance[1, 0]", "inf"],
    );
    says(
        make(&[0.0; 2], &[1.0, 0.1, 0.2, 1.0]),
        &["not symmetric", "[1, 0]"],
    );
    says(
        make(&[0.0; 2], &[1.0, 0.0, 0.0, -0.5]),
        &["[1, 1]", "not negative"],
    );
    says(
        Statistics::from_parts(Some(1), vec![0.0], vec![1.0]),
        &["n is 1"],
    );
    // f32 rounding passes and is averaged away.
    let rounded = make(&[0.0; 2], &[1.0, 0.5, 0.5 + 1e-8, 1.0]).unwrap();
    assert_eq!(rounded.covariance()[1], rounded.covariance()[2]);
    // Symmetric with positive variances, but no covariance: eigenvalues 3 and -1.
    let indefinite = make(&[0.0; 2], &[1.0, 2.0, 2.0, 1.0]).unwrap();
    says(
        Gaussian::from_statistics(&indefinite),
        &["eigenvalue", "-0.333"],
    );
    // Without a count nothing can be merged.
    says(rounded.merge(&rounded), &["number of rows is unknown"]);
    // Reading runs the same checks.
    let json = r#"{"n": 5, "mean": [0.0, 0.0], "covariance": [1.0, 0.3, 0.0, 1.0]}"#;
    assert!(
        serde_json::from_str::<Statistics>(json)
            .unwrap_err()
            .to_string()
            .contains("not symmetric")
    );
}

#[test]
fn beyond_f64() {
    let huge = |mean: f64| Statistics::from_parts(None, vec![mean], vec![1e300]).unwrap();
    let [a, b] = [huge(0.0), huge(1e200)].map(|s| Gaussian::from_statistics(&s).unwrap());
    says(frechet_distance(&a, &b), &["range of f64"]);
    // Large covariances alone are no problem.
    let found = frechet_distance(&a, &a).unwrap();
    assert!(found.distance.abs() <= 1e-12 * 1e300, "{found:?}");
}
