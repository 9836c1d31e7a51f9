//! Fused kernels against the composition of candle operations in f64, at sizes that reach every lane,
//! remainder and parallel split; and what a frozen operand must not cost.
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{DType, Device, Result, Tensor, Var};
use tinyfusion_core::{StepRng, stream};
use tinyfusion_nn::ops;
use tinyfusion_testing::{flat, max_diff};

fn random(shape: &[usize], seed: u64) -> Tensor {
    StepRng::new(seed, 0, stream::INIT)
        .normal(shape, &Device::Cpu)
        .unwrap()
}

/// Runs `f` on f32 variables (fused) and on f64 variables (composed), and compares the outputs and the
/// gradients of a random weighting of the output.
fn agree(shapes: &[&[usize]], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let mut results = Vec::new();
    for dtype in [DType::F32, DType::F64] {
        let vars: Vec<Var> = shapes
            .iter()
            .enumerate()
            .map(|(i, s)| Var::from_tensor(&random(s, i as u64).to_dtype(dtype).unwrap()).unwrap())
            .collect();
        let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let out = f(&inputs).unwrap();
        let weights = random(out.dims(), 99).to_dtype(dtype).unwrap();
        let grads = (&out * weights)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let mut all = vec![out];
        all.extend(
            vars.iter()
                .map(|v| grads.get(v).expect("a gradient").clone()),
        );
        results.push(all);
    }
    for (i, (fused, oracle)) in results[0].iter().zip(&results[1]).enumerate() {
        let largest = flat(oracle).iter().fold(0f64, |m, v| m.max(v.abs()));
        let diff = max_diff(fused, oracle);
        assert!(
            diff <= 5e-6 * largest + 1e-6,
            "result {i}: off by {diff:e} of {largest}"
        );
    }
}

#[test]
fn linear_agrees() {
    for (rows, i, o) in [(1, 1, 1), (5, 17, 33), (130, 64, 192), (700, 96, 64)] {
        agree(&[&[rows, i], &[o, i], &[o]], |t| {
            ops::linear(&t[0], &t[1], Some(&t[2]))
        });
        agree(&[&[2, rows, i], &[o, i]], |t| {
            ops::linear(&t[0], &t[1], None)
        });
        agree(&[&[rows, i], &[o, i], &[o]], |t| {
            ops::linear_gelu(&t[0], &t[1], &t[2])
        });
        agree(&[&[rows, i], &[o, i], &[o]], |t| {
            ops::linear_gelu_erf(&t[0], &t[1], &t[2])
        });
    }
}

#[test]
fn low_rank_updates_agree() {
    for (rows, i, o, r) in [(1, 1, 1, 1), (5, 17, 33, 3), (130, 64, 192, 8)] {
        // W and its bias are frozen under a low-rank update.
        let frozen =
            |like: &Tensor, shape: &[usize]| random(shape, 7).to_dtype(like.dtype()).unwrap();
        type Layer = fn(&Tensor, &Tensor, &Tensor, &ops::LowRank) -> Result<Tensor>;
        let layer = |t: &[Tensor], low_rank: Layer| {
            let (w, bias) = (frozen(&t[0], &[o, i]), frozen(&t[0], &[o]));
            let update = ops::LowRank {
                a: t[1].clone(),
                b: t[2].clone(),
                scale: 0.7,
            };
            low_rank(&t[0], &w, &bias, &update)
        };
        let layers: [Layer; 3] = [
            ops::linear_low_rank,
            ops::linear_low_rank_gelu,
            ops::linear_low_rank_gelu_erf,
        ];
        for low_rank in layers {
            agree(&[&[2, rows, i], &[r, i], &[o, r]], |t| layer(t, low_rank));
        }
        // A weight that is trained beside its update takes the way of the composition.
        agree(&[&[rows, i], &[r, i], &[o, r], &[o, i], &[o]], |t| {
            let update = ops::LowRank {
                a: t[1].clone(),
                b: t[2].clone(),
                scale: 0.7,
            };
            ops::linear_low_rank(&t[0], &t[3], &t[4], &update)
        });
    }
    let (x, w, bias) = (random(&[2, 3], 0), random(&[4, 3], 1), random(&[4], 2));
    let update = ops::LowRank {
        a: random(&[2, 3], 3),
        b: random(&[4, 1], 4),
        scale: 1.0,
    };
    let error = ops::linear_low_rank(&x, &w, &bias, &update).unwrap_err();
    assert!(error.to_string().contains("[4, 1]"), "{error}");
}

