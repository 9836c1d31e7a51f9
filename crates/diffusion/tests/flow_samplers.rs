//! The samplers of an interpolant against the exact solution on Gaussian data, where the ideal network has a closed form.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use std::cell::Cell;

use candle_core::{DType, Device, Tensor};
use tinyfusion_core::{Error, Result, StepRng, stream};
use tinyfusion_diffusion::samplers::{
    LastStep, OdeConfig, OdeMethod, SdeConfig, SdeMethod, TimeStep, Tolerance, dormand_prince, ode,
    sde,
};
use tinyfusion_diffusion::{DiffusionForm, Interpolant, InterpolantConfig, Path, Prediction};
use tinyfusion_testing::max_diff;

/// Data x ~ N(MEAN, SPREAD²) in every pixel.
const MEAN: f64 = 0.3;
const SPREAD: f64 = 0.5;

const PATHS: [Path; 3] = [Path::Linear, Path::Gvp, Path::Vp];

fn process(path: Path, prediction: Prediction) -> Interpolant {
    Interpolant::new(InterpolantConfig {
        path,
        prediction,
        ..InterpolantConfig::default()
    })
    .unwrap()
}

/// The variance of x_t, and σ·dσ/dt; both go on smoothly beyond t = 1, where a solver may step.
fn variance(path: Path, t: f64) -> (f64, f64) {
    let alpha = path.alpha(t);
    let (noise, slope) = match path {
        Path::Vp => (1.0 - alpha * alpha, -alpha * alpha * path.log_slope(t)),
        _ => (path.sigma(t).powi(2), path.sigma(t) * path.d_sigma(t)),
    };
    ((alpha * SPREAD).powi(2) + noise, slope)
}

/// What the ideal network says of x_t: E[x | x_t] = m + s²α/V·(x_t − αm), E[ε | x_t] = σ/V·(x_t − αm).
fn ideal(process: &Interpolant, x: &Tensor, t: &Tensor) -> Result<Tensor> {
    let times = t.to_vec1::<f32>()?;
    assert!(times.iter().all(|v| *v == times[0]), "one time per step");
    let (t, path) = (f64::from(times[0]), process.config().path);
    let (alpha, (v, slope)) = (path.alpha(t), variance(path, t));
    // a·(x_t − αm) + b
    let (a, b) = match process.config().prediction {
        Prediction::Noise => (path.sigma(t) / v, 0.0),
        Prediction::Score => (-1.0 / v, 0.0),
        Prediction::Velocity => (
            (path.d_alpha(t) * SPREAD * SPREAD * alpha + slope) / v,
            path.d_alpha(t) * MEAN,
        ),
    };
    Ok(x.affine(a, b - a * alpha * MEAN)?)
}

/// The probability flow keeps quantiles: x_t is the quantile `z` of N(αm, V) at all times.
fn exact(path: Path, t: f64, z: f64) -> f64 {
    path.alpha(t) * MEAN + variance(path, t).0.sqrt() * z
}

fn pixel(value: f64) -> Tensor {
    Tensor::full(value as f32, (1, 1, 1, 1), &Device::Cpu).unwrap()
}

fn value(x: &Tensor) -> f64 {
    f64::from(x.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0])
}

fn silent(_: &TimeStep<'_>) -> Result<()> {
    Ok(())
}

/// The largest error on the way of a run from the exact start, over several quantiles: at one time or quantile
/// alone it may change its sign.
fn error(process: &Interpolant, config: OdeConfig) -> f64 {
    const Z: [f64; 5] = [-1.7, -0.6, 0.2, 0.9, 1.3];
    let (path, (t0, t1)) = (process.config().path, process.config().ode_interval());
    let (from, to) = if config.reverse { (t1, t0) } else { (t0, t1) };
    let row = |t: f64| {
        let values = Z.map(|z| exact(path, t, z));
        Tensor::new(&values, &Device::Cpu)
            .unwrap()
            .reshape((1, 1, 1, 5))
            .unwrap()
    };
    let mut worst = 0f64;
    let net = |x: &Tensor, t: &Tensor| ideal(process, x, t);
    let end = ode(process, config, &row(from), net, |step| {
        if step.accepted && (0.0..=t1).contains(&step.to) {
            worst = worst.max(max_diff(step.sample, &row(step.to)));
        }
        Ok(())
    })
    .unwrap();
    worst.max(max_diff(&end, &row(to)))
}

