//! Interpolants and their objective: what the formulas must satisfy, what a draw promises, and the errors of
//! malformed settings.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use tinyfusion_core::{Error, LatentBatch, StepRng, stream};
use tinyfusion_diffusion::{
    DiffusionForm, Interpolant, InterpolantConfig, InterpolantObjective, LabelDrop, Path,
    Prediction, Weighting,
};
use tinyfusion_testing::{flat, max_diff};

const CLASSES: u32 = 5;
const PATHS: [Path; 3] = [Path::Linear, Path::Gvp, Path::Vp];
const PREDICTIONS: [Prediction; 3] = [Prediction::Velocity, Prediction::Noise, Prediction::Score];

fn config(path: Path, prediction: Prediction) -> InterpolantConfig {
    InterpolantConfig {
        path,
        prediction,
        ..InterpolantConfig::default()
    }
}

fn interpolant(path: Path, prediction: Prediction) -> Interpolant {
    Interpolant::new(config(path, prediction)).unwrap()
}

fn objective(config: InterpolantConfig, probability: f64) -> InterpolantObjective {
    let labels = LabelDrop {
        num_classes: CLASSES,
        probability,
    };
    InterpolantObjective::new(Interpolant::new(config).unwrap(), labels).unwrap()
}

fn normal(seed: u64, shape: (usize, usize, usize, usize)) -> Tensor {
    StepRng::new(seed, 0, stream::ORDER)
        .normal(shape, &Device::Cpu)
        .unwrap()
}

fn batch(b: usize) -> LatentBatch {
    let y: Vec<u32> = (0..b as u32).map(|i| i % CLASSES).collect();
    LatentBatch {
        x: normal(9, (b, 3, 4, 4)),
        y: Tensor::new(y, &Device::Cpu).unwrap(),
    }
}

fn rng(step: u64) -> StepRng {
    StepRng::new(7, step, stream::DRAW)
}

