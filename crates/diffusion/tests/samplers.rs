//! Samplers against the exact solution on Gaussian data, where the ideal denoiser has a closed form.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use std::cell::RefCell;

use candle_core::{DType, Device, Tensor};
use tinyfusion_core::{Error, Result, StepRng, stream};
use tinyfusion_diffusion::samplers::{
    DdpmConfig, DpmSolverConfig, ddim, ddim_reverse, ddpm, dpm_solver_pp_2m,
};
use tinyfusion_diffusion::{
    Clip, DdimConfig, DiffusionConfig, GaussianDiffusion, Guidance, GuidedChannels, NoiseSchedule,
    Respacing, Target, Variance,
};

/// Data x_0 ~ N(MEAN, SPREAD²) in every pixel.
const MEAN: f64 = 0.3;
const SPREAD: f64 = 0.5;

fn chain(respacing: &str) -> GaussianDiffusion {
    GaussianDiffusion::new(DiffusionConfig {
        respacing: respacing.parse().unwrap(),
        variance: Variance::FixedSmall,
        target: Target::XStart,
        ..DiffusionConfig::default()
    })
    .unwrap()
}

fn trained() -> NoiseSchedule {
    NoiseSchedule::new(Default::default(), 1000, &Respacing::All).unwrap()
}

/// E[x_0 | x_t] = m + s²α/(α²s² + σ²) · (x_t − αm), at the time the sampler tells.
fn ideal(x: &Tensor, t: &Tensor, trained: &NoiseSchedule) -> Result<Tensor> {
    let t = t.to_vec1::<f32>()?;
    assert!(t.iter().all(|v| *v == t[0]), "one time per step");
    let bar = trained.alphas_cumprod[t[0] as usize];
    let gain = SPREAD * SPREAD * bar.sqrt() / (bar * SPREAD * SPREAD + 1.0 - bar);
    Ok(x.affine(gain, MEAN - gain * bar.sqrt() * MEAN)?)
}

/// The probability-flow solution: x_t is the same quantile `z` of N(αm, α²s² + σ²) at all times.
fn exact(bar: f64, z: f64) -> f64 {
    bar.sqrt() * MEAN + (bar * SPREAD * SPREAD + 1.0 - bar).sqrt() * z
}

fn pixel(value: f64) -> Tensor {
    Tensor::full(value as f32, (1, 1, 1, 1), &Device::Cpu).unwrap()
}

fn value(x: &Tensor) -> f64 {
    f64::from(x.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0])
}

fn no_noise(_: usize) -> Result<Tensor> {
    Err(Error::run("no noise was to be asked for"))
}

/// Error at chain index 0, before the last jump to σ = 0, of a sampler over `n` timesteps.
fn error_at_the_end(n: usize, second_order: bool) -> f64 {
    const Z: f64 = 1.3;
    let diffusion = chain(&n.to_string());
    let bars = &diffusion.schedule().alphas_cumprod;
    let trained = trained();
    let start = pixel(exact(bars[n - 1], Z));
    let reached = RefCell::new(f64::NAN);
    let watch = |step: &tinyfusion_diffusion::samplers::Step<'_>| {
        if step.index == 1 {
            *reached.borrow_mut() = value(step.sample);
        }
        Ok(())
    };
    let net = |x: &Tensor, t: &Tensor| ideal(x, t, &trained);
    if second_order {
        dpm_solver_pp_2m(&diffusion, DpmSolverConfig::default(), &start, net, watch).unwrap();
    } else {
        ddim(
            &diffusion,
            DdimConfig::default(),
            &start,
            net,
            no_noise,
            watch,
        )
        .unwrap();
    }
    (reached.into_inner() - exact(bars[0], Z)).abs()
}

#[test]
fn dpm_solver_converges_with_second_order_and_ddim_with_first() {
    let order =
        |second: bool| (error_at_the_end(81, second) / error_at_the_end(161, second)).log2();
    let (first, second) = (order(false), order(true));
    assert!((0.85..1.15).contains(&first), "DDIM has order {first}");
    assert!(
        (1.8..2.3).contains(&second),
        "DPM-Solver++ has order {second}"
    );
    assert!(error_at_the_end(161, true) < 0.5 * error_at_the_end(161, false));
}

#[test]
fn dpm_solver_agrees_with_ddim_of_many_steps() {
    let trained = trained();
    let z = StepRng::new(1, 0, stream::SAMPLE)
        .normal((4, 2, 3, 3), &Device::Cpu)
        .unwrap();
    let net = |x: &Tensor, t: &Tensor| ideal(x, t, &trained);
    let many = ddim(&chain(""), DdimConfig::default(), &z, net, no_noise, |_| {
        Ok(())
    })
    .unwrap();
    let few = dpm_solver_pp_2m(&chain("200"), DpmSolverConfig::default(), &z, net, |_| {
        Ok(())
    })
    .unwrap();
    let far = (many - few)
        .unwrap()
        .abs()
        .unwrap()
        .max_all()
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    assert!(far < 0.01, "off by {far}");
}

