//! Seconds and peak memory of an autoencoder with random weights, beside the floor that its products set:
//! `cargo run --release -p tinyfusion-models --example vae_time -- [sd|kl16] SIDE encode|decode [REPEATS]`.
//! Peak memory is the process's, weights included, so each direction is a run of its own.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use candle_core::{Device, Tensor};
use tinyfusion_core::{Error, Result, StepRng, stream};
use tinyfusion_models::{AutoencoderKl, VaeConfig};

/// The speed of large products that the floor assumes; set it to what the machine reaches.
const GIGAFLOPS: f64 = 300.0;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |i: usize, default: &str| args.get(i).map_or(default, String::as_str).to_string();
    let number = |i: usize, default: &str| {
        let text = arg(i, default);
        text.parse::<usize>()
            .map_err(|_| Error::usage(format!("`{text}` is not a number")))
    };
    let config = match arg(0, "sd").as_str() {
        "sd" => VaeConfig::sd(),
        "kl16" => VaeConfig::kl16(),
        other => return Err(Error::usage(format!("`{other}` is neither sd nor kl16"))),
    };
    let (side, direction, repeats) = (number(1, "256")?, arg(2, "decode"), number(3, "3")?);
    let dev = &Device::Cpu;
    let net = AutoencoderKl::new(&config, &config.init(0, dev)?)?;
    let (mut rng, f) = (StepRng::new(0, 0, stream::SAMPLE), config.factor());
    let x = match direction.as_str() {
        "encode" => rng.normal((1, config.in_channels, side, side), dev)?,
        "decode" => rng.normal((1, config.latent_channels, side / f, side / f), dev)?,
        other => {
            return Err(Error::usage(format!(
                "`{other}` is neither encode nor decode"
            )));
        }
    };
    let run = |x: &Tensor| -> Result<Tensor> {
        match direction.as_str() {
            "encode" => Ok(net.encode(x)?.moments().clone()),
            _ => net.decode(x),
        }
    };
    let mut seconds = Vec::new();
    for _ in 0..repeats.max(1) {
        let start = Instant::now();
        let y = run(&x)?;
        seconds.push(start.elapsed().as_secs_f64());
        let finite = y.abs()?.mean_all()?.to_scalar::<f32>()?.is_finite();
        assert!(finite, "random weights give finite values");
    }
    seconds.sort_by(f64::total_cmp);
    let flops = match direction.as_str() {
        "encode" => config.encoder_flops(side),
        _ => config.decoder_flops(side),
    };
    let best = seconds[0];
    println!(
        "{direction} at {side}: best {best:.3} s, median {:.3} s of {}; {:.1} GFLOP, {:.0} GFLOP/s, floor at {GIGAFLOPS} GFLOP/s {:.3} s; peak {}",
        seconds[seconds.len() / 2],
        seconds.len(),
        flops / 1e9,
        flops / 1e9 / best,
        flops / 1e9 / GIGAFLOPS,
        peak(),
    );
    Ok(())
}

/// The most memory that this process ever held.
fn peak() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.map_or("unknown".into(), |l| l.trim().to_string())
}
