//! Every fused operation at the sizes of a DiT-S/2 block (2 samples, 256 tokens, width 384), forward and with backward:
//! `cargo bench -p tinyfusion-nn --profile release`. Beside each stands the composition of candle operations
//! that it replaces, where there is one in the crate's own words.
#![allow(clippy::unwrap_used)] // a measurement, not a library

use candle_core::{DType, Device, Result, Tensor, Var};
use divan::Bencher;
use tinyfusion_core::{StepRng, stream};
use tinyfusion_nn::ops::{self, LowRank};
use tinyfusion_nn::update::{AdamW, Parameter, Scale, sum_of_squares};
use tinyfusion_nn::{Gradients, recompute};

const B: usize = 2;
const T: usize = 256;
const D: usize = 384;
const HEADS: usize = 6;

fn main() {
    divan::main();
}

fn var(shape: &[usize]) -> Var {
    let t = StepRng::new(shape.len() as u64, 0, stream::INIT)
        .normal(shape, &Device::Cpu)
        .unwrap();
    Var::from_tensor(&(t * 0.1).unwrap()).unwrap()
}

/// Times `op` on variables of `shapes`: alone, or with its backward.
fn time(
    bencher: Bencher<'_, '_>,
    backward: bool,
    shapes: &[&[usize]],
    op: impl Fn(&[Tensor]) -> Result<Tensor> + Sync,
) {
    let vars: Vec<Var> = shapes.iter().map(|s| var(s)).collect();
    if !backward {
        let inputs: Vec<Tensor> = vars.iter().map(Var::as_detached_tensor).collect();
        return bencher.bench_local(|| op(&inputs).unwrap());
    }
    let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let mut sums = Gradients::new(&vars.iter().collect::<Vec<_>>());
    bencher.bench_local(|| {
        sums.clear();
        sums.backward(&op(&inputs).unwrap().sum_all().unwrap())
            .unwrap();
    });
}

#[divan::bench(args = [false, true])]
fn linear(b: Bencher<'_, '_>, backward: bool) {
    time(b, backward, &[&[B, T, D], &[3 * D, D], &[3 * D]], |t| {
        ops::linear(&t[0], &t[1], Some(&t[2]))
    });
}

/// Its backward forms dX only.
#[divan::bench(args = [false, true])]
fn linear_frozen(b: Bencher<'_, '_>, backward: bool) {
    let (w, bias) = (
        var(&[3 * D, D]).as_detached_tensor(),
        var(&[3 * D]).as_detached_tensor(),
    );
    time(b, backward, &[&[B, T, D]], move |t| {
        ops::linear(&t[0], &w, Some(&bias))
    });
}

#[divan::bench(args = [false, true])]
fn linear_low_rank(b: Bencher<'_, '_>, backward: bool) {
    let (w, bias) = (
        var(&[3 * D, D]).as_detached_tensor(),
        var(&[3 * D]).as_detached_tensor(),
    );
    time(b, backward, &[&[B, T, D], &[8, D], &[3 * D, 8]], move |t| {
        let update = LowRank {
            a: t[1].clone(),
            b: t[2].clone(),
            scale: 2.0,
        };
        ops::linear_low_rank(&t[0], &w, &bias, &update)
    });
}

#[divan::bench(args = [false, true])]
fn linear_gelu(b: Bencher<'_, '_>, backward: bool) {
    time(b, backward, &[&[B, T, D], &[4 * D, D], &[4 * D]], |t| {
        ops::linear_gelu(&t[0], &t[1], &t[2])
    });
}

#[divan::bench(args = [false, true])]
fn linear_gelu_erf(b: Bencher<'_, '_>, backward: bool) {
    time(b, backward, &[&[B, T, D], &[4 * D, D], &[4 * D]], |t| {
        ops::linear_gelu_erf(&t[0], &t[1], &t[2])
    });
}

fn a_tenth() -> ops::Dropout {
    ops::Dropout::new(0.1, &[1, 2], 0).unwrap()
}