#[test]
fn ddpm_and_full_eta_ddim_have_the_moments_that_the_tables_foretell() {
    let trained = trained();
    let shape = (64, 1, 16, 16);
    let diffusion = chain("100");
    let z = StepRng::new(2, 0, stream::SAMPLE)
        .normal(shape, &Device::Cpu)
        .unwrap();
    let net = |x: &Tensor, t: &Tensor| ideal(x, t, &trained);
    let noise = |i: usize| StepRng::new(2, i as u64, stream::SAMPLE).normal(shape, &Device::Cpu);
    let config = DdimConfig {
        eta: 1.0,
        clip: Clip::Off,
    };
    let by_ddpm = ddpm(
        &diffusion,
        DdpmConfig::default(),
        &z,
        net,
        noise,
        |_| Ok(()),
    )
    .unwrap();
    let by_ddim = ddim(&diffusion, config, &z, net, noise, |_| Ok(())).unwrap();
    let far = (&by_ddpm - by_ddim)
        .unwrap()
        .abs()
        .unwrap()
        .max_all()
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    assert!(
        far < 1e-3,
        "with eta 1 and fixed_small variance DDIM is DDPM; off by {far}"
    );
    let n = by_ddpm.elem_count() as f64;
    let mean = f64::from(by_ddpm.mean_all().unwrap().to_scalar::<f32>().unwrap());
    let centered = (&by_ddpm - mean).unwrap().sqr().unwrap();
    let variance = f64::from(centered.mean_all().unwrap().to_scalar::<f32>().unwrap());
    let (expected_mean, expected_variance) = ancestral_moments(diffusion.schedule());
    // Four standard errors of a mean and of a variance over n independent pixels.
    assert!(
        (mean - expected_mean).abs() < 4.0 * (expected_variance / n).sqrt(),
        "mean {mean}, not {expected_mean}"
    );
    assert!(
        (variance / expected_variance - 1.0).abs() < 4.0 * (2.0 / n).sqrt(),
        "variance {variance}, not {expected_variance}"
    );
}

/// Mean and variance that ancestral sampling with the ideal denoiser arrives at: every step is
/// x' = (c1·gain + c2) x + const + N(0, β̃), so the moments follow from the tables alone.
fn ancestral_moments(s: &NoiseSchedule) -> (f64, f64) {
    let (mut mean, mut variance) = (0.0, 1.0);
    for t in (0..s.len()).rev() {
        let bar = s.alphas_cumprod[t];
        let gain = SPREAD * SPREAD * bar.sqrt() / (bar * SPREAD * SPREAD + 1.0 - bar);
        let slope = s.posterior_mean_coef1[t] * gain + s.posterior_mean_coef2[t];
        mean = slope * mean + s.posterior_mean_coef1[t] * MEAN * (1.0 - gain * bar.sqrt());
        variance = slope * slope * variance + s.posterior_variance[t];
    }
    (mean, variance)
}

#[test]
fn a_long_ancestral_chain_has_the_moments_of_the_data() {
    let (mean, variance) = ancestral_moments(&trained());
    assert!((mean - MEAN).abs() < 0.01, "mean {mean}");
    assert!(
        (variance.sqrt() / SPREAD - 1.0).abs() < 0.01,
        "standard deviation {}",
        variance.sqrt()
    );
}

#[test]
fn reversed_ddim_finds_the_noise_again() {
    let trained = trained();
    let diffusion = chain("");
    let last = diffusion.num_timesteps() - 1;
    let net = |x: &Tensor, t: &Tensor| ideal(x, t, &trained);
    // The last step leaves the chain for ᾱ = 0, so the noise itself is reached.
    let x = pixel(exact(1.0, 0.8));
    let noised = RefCell::new(x.clone());
    ddim_reverse(&diffusion, Clip::Off, &x, net, |step| {
        if step.index + 1 == last {
            *noised.borrow_mut() = step.sample.clone();
        }
        Ok(())
    })
    .unwrap();
    let noised = noised.into_inner();
    assert!((value(&noised) - exact(diffusion.schedule().alphas_cumprod[last], 0.8)).abs() < 0.02);
    let back = ddim(
        &diffusion,
        DdimConfig::default(),
        &noised,
        net,
        no_noise,
        |_| Ok(()),
    )
    .unwrap();
    assert!(
        (value(&back) - value(&x)).abs() < 0.02,
        "{} instead of {}",
        value(&back),
        value(&x)
    );
}

