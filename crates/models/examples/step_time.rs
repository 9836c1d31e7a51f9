//! Seconds per training step of a DiT: `cargo run --release -p tinyfusion-models --example step_time -- BATCH DEPTH WIDTH HEADS PATCH`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use candle_core::{Device, Tensor};
use tinyfusion_core::{LatentQuery, Plan, Result, StepRng, run, stream};
use tinyfusion_models::{DiT, DiTConfig};

fn main() -> Result<()> {
    let arg = |i: usize, default: usize| {
        std::env::args()
            .nth(i)
            .and_then(|a| a.parse().ok())
            .unwrap_or(default)
    };
    let (batch, dev) = (arg(1, 64), &Device::Cpu);
    let config = DiTConfig {
        input_size: 32,
        patch_size: arg(5, 4),
        in_channels: 3,
        hidden_size: arg(3, 64),
        depth: arg(2, 16),
        num_heads: arg(4, 4),
        num_classes: 10,
        learn_sigma: false,
        ..DiTConfig::default()
    };
    let mut weights = config.init(0, dev)?;
    weights.make_trainable(|n| !DiTConfig::is_fixed(n))?;
    let (net, frozen) = (
        DiT::new(&config, &weights)?,
        DiT::new(&config, &weights.detached())?,
    );
    let plan = Plan::full(config.depth);
    let mut rng = StepRng::new(0, 0, stream::DRAW);
    let query = LatentQuery {
        x: rng.normal((batch, 3, 32, 32), dev)?,
        t: Tensor::full(500f32, batch, dev)?,
        y: Tensor::zeros(batch, candle_core::DType::U32, dev)?,
    };
    let (mut forward, mut both) = (Vec::new(), Vec::new());
    for _ in 0..8 {
        let start = Instant::now();
        run(&frozen, &query, &plan)?;
        forward.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        run(&net, &query, &plan)?
            .output
            .sqr()?
            .mean_all()?
            .backward()?;
        both.push(start.elapsed().as_secs_f64());
    }
    forward.sort_by(f64::total_cmp);
    both.sort_by(f64::total_cmp);
    println!(
        "{} parameters; forward {:.3} s, forward + backward {:.3} s (medians)",
        config.parameters(),
        forward[4],
        both[4]
    );
    Ok(())
}