#[test]
fn euler_converges_with_first_order_and_heun_with_second() {
    for (path, prediction) in [
        (Path::Linear, Prediction::Velocity),
        (Path::Gvp, Prediction::Velocity),
        (Path::Vp, Prediction::Velocity),
        (Path::Vp, Prediction::Score),
    ] {
        let process = process(path, prediction);
        for reverse in [false, true] {
            let at = |method, num_steps| {
                let config = OdeConfig {
                    method,
                    num_steps,
                    reverse,
                    ..OdeConfig::default()
                };
                error(&process, config)
            };
            let order = |method| (at(method, 41) / at(method, 81)).log2();
            let (first, second) = (order(OdeMethod::Euler), order(OdeMethod::Heun));
            assert!(
                (0.8..1.25).contains(&first),
                "{path} {reverse} Euler {first}"
            );
            assert!(
                (1.7..2.4).contains(&second),
                "{path} {reverse} Heun {second}"
            );
        }
    }
}

#[test]
fn dormand_prince_meets_its_tolerance() {
    for path in PATHS {
        let process = process(path, Prediction::Velocity);
        for reverse in [false, true] {
            // The tolerance is of a step, not of the whole way, and of the end of a step: coarser ones step
            // over all of the last half at once.
            for rtol in [1e-4, 1e-5] {
                let config = OdeConfig {
                    atol: 1e-3 * rtol,
                    rtol,
                    reverse,
                    ..OdeConfig::default()
                };
                let far = error(&process, config);
                assert!(far < 20.0 * rtol, "{path} {reverse} {rtol}: {far}");
            }
        }
    }
}

#[test]
fn dormand_prince_meets_its_tolerance_between_its_steps_too() {
    // y' = λy on both ends of time, asked at many times of which no step knows.
    let times: Vec<f64> = (0..=20).map(|i| f64::from(i) * 0.1).collect();
    let tolerance = Tolerance {
        atol: 1e-7,
        rtol: 1e-5,
    };
    for lambda in [-2.0, 1.0] {
        for backwards in [false, true] {
            let times: Vec<f64> = times
                .iter()
                .map(|t| if backwards { -t } else { *t })
                .collect();
            let mut steps = 0;
            let found = dormand_prince(
                |_, y| Ok((y * lambda)?),
                &pixel(1.0),
                &times,
                tolerance,
                |step| {
                    steps = step.done;
                    Ok(())
                },
            )
            .unwrap();
            assert_eq!(found.len(), times.len());
            assert!(
                steps < times.len(),
                "{steps} steps are not bound to the times"
            );
            for (t, y) in times.iter().zip(&found) {
                let known = (lambda * t).exp();
                assert!(
                    (value(y) - known).abs() < 1e-4 * known,
                    "{lambda} {t}: {}",
                    value(y)
                );
            }
        }
    }
}

