//! The kernels of a GPU against the CPU. Without a GPU there is nothing to test, which is a failure where
//! `TINYFUSION_NEED_CUDA=1` says that there is one.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stdout)] // a test may panic and says what it skips

use candle_core::{DType, Device, Tensor, Var};
use tinyfusion_nn::{Lanes, ops, parity};

fn gpu() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) if std::env::var("TINYFUSION_NEED_CUDA").is_ok_and(|v| v == "1") => {
            panic!("TINYFUSION_NEED_CUDA=1, and there is no GPU: {error}")
        }
        Err(_) => {
            println!("no GPU: skipped");
            None
        }
    }
}

#[test]
fn a_gpu_computes_what_the_cpu_does() {
    let Some(device) = gpu() else { return };
    let mut failures = Vec::new();
    for check in parity::checks() {
        let line = match check.run(&device) {
            Ok(found) if found.is_within() => {
                println!("{check:?}: {:.1e} at {}", found.off, found.at);
                continue;
            }
            Ok(found) => format!(
                "{check:?}: {:.1e} at {}, allowed {:.0e}",
                found.off, found.at, found.allowed
            ),
            Err(error) => format!("{check:?}: {error}"),
        };
        println!("FAILED {line}");
        failures.push(line);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// What is not a variable costs no gradient, and what is not asked for is not there.
#[test]
fn frozen_operands_form_no_gradient() {
    let Some(device) = gpu() else { return };
    let tensor = |shape: &[usize]| Tensor::ones(shape, DType::F32, &device).unwrap();
    let var = |shape: &[usize]| Var::from_tensor(&tensor(shape)).unwrap();
    let grads = |out: Tensor| out.sum_all().unwrap().backward().unwrap();

    let (x, w, b) = (var(&[3, 4]), tensor(&[5, 4]), tensor(&[5]));
    let found = grads(ops::linear_gelu(&x, &w, &b).unwrap());
    assert!(found.get(&x).is_some());
    assert!(found.get(&w).is_none() && found.get(&b).is_none());

    let (x, w, b) = (tensor(&[3, 4]), var(&[5, 4]), tensor(&[5]));
    let found = grads(ops::linear(&x, &w, Some(&b)).unwrap());
    assert!(found.get(&w).is_some());
    assert!(found.get(&x).is_none() && found.get(&b).is_none());

    let (x, m) = (tensor(&[2, 3, 4]), var(&[2, 8]));
    let found = grads(ops::layer_norm_modulate(&x, &m, 0, 1, 1e-6).unwrap());
    assert!(found.get(&m).is_some() && found.get(&x).is_none());

    let (x, y, m) = (tensor(&[2, 3, 4]), var(&[2, 3, 4]), tensor(&[2, 8]));
    let found = grads(ops::gated_residual(&x, &y, &m, 1).unwrap());
    assert!(found.get(&y).is_some());
    assert!(found.get(&x).is_none() && found.get(&m).is_none());
}

/// Views that begin in the middle of a storage, and others that are not contiguous.
#[test]
fn operands_may_be_views() {
    let Some(device) = gpu() else { return };
    let values: Vec<f32> = (0..2 * 6 * 30).map(|i| (i as f32 * 0.37).sin()).collect();
    let on = |device: &Device| {
        let all = Tensor::from_vec(values.clone(), (2, 6, 30), device).unwrap();
        let part = all.narrow(0, 1, 1).unwrap(); // begins in the middle
        let turned = all.transpose(0, 1).unwrap(); // (6, 2, 30)
        let from_one = |n: usize| all.flatten_all().unwrap().narrow(0, 1, n).unwrap();
        let odd = from_one(64); // not at 16 bytes, though sizes are multiples of them
        let odd_heads = from_one(6 * 48).reshape((1, 6, 48)).unwrap();
        let outs = [
            ops::attention(&part, 2).unwrap(),
            ops::attention(&turned, 2).unwrap(),
            ops::attention(&odd_heads, 2).unwrap(),
            ops::gelu_tanh(&turned).unwrap(),
            ops::gelu_tanh(&odd).unwrap(),
            ops::layer_norm_modulate(
                &turned,
                &turned
                    .narrow(1, 1, 1)
                    .unwrap()
                    .squeeze(1)
                    .unwrap()
                    .repeat((1, 2))
                    .unwrap(),
                1,
                0,
                1e-6,
            )
            .unwrap(),
        ];
        outs.map(|out| {
            let out = out.to_device(&Device::Cpu).unwrap();
            out.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        })
    };
    for (i, (got, want)) in on(&device).iter().zip(&on(&Device::Cpu)).enumerate() {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < 1e-5, "output {i}: {g} instead of {w}");
        }
    }
}

/// A NaN comes through instead of being hidden, and large scores do not overflow.
#[test]
fn extreme_inputs_stay_finite_and_nan_is_not_hidden() {
    let Some(device) = gpu() else { return };
    for dtype in [DType::F32, DType::BF16] {
        let tensor = |values: Vec<f32>, shape: (usize, usize, usize)| {
            Tensor::from_vec(values, shape, &Device::Cpu)
                .unwrap()
                .to_dtype(dtype)
                .unwrap()
                .to_device(&device)
                .unwrap()
        };
        let flat = |t: Tensor| {
            let t = t.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            t.to_vec1::<f32>().unwrap()
        };
        let large: Vec<f32> = (0..70 * 12).map(|i| (i as f32).sin() * 1e3).collect();
        let out = flat(ops::attention(&tensor(large, (1, 70, 12)), 2).unwrap());
        assert!(out.iter().all(|v| v.is_finite()));
        let nan = tensor(vec![f32::NAN; 4 * 12], (1, 4, 12));
        assert!(
            flat(ops::attention(&nan, 2).unwrap())
                .iter()
                .all(|v| v.is_nan())
        );
        assert!(
            flat(ops::gelu_tanh(&nan).unwrap())
                .iter()
                .all(|v| v.is_nan())
        );
        let wide = tensor(vec![-1e4, -90.0, 0.0, 90.0, 1e4, 1.0], (1, 2, 3));
        for y in [
            ops::gelu_tanh(&wide).unwrap(),
            ops::gelu_erf(&wide).unwrap(),
            ops::silu(&wide).unwrap(),
        ] {
            assert!(flat(y).iter().all(|v| v.is_finite()));
        }
    }
}

/// candle looks a kernel up without making the GPU's context that of the thread.
#[test]
fn work_of_lanes_may_begin_with_any_operation() {
    let Some(device) = gpu() else { return };
    let x = Tensor::ones(3, DType::F32, &device).unwrap();
    let doubled = |()| Ok((&x * 2.0)?.to_vec1::<f32>()?);
    assert_eq!(doubled(()).unwrap(), [2.0; 3]);
    let lanes = Lanes::new(1).unwrap().on(&device);
    assert_eq!(lanes.run(vec![()], doubled).unwrap(), [[2.0; 3]]);
}
