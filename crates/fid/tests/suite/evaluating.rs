//! `evaluate`: the same numbers as the single metrics, what is left out, and the warnings.

use tinyfusion_fid::{
    Config, Error, Gaussian, Given, KidConfig, Metrics, PrecisionRecallConfig, Splits, Statistics,
    evaluate, frechet_distance, inception_score, kid, precision_recall,
};

use crate::golden_file::{Golden, Matrix};

fn warned(metrics: &Metrics, words: &str) -> bool {
    metrics
        .warnings
        .iter()
        .any(|warning| warning.contains(words))
}

#[test]
fn golden_evaluate_agrees_with_the_metrics() {
    let golden = Golden::open("is_pr.safetensors");
    let (reference, samples) = (golden.matrix("pr_a.ref"), golden.matrix("pr_a.sample"));
    let size = golden.indices("kid.idx1")[0].len();
    let config = Config {
        kid: Some(KidConfig {
            subsets: 4,
            subset_size: size,
            seed: 1,
        }),
        ..Config::default()
    };
    // Any rows serve as logits here.
    let found = evaluate(
        reference.view(),
        samples.view(),
        Some(samples.view()),
        &config,
    )
    .unwrap();
    let [first, second] =
        [&reference, &samples].map(|x| Gaussian::from_features(x.view()).unwrap());
    assert_eq!(found.frechet, frechet_distance(&first, &second).unwrap());
    assert_eq!(found.fid, found.frechet.distance);
    let expected = golden.f64s("pr_a.precision_recall");
    assert_eq!(
        (found.precision, found.recall),
        (Some(expected[0]), Some(expected[1]))
    );
    let score = inception_score(samples.view(), &Splits::ADM).unwrap();
    assert_eq!(found.inception_score, Some(score.mean));
    let distance = kid(samples.view(), reference.view(), &config.kid.unwrap()).unwrap();
    assert_eq!(
        (found.kid, found.kid_std),
        (Some(distance.mean), distance.std)
    );
    assert_eq!(found.n_reference, Some(reference.rows as u64));
    assert_eq!(found.n_samples, Some(samples.rows as u64));
    assert_eq!(found.n_sample_features, samples.rows as u64);
    assert_eq!(found.fid_label(), format!("FID-{}", samples.rows));

    let json = serde_json::to_string(&found).unwrap();
    let read: Metrics = serde_json::from_str(&json).unwrap();
    assert_eq!(read.warnings, found.warnings);
    assert_eq!(read.config, config);
}

/// 12 rows of 3 features in a fixed scatter.
fn scatter(rows: usize, columns: usize) -> Matrix {
    let values = (0..rows * columns)
        .map(|i| ((i * 7919) % 104_729) as f32 / 104_729.0)
        .collect();
    Matrix {
        values,
        rows,
        columns,
    }
}

#[test]
fn statistics_alone_give_only_the_distance() {
    let (reference, samples) = (scatter(30, 3), scatter(20, 3));
    let statistics = Statistics::of(reference.view()).unwrap();
    let found = evaluate(&statistics, samples.view(), None, &Config::default()).unwrap();
    assert_eq!(
        (
            found.precision,
            found.recall,
            found.kid,
            found.inception_score
        ),
        (None, None, None, None)
    );
    assert!(warned(&found, "no precision, recall and KID"));
    assert!(warned(&found, "no Inception Score"));
    assert_eq!(
        (found.n_reference, found.n_reference_features),
        (Some(30), 0)
    );

    // Statistics of one set and features of another: each metric takes its own.
    let other = scatter(25, 3);
    let both = Given::Both {
        statistics: &statistics,
        features: other.view(),
    };
    let with_both = evaluate(both, samples.view(), None, &small_kid(20)).unwrap();
    assert_eq!(with_both.fid, found.fid);
    let expected = precision_recall(
        other.view(),
        samples.view(),
        &PrecisionRecallConfig::default(),
    )
    .unwrap();
    assert_eq!(with_both.precision, Some(expected.precision));
    assert_eq!(with_both.n_reference_features, 25);

    let unknown = Statistics::from_parts(
        None,
        statistics.mean().to_vec(),
        statistics.covariance().to_vec(),
    )
    .unwrap();
    let found = evaluate(&unknown, samples.view(), None, &Config::default()).unwrap();
    assert!(warned(&found, "do not say over how many"));
    assert_eq!(found.n_reference, None);
}

