//! Laws of the feature loss: what it counts, its gradient, and massive activations.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{Device, Tensor, Var};
use tinyfusion_core::{StepRng, stream};
use tinyfusion_distill::{FeatureLoss, feature_loss, inliers};
use tinyfusion_testing::flat;

const MODES: [FeatureLoss; 4] = [
    FeatureLoss::None,
    FeatureLoss::All,
    FeatureLoss::Masked,
    FeatureLoss::Joint,
];
const SHAPE: (usize, usize, usize) = (3, 16, 24);
const N: usize = SHAPE.1 * SHAPE.2;
const K: f64 = 2.0;

/// Heavy-tailed values: the cube of normal ones.
fn tails(step: u64) -> Tensor {
    StepRng::new(1, step, stream::DRAW)
        .normal(SHAPE, &Device::Cpu)
        .unwrap()
        .powf(3.0)
        .unwrap()
}

fn normal(step: u64) -> Tensor {
    StepRng::new(2, step, stream::DRAW)
        .normal(SHAPE, &Device::Cpu)
        .unwrap()
}

/// Loss per sample and the gradient of its sum with respect to the student.
fn with_gradient(s: &Tensor, t: &Tensor, mode: FeatureLoss) -> (Vec<f64>, Vec<f64>) {
    let s = Var::from_tensor(s).unwrap();
    let t = Var::from_tensor(t).unwrap();
    let loss = feature_loss(s.as_tensor(), t.as_tensor(), mode, K).unwrap();
    assert_eq!(loss.dims(), [SHAPE.0]);
    let grads = loss.sum_all().unwrap().backward().unwrap();
    assert!(
        grads.get(t.as_tensor()).is_none(),
        "a gradient reached the teacher"
    );
    let grad = grads
        .get(s.as_tensor())
        .map_or_else(|| vec![0.0; SHAPE.0 * N], flat);
    (flat(&loss), grad)
}

/// Mask by the formula, in f64, one sample at a time.
fn plain_mask(x: &[f64]) -> Vec<bool> {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    x.iter()
        .map(|v| (v - mean).abs() < K * variance.sqrt())
        .collect()
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-5 * b.abs().max(1e-3)
}

#[test]
fn values_and_gradients_are_the_formulas() {
    for step in 0..8 {
        let (s, t) = (tails(2 * step), tails(2 * step + 1));
        let (fs, ft) = (flat(&s), flat(&t));
        for mode in MODES {
            let (loss, grad) = with_gradient(&s, &t, mode);
            for b in 0..SHAPE.0 {
                let (s, t) = (&fs[b * N..][..N], &ft[b * N..][..N]);
                let (ms, mt) = (plain_mask(s), plain_mask(t));
                let mut want = 0.0;
                for i in 0..N {
                    let (ms, mt) = (f64::from(u8::from(ms[i])), f64::from(u8::from(mt[i])));
                    let (difference, slope) = match mode {
                        FeatureLoss::None => (0.0, 0.0),
                        FeatureLoss::All => (s[i] - t[i], 1.0),
                        FeatureLoss::Masked => (ms * s[i] - mt * t[i], ms),
                        FeatureLoss::Joint => (ms * mt * (s[i] - t[i]), ms * mt),
                    };
                    want += difference * difference / N as f64;
                    let want_grad = 2.0 * difference * slope / N as f64;
                    let found = grad[b * N + i];
                    assert!(
                        near(found, want_grad),
                        "{mode:?} gradient {found}, expected {want_grad}"
                    );
                }
                assert!(
                    near(loss[b], want),
                    "{mode:?} loss {}, expected {want}",
                    loss[b]
                );
            }
        }
    }
}

#[test]
fn nothing_is_to_be_learned_from_oneself() {
    let x = tails(0);
    for mode in MODES {
        let (loss, grad) = with_gradient(&x, &x, mode);
        assert!(loss.iter().chain(&grad).all(|v| *v == 0.0), "{mode:?}");
    }
}

#[test]
fn joint_never_adds_a_masked_element() {
    for step in 0..8 {
        let (s, t) = (tails(2 * step), tails(2 * step + 1));
        let masked: Vec<bool> = flat(&inliers(&s, K).unwrap().mask)
            .iter()
            .zip(flat(&inliers(&t, K).unwrap().mask))
            .map(|(s, t)| s * t == 0.0)
            .collect();
        assert!(masked.iter().any(|m| *m) && masked.iter().any(|m| !*m));
        let (loss, grad) = with_gradient(&s, &t, FeatureLoss::Joint);
        assert!(masked.iter().zip(&grad).all(|(m, g)| !*m || *g == 0.0));
        // The loss is what is left over elsewhere.
        let squares = flat(&(&s - &t).unwrap().sqr().unwrap());
        for (b, found) in loss.iter().enumerate() {
            let rows = b * N..(b + 1) * N;
            let want: f64 = rows
                .filter(|i| !masked[*i])
                .map(|i| squares[i])
                .sum::<f64>()
                / N as f64;
            assert!(near(*found, want), "{found} and {want}");
        }
    }
}