#[test]
fn noise_that_is_added_is_taken_away_again() {
    let shape = (64, 1, 16, 16);
    let z = StepRng::new(2, 0, stream::SAMPLE)
        .normal(shape, &Device::Cpu)
        .unwrap();
    let noise = |k: usize| StepRng::new(3, k as u64, stream::SAMPLE).normal(shape, &Device::Cpu);
    let run = |process: &Interpolant, config: SdeConfig| {
        let net = |x: &Tensor, t: &Tensor| ideal(process, x, t);
        let x = sde(process, config, &z, net, noise, silent).unwrap();
        let mean = f64::from(x.mean_all().unwrap().to_scalar::<f32>().unwrap());
        let centered = (&x - mean).unwrap().sqr().unwrap();
        let spread = f64::from(centered.mean_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
        // Standard errors are 0.004 and 0.6 %; the rest is for steps of 1/200.
        assert!(
            (mean - MEAN).abs() < 0.02 && (spread / SPREAD - 1.0).abs() < 0.04,
            "{config:?} {:?}: mean {mean}, spread {spread}",
            process.config()
        );
    };
    use DiffusionForm::{Constant, Decreasing, IncreasingDecreasing, Linear, Sbdm, Sigma};
    for method in [SdeMethod::Euler, SdeMethod::Heun] {
        for form in [Constant, Sigma, Linear, Decreasing, IncreasingDecreasing] {
            let config = SdeConfig {
                method,
                form,
                // Not the mean: it takes away what the constant form would have added.
                last_step: LastStep::Euler,
                last_step_size: 0.01,
                num_steps: 200,
                ..SdeConfig::default()
            };
            run(&process(Path::Linear, Prediction::Velocity), config);
        }
        for (path, prediction) in [
            (Path::Vp, Prediction::Noise),
            (Path::Gvp, Prediction::Score),
        ] {
            let form = if path == Path::Vp { Sbdm } else { Sigma };
            // The mean and the flow of a broad step keep the spread; a Tweedie step sharpens it.
            for last_step in [LastStep::Mean, LastStep::Euler] {
                let config = SdeConfig {
                    method,
                    form,
                    last_step,
                    last_step_size: 0.01,
                    num_steps: 400,
                    ..SdeConfig::default()
                };
                run(&process(path, prediction), config);
            }
        }
    }
}

#[test]
fn without_diffusion_the_stochastic_equation_is_the_flow() {
    let process = process(Path::Linear, Prediction::Velocity);
    let net = |x: &Tensor, t: &Tensor| ideal(&process, x, t);
    let config = SdeConfig {
        norm: 0.0,
        last_step: LastStep::Euler,
        last_step_size: 0.1,
        num_steps: 10,
        ..SdeConfig::default()
    };
    let noise = |_| Ok(pixel(1.0));
    let by_sde = sde(&process, config, &pixel(1.3), net, noise, silent).unwrap();
    let config = OdeConfig {
        method: OdeMethod::Euler,
        num_steps: 11,
        ..OdeConfig::default()
    };
    let by_ode = ode(&process, config, &pixel(1.3), net, silent).unwrap();
    assert!((value(&by_sde) - value(&by_ode)).abs() < 1e-6);
}

#[test]
fn steps_are_reported_in_order_and_an_error_ends_the_run() {
    let process = process(Path::Linear, Prediction::Velocity);
    let net = |x: &Tensor, t: &Tensor| ideal(&process, x, t);
    let config = SdeConfig {
        last_step_size: 0.2,
        num_steps: 5,
        ..SdeConfig::default()
    };
    let (mut seen, mut asked) = (Vec::new(), Vec::new());
    let noise = |k| {
        asked.push(k);
        Ok(pixel(0.0))
    };
    sde(&process, config, &pixel(1.0), net, noise, |step| {
        seen.push((step.done, step.total));
        Ok(())
    })
    .unwrap();
    assert_eq!(asked, [0, 1, 2, 3]);
    assert_eq!(seen, (1..=5).map(|k| (k, Some(5))).collect::<Vec<_>>());
    for method in [OdeMethod::Euler, OdeMethod::Heun, OdeMethod::Dopri5] {
        let config = OdeConfig {
            method,
            ..OdeConfig::default()
        };
        let mut steps = 0;
        let stopped = ode(&process, config, &pixel(1.0), net, |step| {
            steps += 1;
            assert!(step.to > step.from);
            match step.done {
                2 => Err(Error::Interrupted { step: 2 }),
                _ => Ok(()),
            }
        });
        assert!(matches!(stopped, Err(Error::Interrupted { step: 2 })));
        assert!(steps >= 2);
    }
}

#[track_caller]
fn usage<T: std::fmt::Debug>(found: Result<T>, part: &str) {
    match found {
        Err(Error::Usage(message)) => assert!(message.contains(part), "{message}"),
        other => panic!("{other:?} instead of an error about {part}"),
    }
}

#[test]
fn settings_of_the_ode_out_of_range_are_usage_errors() {
    let process = process(Path::Linear, Prediction::Velocity);
    let run = |config| {
        let net = |x: &Tensor, t: &Tensor| ideal(&process, x, t);
        ode(&process, config, &pixel(1.0), net, silent)
    };
    for num_steps in [0, 1, 1_000_001, usize::MAX] {
        for method in [OdeMethod::Euler, OdeMethod::Heun] {
            let config = OdeConfig {
                method,
                num_steps,
                ..OdeConfig::default()
            };
            usage(run(config), &num_steps.to_string());
        }
    }
    for (atol, rtol) in [
        (f64::NAN, 1e-3),
        (1e-6, f64::INFINITY),
        (-1.0, 1e-3),
        (0.0, 0.0),
    ] {
        let config = OdeConfig {
            atol,
            rtol,
            ..OdeConfig::default()
        };
        usage(run(config), "atol");
    }
    let field = |_: f64, y: &Tensor| Ok(y.clone());
    for times in [
        &[0.0][..],
        &[],
        &[0.0, 0.0],
        &[0.0, 1.0, 0.5],
        &[0.0, f64::NAN],
    ] {
        let tolerance = Tolerance::default();
        usage(
            dormand_prince(field, &pixel(1.0), times, tolerance, silent),
            "times",
        );
    }
}

#[test]
fn settings_of_the_sde_out_of_range_are_usage_errors_before_the_network_runs() {
    let run = |process: &Interpolant, config: SdeConfig| {
        let net = |_: &Tensor, _: &Tensor| panic!("nothing is to be asked");
        sde(
            process,
            config,
            &pixel(1.0),
            net,
            |_| Ok(pixel(0.0)),
            silent,
        )
    };
    let (linear, plain) = (
        process(Path::Linear, Prediction::Velocity),
        SdeConfig::default(),
    );
    for num_steps in [0, 1, usize::MAX] {
        usage(run(&linear, SdeConfig { num_steps, ..plain }), "steps");
    }
    for norm in [f64::NAN, f64::INFINITY, -1.0] {
        usage(run(&linear, SdeConfig { norm, ..plain }), "norm");
    }
    for last_step_size in [f64::NAN, 0.0, -0.1, 1.0, f64::INFINITY] {
        let config = SdeConfig {
            last_step_size,
            ..plain
        };
        usage(run(&linear, config), "last_step_size");
    }
    let sbdm = SdeConfig {
        form: DiffusionForm::Sbdm,
        ..plain
    };
    usage(run(&linear, sbdm), "Sbdm");
    // To t = 1 itself, where a velocity tells no score.
    let to_the_end = SdeConfig {
        method: SdeMethod::Heun,
        last_step: LastStep::None,
        ..plain
    };
    usage(run(&linear, to_the_end), "at t = 1");
    let far = Interpolant::new(InterpolantConfig {
        sample_eps: Some(0.3),
        prediction: Prediction::Noise,
        ..InterpolantConfig::default()
    })
    .unwrap();
    let config = SdeConfig {
        last_step_size: 0.8,
        ..plain
    };
    usage(run(&far, config), "leaves nothing");
}

#[test]
fn a_network_that_fails_is_an_error_and_no_sample() {
    let config = OdeConfig::default();
    let process_ = process(Path::Linear, Prediction::Velocity);
    let calls = Cell::new(0);
    let sick = |x: &Tensor, _: &Tensor| {
        calls.set(calls.get() + 1);
        Ok((x * f64::NAN)?)
    };
    let found = ode(&process_, config, &pixel(1.0), sick, silent);
    assert!(matches!(&found, Err(Error::Run(_))), "{found:?}");
    assert!(calls.get() < 20, "{} calls", calls.get());
    let wide = |_: &Tensor, _: &Tensor| Ok(Tensor::zeros((1, 2, 1, 1), DType::F32, &Device::Cpu)?);
    usage(
        ode(&process_, config, &pixel(1.0), wide, silent),
        "[1, 2, 1, 1]",
    );
    // Beyond t = 1 the path VP has no σ, which a prediction of noise needs.
    let vp = process(Path::Vp, Prediction::Noise);
    let net = |x: &Tensor, t: &Tensor| ideal(&vp, x, t);
    usage(ode(&vp, config, &pixel(1.0), net, silent), "no velocity");
}