fn paths() -> impl Strategy<Value = Path> {
    prop::sample::select(PATHS.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn slopes_are_the_derivatives(path in paths(), t in 0.02f64..0.98) {
        let h = 1e-6;
        let slope = |f: &dyn Fn(f64) -> f64| (f(t + h) - f(t - h)) / (2.0 * h);
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * (1.0 + b.abs());
        prop_assert!(close(slope(&|t| path.alpha(t)), path.d_alpha(t)));
        prop_assert!(close(slope(&|t| path.sigma(t)), path.d_sigma(t)));
        prop_assert!(close(slope(&|t| path.alpha(t).ln()), path.log_slope(t)));
        let (ratio, sigma) = (path.log_slope(t), path.sigma(t));
        prop_assert!(close(ratio * sigma * sigma - sigma * path.d_sigma(t), path.score_weight(t)));
        prop_assert!(path.score_weight(t) > 0.0);
    }

    #[test]
    fn paths_go_from_noise_to_data(path in paths(), t in 0.0f64..0.99) {
        prop_assert!(path.alpha(t + 0.01) > path.alpha(t) && path.sigma(t + 0.01) < path.sigma(t));
        prop_assert_eq!((path.alpha(1.0), path.sigma(0.0) > 0.99), (1.0, true));
        prop_assert!(path.sigma(1.0).abs() < 1e-12 && path.alpha(0.0) < 0.01);
        if path != Path::Linear {
            prop_assert!((path.alpha(t).powi(2) + path.sigma(t).powi(2) - 1.0).abs() < 1e-12);
        }
    }

    /// A network that knows the truth is believed, whichever way it says it.
    #[test]
    fn every_prediction_means_the_same(path in paths(), t in 0.05f64..0.95, seed in 0u64..1000) {
        let (x, noise) = (normal(seed, (2, 2, 2, 2)), normal(seed + 1, (2, 2, 2, 2)));
        let t = [t, 0.5];
        let any = interpolant(path, Prediction::Velocity);
        let x_t = any.x_t(&x, &noise, &t).unwrap();
        let velocity = any.velocity_target(&x, &noise, &t).unwrap();
        let sigmas: Vec<f32> = t.iter().map(|t| path.sigma(*t) as f32).collect();
        let sigmas = Tensor::new(sigmas, &Device::Cpu).unwrap().reshape((2, 1, 1, 1)).unwrap();
        let score = noise.neg().unwrap().broadcast_div(&sigmas).unwrap();
        let all = [&velocity, &noise, &score];
        for (prediction, said) in PREDICTIONS.iter().zip(all) {
            let process = interpolant(path, *prediction);
            for (meant, known) in [
                (process.velocity(said, &x_t, &t).unwrap(), &velocity),
                (process.noise(said, &x_t, &t).unwrap(), &noise),
                (process.score(said, &x_t, &t).unwrap(), &score),
                (process.x_start(said, &x_t, &t).unwrap(), &x),
            ] {
                // Near noise the data is a small difference of large numbers: up to 1/α more error.
                let allowed = 1e-5 * flat(known).iter().fold(1.0, |m: f64, v| m.max(v.abs())) / path.alpha(t[0]).min(1.0);
                prop_assert!(max_diff(&meant, known) < allowed, "{prediction:?} {}", max_diff(&meant, known));
            }
        }
    }

    #[test]
    fn intervals_ascend_within_zero_and_one(
        path in paths(), which in 0usize..3, train in prop::option::of(0.0f64..0.5), sample in prop::option::of(0.0f64..0.5),
        last in 0.0f64..0.5,
    ) {
        let config = config(path, PREDICTIONS[which]);
        let needs_none = path != Path::Vp && config.prediction == Prediction::Velocity;
        let config = InterpolantConfig {
            train_eps: train.filter(|_| !needs_none), sample_eps: sample, ..config
        };
        config.validate().unwrap();
        for (t0, t1) in [
            config.train_interval(), config.ode_interval(), config.sde_interval(DiffusionForm::Sbdm, last),
            config.sde_interval(DiffusionForm::Sigma, last),
        ] {
            prop_assert!(0.0 <= t0 && t0 < t1 && t1 <= 1.0, "{t0} {t1}");
        }
    }
}

#[test]
fn a_draw_depends_on_the_generator_alone_and_starts_with_the_noise() {
    let objective = objective(InterpolantConfig::default(), 0.1);
    let all = |step: u64| {
        let draw = objective.draw(&batch(16), &mut rng(step)).unwrap();
        (
            draw.t.clone(),
            flat(&draw.noise),
            flat(&draw.y),
            flat(&draw.x_t),
        )
    };
    assert_eq!(all(0), all(0));
    assert!(all(0).0 != all(1).0 && all(0).1 != all(1).1);
    // The reference's order: ε, then t.
    let mut by_hand = rng(0);
    let noise = by_hand.normal((16, 3, 4, 4), &Device::Cpu).unwrap();
    let times: Vec<f32> = by_hand.uniform(16).into_iter().map(|u| u as f32).collect();
    assert_eq!((all(0).0, all(0).1), (times, flat(&noise)));
}

#[test]
fn times_are_uniform_over_the_interval_and_labels_drop() {
    for path in PATHS {
        let objective = objective(config(path, Prediction::Noise), 0.1);
        let draw = objective.draw(&batch(8000), &mut rng(0)).unwrap();
        let (t0, t1) = objective.interpolant().config().train_interval();
        let mut tenths = [0usize; 10];
        for t in &draw.t {
            assert!((t0 as f32..=t1 as f32).contains(t), "{t}");
            tenths[((f64::from(*t) - t0) / (t1 - t0) * 10.0).min(9.0) as usize] += 1;
        }
        // 800 expected in each, standard deviation 27; of the labels as many, the same.
        assert!(tenths.iter().all(|n| (680..920).contains(n)), "{tenths:?}");
        let dropped = draw.y.to_vec1::<u32>().unwrap();
        let dropped = dropped.iter().filter(|y| **y == CLASSES).count();
        assert!((680..920).contains(&dropped), "{dropped}");
    }
}

#[test]
fn who_knows_the_answer_loses_nothing_and_rows_lose_what_the_whole_did() {
    for path in PATHS {
        for prediction in PREDICTIONS {
            for weighting in [Weighting::None, Weighting::Velocity, Weighting::Likelihood] {
                if prediction == Prediction::Velocity && weighting != Weighting::None {
                    continue;
                }
                let objective = objective(
                    InterpolantConfig {
                        weighting,
                        ..config(path, prediction)
                    },
                    0.5,
                );
                let draw = objective.draw(&batch(6), &mut rng(3)).unwrap();
                let guess = normal(4, (6, 3, 4, 4));
                let whole = flat(&objective.losses(&guess, &draw).unwrap());
                let part = objective.rows(&draw, 4, 2).unwrap();
                let guess = guess.narrow(0, 4, 2).unwrap();
                let part = flat(&objective.losses(&guess, &part).unwrap());
                assert!(whole.iter().all(|l| l.is_finite() && *l > 0.0));
                for (a, b) in whole[4..].iter().zip(&part) {
                    assert!((a - b).abs() <= 1e-6 * a, "{a} and {b}");
                }
                let times: Vec<f64> = draw.t.iter().copied().map(f64::from).collect();
                let known = match prediction {
                    Prediction::Velocity => objective
                        .interpolant()
                        .velocity_target(&draw.x_start, &draw.noise, &times)
                        .unwrap(),
                    Prediction::Noise => draw.noise.clone(),
                    Prediction::Score => interpolant(path, Prediction::Noise)
                        .score(&draw.noise, &draw.x_t, &times)
                        .unwrap(),
                };
                let loss = flat(&objective.losses(&known, &draw).unwrap());
                for (known, guessed) in loss.iter().zip(&whole) {
                    assert!(*known <= 1e-8 * guessed, "{path} {prediction:?} {known}");
                }
            }
        }
    }
}

#[test]
fn distilling_compares_predictions_and_leaves_the_teacher_alone() {
    let objective = objective(InterpolantConfig::default(), 0.0);
    let (a, b) = (normal(1, (4, 3, 2, 2)), normal(2, (4, 3, 2, 2)));
    assert_eq!(flat(&objective.distillation(&a, &a).unwrap()), [0.0; 4]);
    let found = flat(&objective.distillation(&a, &b).unwrap());
    let (a_rows, b_rows) = (flat(&a), flat(&b));
    for (row, found) in found.iter().enumerate() {
        let squares = (0..12).map(|i| (a_rows[12 * row + i] - b_rows[12 * row + i]).powi(2));
        let mean = squares.sum::<f64>() / 12.0;
        assert!((found - mean).abs() < 1e-6 * mean, "{found} {mean}");
    }
    let var = |t: &Tensor| candle_core::Var::from_tensor(t).unwrap();
    let (student, teacher) = (var(&a), var(&b));
    let loss = objective.distillation(&student, &teacher).unwrap();
    let grads = loss.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&student).is_some() && grads.get(&teacher).is_none());
}