#[test]
fn masked_and_joint_differ_exactly_by_the_one_sided_outliers() {
    for step in 0..8 {
        let (s, t) = (tails(2 * step), tails(2 * step + 1));
        let (ms, mt) = (
            flat(&inliers(&s, K).unwrap().mask),
            flat(&inliers(&t, K).unwrap().mask),
        );
        let (fs, ft) = (flat(&s), flat(&t));
        let (masked, _) = with_gradient(&s, &t, FeatureLoss::Masked);
        let (joint, _) = with_gradient(&s, &t, FeatureLoss::Joint);
        for b in 0..SHAPE.0 {
            let one_sided: f64 = (b * N..(b + 1) * N)
                .map(|i| match (ms[i] == 1.0, mt[i] == 1.0) {
                    (true, false) => fs[i].powi(2),
                    (false, true) => ft[i].powi(2),
                    _ => 0.0,
                })
                .sum::<f64>()
                / N as f64;
            assert!(one_sided > 0.0, "nothing to compare");
            assert!(
                (masked[b] - joint[b] - one_sided).abs() < 1e-5 * masked[b],
                "{} {} {one_sided}",
                masked[b],
                joint[b]
            );
        }
    }
}

#[test]
fn massive_activations_drown_only_the_unmasked_loss() {
    let (s, t) = (normal(0), normal(1));
    let calm = feature_loss(&s, &t, FeatureLoss::All, K).unwrap();
    let calm = flat(&calm).into_iter().fold(0.0, f64::max);
    let massive = |x: &Tensor, at: &[usize]| {
        let mut values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for b in 0..SHAPE.0 {
            at.iter().for_each(|i| values[b * N + i] = 1e4);
        }
        Tensor::from_vec(values, SHAPE, &Device::Cpu).unwrap()
    };
    // At some positions on both sides, at some on one side only, with unlike heights.
    let s = massive(&s, &[5, 100]);
    let t = (massive(&t, &[5, 300]) * 1.5).unwrap();
    for mode in [FeatureLoss::Masked, FeatureLoss::Joint] {
        let (loss, grad) = with_gradient(&s, &t, mode);
        assert!(
            loss.iter().all(|l| *l > 0.0 && *l < 4.0 * calm),
            "{mode:?}: {loss:?} over {calm}"
        );
        assert!(
            grad.iter().all(|g| g.abs() < 0.1),
            "{mode:?}: a gradient is massive"
        );
    }
    let (loss, grad) = with_gradient(&s, &t, FeatureLoss::All);
    assert!(loss.iter().all(|l| *l > 1e5 * calm), "{loss:?}");
    assert!(grad.iter().any(|g| g.abs() > 10.0));
}

#[test]
fn a_sample_is_masked_by_itself_alone() {
    let (s, t) = (tails(20), tails(21));
    for mode in MODES {
        let together = flat(&feature_loss(&s, &t, mode, K).unwrap());
        for (b, want) in together.iter().enumerate() {
            let one = |x: &Tensor| x.narrow(0, b, 1).unwrap();
            let alone = flat(&feature_loss(&one(&s), &one(&t), mode, K).unwrap());
            assert!(near(alone[0], *want), "{mode:?} {b}");
        }
    }
}

#[test]
fn a_value_that_is_not_finite_is_not_masked_away() {
    let t = normal(3);
    let mut values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values[7] = f32::NAN;
    let s = Tensor::from_vec(values, SHAPE, &Device::Cpu).unwrap();
    for mode in [FeatureLoss::All, FeatureLoss::Masked, FeatureLoss::Joint] {
        let loss = flat(&feature_loss(&s, &t, mode, K).unwrap());
        assert!(
            loss[0].is_nan() && loss[1..].iter().all(|l| l.is_finite()),
            "{mode:?}: {loss:?}"
        );
    }
}

#[test]
fn unlike_widths_are_refused_with_both_shapes() {
    let wide = Tensor::zeros((3, 16, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
    let error = feature_loss(&normal(0), &wide, FeatureLoss::Joint, K)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("[3, 16, 24]") && error.contains("[3, 16, 32]") && error.contains("none"),
        "{error}"
    );
}
