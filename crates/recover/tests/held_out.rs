//! The held-out loss is the mean over samples, fixed by its seed.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod common;

use candle_core::{Device, Tensor};
use common::{DEPTH, Imitate, USEFUL, USELESS, batch, build, weights};
use tinyfusion_core::{Error, Plan, Result, StepRng, run, stream};
use tinyfusion_diffusion::Objective;
use tinyfusion_recover::{LossEstimate, held_out_loss};

fn estimate(plan: &Plan, seed: u64) -> LossEstimate {
    let weights = weights();
    let net = build(&weights, 0.0).unwrap();
    held_out_loss(&net, plan, &Imitate::toy(&weights), (0..4).map(batch), seed).unwrap()
}

#[test]
fn mean_and_standard_error_are_those_of_all_samples() {
    let (weights, plan, seed) = (weights(), Plan::keep(DEPTH, &[0, 1]), 3);
    let (net, objective) = (build(&weights, 0.0).unwrap(), Imitate::toy(&weights));
    let mut all = Vec::new();
    for k in 0..4 {
        let draw = objective
            .draw(
                &batch(k).unwrap(),
                &mut StepRng::new(seed, k, stream::HELD_OUT),
            )
            .unwrap();
        let output = run(&net, &objective.input(&draw).unwrap(), &plan)
            .unwrap()
            .output;
        all.extend(
            objective
                .loss(&output, &draw)
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
                .into_iter()
                .map(f64::from),
        );
    }
    let n = all.len() as f64;
    let mean = all.iter().sum::<f64>() / n;
    let error = (all.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / (n - 1.0) / n).sqrt();
    let found = estimate(&plan, seed);
    assert_eq!(found.images, all.len() as u64);
    assert!((found.loss - mean).abs() < 1e-12 * mean && mean > 0.0);
    assert!((found.standard_error - error).abs() < 1e-12 * error && error > 0.0);
    assert_eq!(found, estimate(&plan, seed));
    assert_ne!(found, estimate(&plan, seed + 1));
}

#[test]
fn skipping_useful_blocks_costs_and_skipping_useless_ones_does_not() {
    let full = estimate(&Plan::full(DEPTH), 0).loss;
    let good = estimate(&Plan::keep(DEPTH, &USEFUL), 0).loss;
    let bad = estimate(&Plan::keep(DEPTH, &USELESS), 0).loss;
    assert_eq!(full, 0.0);
    assert!(good < 1e-4 && bad > 1e-2, "{good} {bad}");
}

#[test]
fn odd_batches_are_reported() {
    let weights = weights();
    let (net, objective, plan) = (
        build(&weights, 0.0).unwrap(),
        Imitate::toy(&weights),
        Plan::full(DEPTH),
    );
    let none: [Result<Tensor>; 0] = [];
    let found = held_out_loss(&net, &plan, &objective, none, 0);
    assert!(
        matches!(&found, Err(Error::Usage(m)) if m.contains("found 0")),
        "{found:?}"
    );
    let broken = [batch(0), Err(Error::usage("a broken image"))];
    let found = held_out_loss(&net, &plan, &objective, broken, 0);
    assert!(
        matches!(&found, Err(Error::Usage(m)) if m.contains("broken image")),
        "{found:?}"
    );
    // A diverged network is a result, not an error.
    let nan = [Tensor::full(f32::NAN, (2, 3, 2, 2), &Device::Cpu).map_err(Error::from)];
    assert!(
        held_out_loss(&net, &plan, &objective, nan, 0)
            .unwrap()
            .loss
            .is_nan()
    );
}