#[test]
fn norms_agree() {
    for (b, t, d) in [
        (1, 1, 8),
        (3, 5, 17),
        (4, 64, 64),
        (2, 16, 200),
        (3, 43, 24),
    ] {
        agree(&[&[b, t, d], &[b, 6 * d]], |x| {
            ops::layer_norm_modulate(&x[0], &x[1], 3, 4, 1e-6)
        });
        agree(&[&[b, t, d], &[d], &[d]], |x| {
            ops::layer_norm(&x[0], &x[1], &x[2], 1e-6)
        });
        agree(&[&[b, t, d], &[b, t, d], &[b, 6 * d]], |x| {
            ops::gated_residual(&x[0], &x[1], &x[2], 5)
        });
    }
}

#[test]
fn modulating_rows_agrees() {
    for (n, d) in [(1, 8), (5, 17), (700, 64), (3, 20_000)] {
        agree(&[&[n, d], &[n, 3 * d]], |x| {
            ops::modulate(&x[0], &x[1], 0, 1)
        });
        agree(&[&[n, d], &[n, 2 * d]], |x| {
            ops::modulate(&x[0], &x[1], 1, 0)
        });
    }
}

fn dropout_of(rate: f64, samples: usize) -> ops::Dropout {
    let seeds: Vec<u64> = (0..samples as u64).map(|b| b * 77 + 5).collect();
    ops::Dropout::new(rate, &seeds, 3).unwrap()
}

#[test]
fn dropout_agrees_and_drops_the_share_it_is_told() {
    for shape in [[1, 1, 1], [3, 5, 17], [2, 300, 70]] {
        agree(&[&shape], |x| {
            ops::dropout(&x[0], &dropout_of(0.3, shape[0]))
        });
    }
    let ones = Tensor::ones((4, 50_000), DType::F32, &Device::Cpu).unwrap();
    for rate in [0.0, 0.1, 0.5, 0.9] {
        let y = flat(&ops::dropout(&ones, &dropout_of(rate, 4)).unwrap());
        let kept = 1.0 / (1.0 - rate);
        assert!(y.iter().all(|v| *v == 0.0 || (v - kept).abs() < 1e-6));
        let share = y.iter().filter(|v| **v == 0.0).count() as f64 / y.len() as f64;
        // The standard deviation of the share is at most 0.0012.
        assert!((share - rate).abs() < 0.005, "{share} instead of {rate}");
    }
    for rate in [-0.1, 1.0, f64::NAN] {
        assert!(ops::Dropout::new(rate, &[1], 0).is_err(), "{rate}");
    }
    assert!(ops::dropout(&ones, &dropout_of(0.1, 3)).is_err());
}

#[test]
fn a_sample_loses_the_same_values_in_any_company() {
    let (x, qkv) = (random(&[3, 40, 16], 1), random(&[3, 40, 3 * 16], 2));
    let seeds = [9u64, 1 << 40, 9 << 20];
    let all = ops::Dropout::new(0.4, &seeds, 7).unwrap();
    for b in 0..3 {
        let own = ops::Dropout::new(0.4, &seeds[b..=b], 7).unwrap();
        let row = |t: &Tensor| t.narrow(0, b, 1).unwrap();
        for (together, alone) in [
            (
                ops::dropout(&x, &all).unwrap(),
                ops::dropout(&row(&x), &own).unwrap(),
            ),
            (
                ops::attention_dropped(&qkv, 2, &all).unwrap(),
                ops::attention_dropped(&row(&qkv), 2, &own).unwrap(),
            ),
        ] {
            assert_eq!(max_diff(&row(&together), &alone), 0.0);
        }
    }
    // Samples, places and seeds differ from each other.
    let ones = Tensor::ones((3, 64), DType::F32, &Device::Cpu).unwrap();
    let here = flat(&ops::dropout(&ones, &all).unwrap());
    let there = ops::Dropout::new(0.4, &seeds, 8).unwrap();
    assert_ne!(here, flat(&ops::dropout(&ones, &there).unwrap()));
    assert_ne!(here[..64], here[64..128]);
    assert_ne!(here[64..128], here[128..]);
}