#[test]
fn warnings_about_size() {
    let (config, said) = Config::default().fitted(8);
    assert!(
        said.unwrap()
            .contains("KID uses subsets of 8 rows instead of 1000")
    );
    assert_eq!(config.kid.unwrap().subset_size, 8);
    let small = evaluate(scatter(30, 8).view(), scatter(8, 8).view(), None, &config).unwrap();
    assert!(warned(
        &small,
        "samples: 8 rows for 8 features: the covariance is rank-deficient"
    ));
    assert!(warned(
        &small,
        "reference: 30 rows: the Fréchet distance is biased upwards"
    ));
    let quiet = Config {
        inception_score: None,
        precision_recall: None,
        kid: None,
    };
    let large = evaluate(
        scatter(3000, 2).view(),
        scatter(2500, 2).view(),
        None,
        &quiet,
    )
    .unwrap();
    assert_eq!(large.warnings, Vec::<String>::new());
    assert_eq!((large.precision, large.kid), (None, None));
}

fn small_kid(subset_size: usize) -> Config {
    Config {
        kid: Some(KidConfig {
            subset_size,
            ..KidConfig::default()
        }),
        ..Config::default()
    }
}

/// torch-fidelity's rule: a subset larger than a set is an error, and all of both sets is one subset without a spread.
#[test]
fn kid_of_small_sets() {
    let (reference, samples) = (scatter(20, 3), scatter(20, 3));
    let error = evaluate(reference.view(), samples.view(), None, &small_kid(21)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooFewRows {
                expected: 21,
                found: 20,
                ..
            }
        ),
        "{error}"
    );
    let found = evaluate(reference.view(), samples.view(), None, &small_kid(20)).unwrap();
    assert!(found.kid.is_some() && found.kid_std.is_none(), "{found:?}");
    let alone = kid(
        samples.view(),
        reference.view(),
        &small_kid(20).kid.unwrap(),
    )
    .unwrap();
    assert_eq!(alone.subsets.len(), 1);
    // A larger side is drawn from, so the subsets differ.
    let larger = scatter(30, 3);
    let found = kid(larger.view(), reference.view(), &small_kid(20).kid.unwrap()).unwrap();
    assert_eq!(found.subsets.len(), 100);
    assert!(found.std.unwrap() > 0.0);
}

/// Samples may be statistics, too (ADM's rule for both files): the distance is there, and nothing else.
#[test]
fn samples_may_be_statistics() {
    let (reference, samples) = (scatter(30, 3), scatter(20, 3));
    let statistics = Statistics::of(samples.view()).unwrap();
    let found = evaluate(reference.view(), &statistics, None, &Config::default()).unwrap();
    let whole = evaluate(reference.view(), samples.view(), None, &small_kid(20)).unwrap();
    assert!((found.fid - whole.fid).abs() <= 1e-12 * whole.frechet.trace_first);
    assert_eq!((found.n_samples, found.n_sample_features), (Some(20), 0));
    assert_eq!((found.precision, found.kid), (None, None));
    assert!(warned(
        &found,
        "the samples have statistics but no features"
    ));
    let unknown = Statistics::from_parts(
        None,
        statistics.mean().to_vec(),
        statistics.covariance().to_vec(),
    )
    .unwrap();
    let found = evaluate(reference.view(), &unknown, None, &Config::default()).unwrap();
    assert_eq!((found.n_samples, found.fid_label().as_str()), (None, "FID"));
}

#[test]
fn sorted_classes_are_noticed() {
    let (classes, rows) = (4, 400);
    let logits = |class: &dyn Fn(usize) -> usize| -> Vec<f32> {
        (0..rows * classes)
            .map(|at| {
                if at % classes == class(at / classes) {
                    6.0
                } else {
                    0.0
                }
            })
            .collect()
    };
    let sorted = logits(&|row| row * classes / rows);
    let mixed = logits(&|row| (row * 7919 + row / 3) % classes);
    let x = scatter(rows, 2);
    let config = Config {
        inception_score: Some(Splits::Adm { size: 100 }),
        precision_recall: None,
        kid: None,
    };
    for (values, expected) in [(sorted, true), (mixed, false)] {
        let logits = Matrix {
            values,
            rows,
            columns: classes,
        };
        let found = evaluate(x.view(), x.view(), Some(logits.view()), &config).unwrap();
        assert_eq!(warned(&found, "sorted by class"), expected, "{found:?}");
    }
}