#[track_caller]
fn usage<T: std::fmt::Debug>(found: Result<T, Error>, part: &str) {
    match found {
        Err(Error::Usage(message)) => assert!(message.contains(part), "{message}"),
        other => panic!("{other:?} instead of an error about {part}"),
    }
}

#[test]
fn settings_that_make_no_sense_are_usage_errors() {
    for eps in [f64::NAN, f64::INFINITY, -1e-3, 0.5, 1.0] {
        for (name, config) in [
            (
                "train_eps",
                InterpolantConfig {
                    train_eps: Some(eps),
                    ..InterpolantConfig::default()
                },
            ),
            (
                "sample_eps",
                InterpolantConfig {
                    sample_eps: Some(eps),
                    ..InterpolantConfig::default()
                },
            ),
        ] {
            usage(Interpolant::new(config), name);
        }
    }
    for path in [Path::Linear, Path::Gvp, Path::Vp] {
        let of = |eps| {
            Interpolant::new(InterpolantConfig {
                train_eps: Some(eps),
                ..config(path, Prediction::Velocity)
            })
        };
        assert!(of(0.0).is_ok());
        match path {
            Path::Vp => assert!(of(1e-3).is_ok()),
            _ => usage(of(1e-3), "train_eps 0.001 does nothing"),
        }
    }
    for weighting in [Weighting::Velocity, Weighting::Likelihood] {
        let config = InterpolantConfig {
            weighting,
            ..InterpolantConfig::default()
        };
        usage(Interpolant::new(config), "weighting");
    }
    for probability in [f64::NAN, -0.1, 1.1] {
        let labels = LabelDrop {
            num_classes: 3,
            probability,
        };
        let process = interpolant(Path::Linear, Prediction::Velocity);
        usage(InterpolantObjective::new(process, labels), "probability");
    }
}

#[test]
fn draws_that_do_not_fit_are_usage_errors() {
    let objective = objective(InterpolantConfig::default(), 0.0);
    let noise = || normal(3, (2, 3, 4, 4));
    for t in [f32::NAN, -0.1, 1.1, f32::INFINITY] {
        usage(objective.draw_at(&batch(2), vec![0.5, t], noise()), "time");
    }
    usage(objective.draw_at(&batch(2), vec![0.5], noise()), "1 times");
    let y = Tensor::new(&[CLASSES + 1, 0], &Device::Cpu).unwrap();
    let odd = LatentBatch { y, ..batch(2) };
    usage(objective.draw_at(&odd, vec![0.5, 0.1], noise()), "class 6");
    let short = LatentBatch {
        y: batch(1).y,
        ..batch(2)
    };
    usage(
        objective.draw_at(&short, vec![0.5, 0.1], noise()),
        "1 labels",
    );
    let draw = objective.draw(&batch(2), &mut rng(0)).unwrap();
    usage(objective.rows(&draw, 1, 2), "2 samples");
    // A network that kept its σ channels.
    let wide = Tensor::zeros((2, 6, 4, 4), DType::F32, &Device::Cpu).unwrap();
    usage(objective.losses(&wide, &draw), "[2, 6, 4, 4]");
    usage(objective.distillation(&wide, &draw.x_t), "[2, 6, 4, 4]");
}

#[test]
fn where_a_formula_has_no_value_there_is_an_error() {
    let x = normal(1, (1, 1, 2, 2));
    for (prediction, t) in [(Prediction::Noise, 0.0), (Prediction::Score, 0.0)] {
        let process = interpolant(Path::Linear, prediction);
        usage(process.velocity(&x, &x, &[t]), "no velocity at t = 0");
    }
    let process = interpolant(Path::Gvp, Prediction::Velocity);
    usage(process.x_start(&x, &x, &[0.0]), "no estimate of the data");
    let process = interpolant(Path::Vp, Prediction::Noise);
    usage(process.velocity(&x, &x, &[1.01]), "no velocity at t = 1.01");
}