#[test]
fn attention_agrees() {
    // Fewer samples than threads and more; tokens below, at and above the rows of a block.
    for (b, t, heads, e) in [
        (1, 1, 1, 4),
        (2, 7, 3, 5),
        (3, 64, 4, 16),
        (1, 100, 2, 32),
        (3, 130, 2, 8),
    ] {
        let mut bits = Vec::new();
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                agree(&[&[b, t, 3 * heads * e]], |x| ops::attention(&x[0], heads));
                agree(&[&[b, t, 3 * heads * e]], |x| {
                    ops::attention_dropped(&x[0], heads, &dropout_of(0.3, b))
                });
                let out = ops::attention(&random(&[b, t, 3 * heads * e], 3), heads).unwrap();
                bits.push(flat(&out).iter().map(|v| v.to_bits()).collect::<Vec<_>>());
            });
        }
        assert!(bits.iter().all(|b| *b == bits[0]), "threads do not show");
    }
}

#[test]
fn activations_agree_over_a_wide_range() {
    agree(&[&[70_000]], |x| ops::gelu_tanh(&(&x[0] * 8.0)?));
    agree(&[&[70_000]], |x| ops::gelu_erf(&(&x[0] * 8.0)?));
    agree(&[&[70_000]], |x| ops::gelu_erf(&x[0]));
    agree(&[&[70_000]], |x| ops::silu(&(&x[0] * 8.0)?));
}

#[test]
fn extreme_inputs_stay_finite_and_nan_is_not_hidden() {
    let x = Tensor::new(&[-1e4f32, -90.0, 0.0, 90.0, 1e4], &Device::Cpu).unwrap();
    for y in [
        ops::gelu_tanh(&x).unwrap(),
        ops::gelu_erf(&x).unwrap(),
        ops::silu(&x).unwrap(),
    ] {
        assert!(flat(&y).iter().all(|v| v.is_finite()));
        assert_eq!(flat(&y)[4], 1e4);
    }
    let large = (random(&[1, 4, 12], 0) * 1e3).unwrap();
    assert!(
        flat(&ops::attention(&large, 2).unwrap())
            .iter()
            .all(|v| v.is_finite())
    );
    let nan = Tensor::new(&[f32::NAN], &Device::Cpu).unwrap();
    assert!(flat(&ops::gelu_tanh(&nan).unwrap())[0].is_nan());
    assert!(flat(&ops::gelu_erf(&nan).unwrap())[0].is_nan());
    let nan = Tensor::full(f32::NAN, (1, 4, 12), &Device::Cpu).unwrap();
    assert!(
        flat(&ops::attention(&nan, 2).unwrap())
            .iter()
            .all(|v| v.is_nan())
    );
}

#[test]
fn frozen_operands_form_no_gradient() {
    let (x, w) = (
        Var::from_tensor(&random(&[3, 4], 0)).unwrap(),
        random(&[5, 4], 1),
    );
    let grads = ops::linear(&x, &w, None)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert!(grads.get(&w).is_none());
    assert!(grads.get(&x).is_some());
    let (x, w) = (
        random(&[3, 4], 0),
        Var::from_tensor(&random(&[5, 4], 1)).unwrap(),
    );
    let grads = ops::linear(&x, &w, None)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert!(grads.get(&x).is_none());
    assert!(grads.get(&w).is_some());
}

#[test]
fn misfits_are_errors() {
    let x = random(&[2, 3, 4], 0);
    for error in [
        ops::linear(&x, &random(&[5, 3], 1), None).unwrap_err(),
        ops::linear(&x, &random(&[5, 4], 1), Some(&random(&[4], 2))).unwrap_err(),
        ops::attention(&x, 2).unwrap_err(),
        ops::layer_norm_modulate(&x, &random(&[2, 4], 1), 0, 1, 1e-6).unwrap_err(),
        ops::gated_residual(&x, &x, &random(&[1, 4], 1), 0).unwrap_err(),
        ops::modulate(&random(&[3, 4], 0), &random(&[3, 4], 1), 0, 1).unwrap_err(),
        ops::dropout(&x, &dropout_of(0.1, 3)).unwrap_err(),
    ] {
        assert!(
            error.to_string().contains('['),
            "the message shows the shapes: {error}"
        );
    }
}
