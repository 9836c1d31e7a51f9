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
    }
}

#[test]
fn low_rank_updates_agree() {
    for (rows, i, o, r) in [(1, 1, 1, 1), (5, 17, 33, 3), (130, 64, 192, 8)] {
        // W and its bias are frozen under a low-rank update.
        let frozen =
            |like: &Tensor, shape: &[usize]| random(shape, 7).to_dtype(like.dtype()).unwrap();
        let layer = |t: &[Tensor], gelu: bool| {
            let (w, bias) = (frozen(&t[0], &[o, i]), frozen(&t[0], &[o]));
            let update = ops::LowRank {
                a: t[1].clone(),
                b: t[2].clone(),
                scale: 0.7,
            };
            if gelu {
                ops::linear_low_rank_gelu(&t[0], &w, &bias, &update)
            } else {
                ops::linear_low_rank(&t[0], &w, &bias, &update)
            }
        };
        for gelu in [false, true] {
            agree(&[&[2, rows, i], &[r, i], &[o, r]], |t| layer(t, gelu));
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
    for (b, t, d) in [(1, 1, 8), (3, 5, 17), (4, 64, 64), (2, 16, 200)] {
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
    agree(&[&[70_000]], |x| ops::silu(&(&x[0] * 8.0)?));
}

#[test]
fn extreme_inputs_stay_finite_and_nan_is_not_hidden() {
    let x = Tensor::new(&[-1e4f32, -90.0, 0.0, 90.0, 1e4], &Device::Cpu).unwrap();
    for y in [ops::gelu_tanh(&x).unwrap(), ops::silu(&x).unwrap()] {
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
    ] {
        assert!(
            error.to_string().contains('['),
            "the message shows the shapes: {error}"
        );
    }
}