#[divan::bench(args = [false, true])]
fn dropout(b: Bencher<'_, '_>, backward: bool) {
    let tenth = a_tenth();
    time(b, backward, &[&[B, T, D]], move |t| {
        ops::dropout(&t[0], &tenth)
    });
}

#[divan::bench(args = [false, true])]
fn attention_dropped(b: Bencher<'_, '_>, backward: bool) {
    let tenth = a_tenth();
    time(b, backward, &[&[B, T, 3 * D]], move |t| {
        ops::attention_dropped(&t[0], HEADS, &tenth)
    });
}

/// Every token a row with a modulation of its own, as in MAR's denoiser.
#[divan::bench(args = [false, true])]
fn modulate(b: Bencher<'_, '_>, backward: bool) {
    time(b, backward, &[&[B * T, D], &[B * T, 3 * D]], |t| {
        ops::modulate(&t[0], &t[1], 0, 1)
    });
}

#[divan::bench(args = [false, true])]
fn layer_norm(b: Bencher<'_, '_>, backward: bool) {
    time(b, backward, &[&[B, T, D], &[D], &[D]], |t| {
        ops::layer_norm(&t[0], &t[1], &t[2], 1e-6)
    });
}

#[divan::bench(args = [false, true])]
fn attention(b: Bencher<'_, '_>, backward: bool) {
    time(b, backward, &[&[B, T, 3 * D]], |t| {
        ops::attention(&t[0], HEADS)
    });
}

#[divan::bench(args = [false, true])]
fn layer_norm_modulate(b: Bencher<'_, '_>, backward: bool) {
    time(b, backward, &[&[B, T, D], &[B, 6 * D]], |t| {
        ops::layer_norm_modulate(&t[0], &t[1], 0, 1, 1e-6)
    });
}

#[divan::bench(args = [false, true])]
fn gated_residual(b: Bencher<'_, '_>, backward: bool) {
    time(b, backward, &[&[B, T, D], &[B, T, D], &[B, 6 * D]], |t| {
        ops::gated_residual(&t[0], &t[1], &t[2], 2)
    });
}

#[divan::bench(args = [false, true])]
fn gelu_tanh(b: Bencher<'_, '_>, backward: bool) {
    time(b, backward, &[&[B, T, 4 * D]], |t| ops::gelu_tanh(&t[0]));
}

#[divan::bench(args = [false, true])]
fn gelu_erf(b: Bencher<'_, '_>, backward: bool) {
    time(b, backward, &[&[B, T, 4 * D]], |t| ops::gelu_erf(&t[0]));
}

/// candle's, for comparison.
#[divan::bench(args = [false, true])]
fn gelu_of_candle(b: Bencher<'_, '_>, backward: bool) {
    time(b, backward, &[&[B, T, 4 * D]], |t| t[0].gelu());
}

/// `linear_gelu` once more in its backward.
#[divan::bench]
fn recomputed_linear_gelu(b: Bencher<'_, '_>) {
    time(b, true, &[&[B, T, D], &[4 * D, D], &[4 * D]], |t| {
        let (w, bias) = (t[1].clone(), t[2].clone());
        recompute(&t[0], &t[2], move |x, _| ops::linear_gelu(x, &w, &bias))
    });
}

/// A million values: 36 MB read or written.
#[divan::bench]
fn adamw_with_average(b: Bencher<'_, '_>) {
    let at = Parameter::new(var(&[1 << 20])).unwrap();
    let grad = Tensor::ones(1 << 20, DType::F32, &Device::Cpu).unwrap();
    let adamw = AdamW {
        lr: 1e-4,
        betas: (0.9, 0.999),
        eps: 1e-8,
        weight_decay: 0.01,
    };
    let half = Scale::Host(0.5);
    b.bench_local(|| adamw.step(&at, &grad, 10, &half, 0.999).unwrap());
}

#[divan::bench]
fn norm_of_gradients(b: Bencher<'_, '_>) {
    let grad = Tensor::ones(1 << 20, DType::F32, &Device::Cpu).unwrap();
    b.bench_local(|| sum_of_squares(&grad).unwrap());
}
