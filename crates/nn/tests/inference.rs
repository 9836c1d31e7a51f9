//! The operations that only infer, against candle's own in f64; and that a backward through them is an error.
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{DType, Device, Result, Tensor, Var};
use tinyfusion_core::{StepRng, stream};
use tinyfusion_nn::ops::{self, Conv2d};
use tinyfusion_testing::{flat, max_diff};

fn random(shape: &[usize], seed: u64) -> Tensor {
    StepRng::new(seed, 0, stream::INIT)
        .normal(shape, &Device::Cpu)
        .unwrap()
}

/// Compares `f` in f32 (fused) with `f` in f64 (composed).
fn agree(what: &str, shapes: &[&[usize]], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let inputs: Vec<Tensor> = (0u64..).zip(shapes).map(|(i, s)| random(s, i)).collect();
    let wide: Vec<Tensor> = inputs
        .iter()
        .map(|t| t.to_dtype(DType::F64).unwrap())
        .collect();
    let (fused, oracle) = (f(&inputs).unwrap(), f(&wide).unwrap());
    assert_eq!(fused.dims(), oracle.dims(), "{what}");
    let largest = flat(&oracle).iter().fold(0f64, |m, v| m.max(v.abs()));
    let diff = max_diff(&fused, &oracle);
    assert!(
        diff <= 5e-6 * largest,
        "{what}: off by {diff:e} of {largest}"
    );
}

#[test]
fn convolutions_agree() {
    let same = Conv2d::padded(1);
    let halve = Conv2d {
        stride: 2,
        before: 0,
        after: 1,
        upsample: 1,
    };
    let double = Conv2d {
        upsample: 2,
        ..same
    };
    let odd = Conv2d {
        stride: 3,
        before: 2,
        after: 1,
        upsample: 2,
    };
    // Sizes with one band and with many, bands that begin inside a row, fewer and more outputs than gemm wants.
    for (b, c, o, h, w) in [
        (1, 1, 1, 1, 1),
        (2, 3, 5, 4, 7),
        (1, 70, 20, 33, 29),
        (1, 256, 3, 21, 30),
        (2, 512, 17, 12, 10),
        (1, 3, 33, 1, 200),
        (1, 2, 33, 150, 1),
    ] {
        for (k, conv) in [
            (3, same),
            (1, Conv2d::padded(0)),
            (3, halve),
            (3, double),
            (5, Conv2d::padded(2)),
            (2, odd),
        ] {
            if k > h.min(w) * conv.upsample + conv.before + conv.after {
                continue;
            }
            let what = format!("{b}×{c}×{h}×{w} to {o} with {k}, {conv:?}");
            agree(&what, &[&[b, c, h, w], &[o, c, k, k], &[o]], |t| {
                ops::conv2d(&t[0], &t[1], &t[2], conv)
            });
        }
    }
}

#[test]
fn group_norms_agree() {
    for (shape, groups) in [
        (&[1, 1, 1, 2][..], 1),
        (&[2, 6, 3, 5], 3),
        (&[1, 32, 70, 71], 8),
        (&[3, 4, 9], 4),
        (&[2, 64, 33, 31], 1),
    ] {
        let c = &[shape[1]][..];
        agree(&format!("{shape:?}"), &[shape, c, c], |t| {
            ops::group_norm(&t[0], &t[1], &t[2], groups, 1e-6)
        });
        agree(&format!("SiLU of {shape:?}"), &[shape, c, c], |t| {
            ops::group_norm_silu(&t[0], &t[1], &t[2], groups, 1e-6)
        });
    }
}

#[test]
fn a_mean_far_from_zero_costs_no_digits() {
    // σ = 1 around 1000: the difference of squares would keep one digit of the variance.
    let x = (random(&[1, 4, 64, 64], 5) + 1000.0).unwrap();
    let (w, b) = (random(&[4], 6), random(&[4], 7));
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let fused = ops::group_norm(&x, &w, &b, 2, 1e-6).unwrap();
    let oracle = ops::group_norm(&wide(&x), &wide(&w), &wide(&b), 2, 1e-6).unwrap();
    // The mean itself is rounded to f32: half a unit in the last place of 1000 is 3e-5.
    let diff = max_diff(&fused, &oracle);
    assert!(diff < 1e-4, "{diff}");
}

#[test]
fn a_backward_is_an_error() {
    let x = Var::from_tensor(&random(&[1, 2, 4, 4], 0)).unwrap();
    let (w, b) = (random(&[2, 2, 3, 3], 1), random(&[2], 2));
    let y = ops::conv2d(&x, &w, &b, Conv2d::padded(1)).unwrap();
    let error = y.sum_all().unwrap().backward().unwrap_err().to_string();
    assert!(error.contains("conv2d for inference"), "{error}");
    let y = ops::group_norm(&x, &b, &b, 1, 1e-6).unwrap();
    let error = y.sum_all().unwrap().backward().unwrap_err().to_string();
    assert!(error.contains("group norm for inference"), "{error}");
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let x = random(&[1, 2, 4, 4], 0);
    let (w, b) = (random(&[3, 2, 3, 3], 1), random(&[3], 2));
    let fails = |x: &Tensor, w: &Tensor, b: &Tensor, conv| ops::conv2d(x, w, b, conv).is_err();
    let same = Conv2d::padded(1);
    assert!(!fails(&x, &w, &b, same));
    assert!(fails(&random(&[1, 3, 4, 4], 0), &w, &b, same));
    assert!(fails(&x, &random(&[3, 2, 3, 2], 0), &b, same));
    assert!(fails(&x, &w, &random(&[2], 0), same));
    assert!(fails(&x, &w, &b, Conv2d { stride: 0, ..same }));
    assert!(fails(
        &x,
        &w,
        &b,
        Conv2d {
            upsample: 0,
            ..same
        }
    ));
    // A kernel larger than the padded image.
    assert!(fails(&random(&[1, 2, 2, 4], 0), &w, &b, Conv2d::padded(0)));
    assert!(ops::group_norm(&x, &b, &b, 1, 1e-6).is_err());
    let two = random(&[2], 0);
    assert!(ops::group_norm(&x, &two, &two, 0, 1e-6).is_err());
    assert!(ops::group_norm(&random(&[1, 2, 3], 0), &two, &two, 2, 1e-6).is_ok());
    assert!(ops::group_norm(&random(&[1, 3, 3], 0), &b, &b, 2, 1e-6).is_err());
}

#[test]
fn what_is_not_a_number_stays() {
    let mut values = vec![1f32; 2 * 6 * 6];
    values[40] = f32::NAN;
    let x = Tensor::from_vec(values, (1, 2, 6, 6), &Device::Cpu).unwrap();
    let (w, b) = (random(&[3, 2, 3, 3], 1), random(&[3], 2));
    let y = ops::conv2d(&x, &w, &b, Conv2d::padded(1)).unwrap();
    let lost = flat(&y).iter().filter(|v| v.is_nan()).count();
    assert_eq!(lost, 3 * 6, "the neighbours of a pixel at the edge");
    let two = random(&[2], 3);
    let y = ops::group_norm_silu(&x, &two, &two, 2, 1e-6).unwrap();
    let lost = flat(&y).iter().filter(|v| v.is_nan()).count();
    assert_eq!(lost, 36, "the group");
}