#[test]
fn steps_are_reported_in_order_and_an_error_ends_the_run() {
    let trained = trained();
    let seen = RefCell::new(Vec::new());
    let asked = RefCell::new(Vec::new());
    let result = ddpm(
        &chain("5"),
        DdpmConfig::default(),
        &pixel(0.1),
        |x, t| ideal(x, t, &trained),
        |i| {
            asked.borrow_mut().push(i);
            Ok(pixel(0.0))
        },
        |step| {
            seen.borrow_mut().push((step.done, step.total, step.index));
            if step.done == 3 {
                Err(Error::Interrupted { step: 3 })
            } else {
                Ok(())
            }
        },
    );
    assert!(matches!(result, Err(Error::Interrupted { step: 3 })));
    assert_eq!(seen.into_inner(), [(1, 5, 4), (2, 5, 3), (3, 5, 2)]);
    assert_eq!(asked.into_inner(), [4, 3, 2]);
}

#[test]
fn eta_outside_its_range_is_refused() {
    let trained = trained();
    let config = DdimConfig {
        eta: 1.5,
        clip: Clip::Off,
    };
    let net = |x: &Tensor, t: &Tensor| ideal(x, t, &trained);
    let error = ddim(&chain("5"), config, &pixel(0.0), net, no_noise, |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("1.5"), "{error}");
}

/// A network of two output channels per input channel: rows differ, so that the halves are told apart.
fn rowwise(x: &Tensor, t: &Tensor) -> Result<Tensor> {
    let row = Tensor::arange(0u32, x.dim(0)? as u32, &Device::Cpu)?.to_dtype(DType::F32)?;
    let row = (row + t)?.reshape(((), 1, 1, 1))?; // (2B, 1, 1, 1)
    Ok(Tensor::cat(
        &[x.broadcast_add(&row)?, x.broadcast_mul(&row)?],
        1,
    )?) // (2B, 2C, H, W)
}

#[test]
fn guidance_mixes_the_halves_of_the_guided_channels_only() {
    let mut rng = StepRng::new(3, 0, stream::SAMPLE);
    let x = rng.normal((2, 4, 2, 2), &Device::Cpu).unwrap();
    let t = Tensor::new(&[5f32, 5.0], &Device::Cpu).unwrap();
    let doubled_t = Tensor::cat(&[&t, &t], 0).unwrap();
    let doubled = Tensor::cat(&[&x, &x], 0).unwrap();
    let raw = rowwise(&doubled, &doubled_t)
        .unwrap()
        .to_dtype(DType::F64)
        .unwrap();
    let junk = Tensor::cat(&[&x, &(&x * 7.0).unwrap()], 0).unwrap();
    let scale = 2.5;
    for (channels, guided) in [(GuidedChannels::FirstThree, 3), (GuidedChannels::All, 4)] {
        let guidance = Guidance { scale, channels };
        let out = guidance.guide_doubled(&junk, &doubled_t, rowwise).unwrap();
        assert_eq!(out.dims(), [4, 8, 2, 2]);
        let at = |t: &Tensor, b: usize, c: usize| -> Vec<f64> {
            let row = t
                .to_dtype(DType::F64)
                .unwrap()
                .narrow(0, b, 1)
                .unwrap()
                .narrow(1, c, 1)
                .unwrap();
            row.flatten_all().unwrap().to_vec1().unwrap()
        };
        for b in 0..4 {
            for c in 0..8 {
                let expected: Vec<f64> = if c < guided {
                    let (cond, uncond) = (at(&raw, b % 2, c), at(&raw, b % 2 + 2, c));
                    cond.iter()
                        .zip(&uncond)
                        .map(|(c, u)| u + scale * (c - u))
                        .collect()
                } else {
                    at(&raw, b, c)
                };
                for (a, e) in at(&out, b, c).iter().zip(&expected) {
                    assert!(
                        (a - e).abs() < 1e-5,
                        "row {b}, channel {c}: {a} instead of {e}"
                    );
                }
            }
        }
        let half = guidance.guide(&x, &t, rowwise).unwrap();
        let first = out.narrow(0, 0, 2).unwrap();
        assert_eq!(
            (half - first)
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap(),
            0.0
        );
    }
}

#[test]
fn guidance_without_variance_channels_keeps_the_shape() {
    let x = Tensor::ones((2, 3, 2, 2), DType::F32, &Device::Cpu).unwrap();
    let t = Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
    let guidance = Guidance {
        scale: 1.0,
        channels: GuidedChannels::FirstThree,
    };
    let out = guidance.guide(&x, &t, |x, _| Ok((x * 2.0)?)).unwrap();
    assert_eq!(out.dims(), [2, 3, 2, 2]);
    let odd = Tensor::ones((3, 3, 2, 2), DType::F32, &Device::Cpu).unwrap();
    assert!(
        guidance
            .guide_doubled(&odd, &t, |x, _| Ok(x.clone()))
            .is_err()
    );
}
