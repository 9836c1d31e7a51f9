//! What a training step costs beside the network: the gradients' norm, AdamW and the averages, for a network
//! of about 1.3 million parameters in 170 tensors. `cargo run --release -p tinyfusion-train --example
//! step_overhead`
#![allow(clippy::print_stdout, clippy::unwrap_used)] // a measurement, not a library

use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use tinyfusion_core::StepRng;
use tinyfusion_nn::update::{AdamW, ema, sum_of_squares};

fn main() {
    // 17 blocks in the proportions of a DiT of width 64: qkv, proj, two MLP layers, modulation, biases.
    let block: [&[usize]; 10] = [
        &[192, 64],
        &[192],
        &[64, 64],
        &[64],
        &[256, 64],
        &[256],
        &[64, 256],
        &[64],
        &[384, 64],
        &[384],
    ];
    let mut rng = StepRng::new(0, 0, 0);
    let mut random = |shape: &[usize]| rng.normal(shape, &Device::Cpu).unwrap();
    let var = |t: &Tensor| Var::from_tensor(t).unwrap();
    let params: Vec<(Var, Tensor, Var, Var, Tensor)> = (0..17)
        .flat_map(|_| block)
        .map(|shape| {
            let (p, g) = (random(shape), random(shape));
            let zeros = p.zeros_like().unwrap();
            (var(&p), g, var(&zeros), var(&zeros), p.copy().unwrap())
        })
        .collect();
    let values: usize = params.iter().map(|p| p.1.elem_count()).sum();
    println!(
        "{values} parameters in {} tensors, milliseconds (best of 50):",
        params.len()
    );

    let adamw = AdamW {
        lr: 1e-4,
        betas: (0.9, 0.999),
        eps: 1e-8,
        weight_decay: 0.01,
    };
    let measure = |name: &str, work: &dyn Fn()| {
        let best = (0..50).map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64() * 1e3
        });
        println!("  {name:<32} {:.2}", best.fold(f64::INFINITY, f64::min));
    };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    pool.install(|| {
        measure("norm", &|| {
            let sum: f64 = params.iter().map(|p| sum_of_squares(&p.1).unwrap()).sum();
            assert!(sum.is_finite());
        });
        measure("norm, as candle would", &|| {
            for p in &params {
                p.1.sqr()
                    .unwrap()
                    .sum_all()
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap();
            }
        });
        measure("AdamW", &|| {
            for (p, g, m, v, _) in &params {
                adamw.step(p, g, m, v, 10, 0.5).unwrap();
            }
        });
        measure("averages", &|| {
            for (p, _, _, _, average) in &params {
                ema(average, p, 0.999).unwrap();
            }
        });
    });
}
