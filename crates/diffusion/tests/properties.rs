//! Properties that hold for every chain, and the errors of malformed settings.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use tinyfusion_core::{Error, LatentBatch, StepRng, stream};
use tinyfusion_diffusion::{
    BetaSchedule, Clip, DenoisingObjective, DiffusionConfig, GaussianDiffusion, LabelDrop,
    NoiseSchedule, Respacing, Target, Variance,
};

fn schedules() -> impl Strategy<Value = BetaSchedule> {
    prop_oneof![Just(BetaSchedule::Linear), Just(BetaSchedule::Cosine)]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn a_respaced_chain_ascends_and_has_the_length_asked_for(steps in 2usize..2000, share in 0.0f64..1.0) {
        let n = 1 + (share * (steps - 1) as f64) as usize;
        let timesteps = n.to_string().parse::<Respacing>().unwrap().timesteps(steps).unwrap();
        prop_assert_eq!(timesteps.len(), n);
        prop_assert!(timesteps.windows(2).all(|w| w[0] < w[1]));
        prop_assert_eq!(timesteps[0], 0);
        prop_assert!(*timesteps.last().unwrap() < steps);
        if n > 1 {
            prop_assert_eq!(*timesteps.last().unwrap(), steps - 1);
        }
    }

    #[test]
    fn sections_stay_in_their_part_of_the_chain(steps in 60usize..2000, counts in prop::collection::vec(1usize..12, 1..6)) {
        let timesteps = Respacing::Sections(counts.clone()).timesteps(steps).unwrap();
        prop_assert_eq!(timesteps.len(), counts.iter().sum::<usize>());
        prop_assert!(timesteps.windows(2).all(|w| w[0] < w[1]));
        let (size, extra) = (steps / counts.len(), steps % counts.len());
        let (mut start, mut seen) = (0, 0);
        for (i, count) in counts.iter().enumerate() {
            let end = start + size + usize::from(i < extra);
            prop_assert!(timesteps[seen..seen + count].iter().all(|t| (start..end).contains(t)));
            (start, seen) = (end, seen + count);
        }
    }

    #[test]
    fn ddim_strides_are_constant_and_the_smallest(steps in 2usize..2000, stride in 1usize..50) {
        let count = steps.div_ceil(stride);
        let timesteps = Respacing::Ddim(count).timesteps(steps).unwrap();
        prop_assert_eq!(timesteps.len(), count);
        prop_assert_eq!(timesteps[0], 0);
        let found = timesteps.get(1).copied().unwrap_or(steps);
        prop_assert!(timesteps.windows(2).all(|w| w[1] - w[0] == found));
        prop_assert!(count == 1 || found <= stride);
    }

    #[test]
    fn respacings_survive_being_written(counts in prop::collection::vec(0usize..500, 1..5), ddim in 1usize..500) {
        for respacing in [Respacing::All, Respacing::Sections(counts), Respacing::Ddim(ddim)] {
            prop_assert_eq!(respacing.to_string().parse::<Respacing>().unwrap(), respacing);
        }
    }

    #[test]
    fn tables_satisfy_the_identities_of_the_posterior(schedule in schedules(), steps in 25usize..1500, share in 0.05f64..1.0) {
        let n = 2 + (share * (steps - 2) as f64) as usize;
        let s = NoiseSchedule::new(schedule, steps, &Respacing::Sections(vec![n])).unwrap();
        let trained = NoiseSchedule::new(schedule, steps, &Respacing::All).unwrap();
        for t in 0..s.len() {
            let (bar, prev, alpha) = (s.alphas_cumprod[t], s.alphas_cumprod_prev[t], 1.0 - s.betas[t]);
            prop_assert!(bar > 0.0 && bar < prev && prev <= 1.0);
            // Respacing keeps the noise level of the visited timestep.
            let original = trained.alphas_cumprod[s.timestep_map[t]];
            // 1 − (1 − ᾱ_t/ᾱ_{t−1}) is exact to an ulp of 1, which is more than an ulp of a small ᾱ.
            prop_assert!((bar - original).abs() <= 1e-12 * original + 1e-15);
            let (c1, c2, v) = (s.posterior_mean_coef1[t], s.posterior_mean_coef2[t], s.posterior_variance[t]);
            // x_t = √ᾱ x_0 (no noise) leads to √ᾱ_{t−1} x_0.
            prop_assert!((c1 + c2 * bar.sqrt() - prev.sqrt()).abs() < 1e-11);
            // Var[x_{t−1} | x_0] = c2² Var[x_t | x_0] + β̃ = 1 − ᾱ_{t−1}.
            prop_assert!((c2 * c2 * (1.0 - bar) + v - (1.0 - prev)).abs() < 1e-11);
            // Precisions add: 1/β̃ = α/β + 1/(1 − ᾱ_{t−1}).
            if t > 0 {
                let precision = alpha / s.betas[t] + 1.0 / (1.0 - prev);
                prop_assert!((v * precision - 1.0).abs() < 1e-9);
                prop_assert!(s.half_log_snr(t) < s.half_log_snr(t - 1));
            }
        }
        prop_assert_eq!(s.posterior_log_variance_clipped[0], s.posterior_log_variance_clipped[1]);
    }

    #[test]
    fn a_network_that_knows_the_truth_gets_the_posterior(t in 0u32..1000, schedule in schedules(), seed in 0u64..1000) {
        let mut rng = StepRng::new(seed, 0, stream::DRAW);
        let x_start = rng.normal((1, 2, 2, 2), &Device::Cpu).unwrap();
        let noise = rng.normal((1, 2, 2, 2), &Device::Cpu).unwrap();
        let config = DiffusionConfig { schedule, variance: Variance::FixedSmall, target: Target::XStart, ..DiffusionConfig::default() };
        let diffusion = GaussianDiffusion::new(config).unwrap();
        let x_t = diffusion.q_sample(&x_start, &[t], &noise).unwrap();
        let q = diffusion.q_posterior(&x_start, &x_t, &[t]).unwrap();
        let p = diffusion.p_mean_variance(&x_start, &x_t, &[t], Clip::Off).unwrap();
        for (a, b) in [(&p.mean, &q.mean), (&p.variance, &q.variance), (&p.log_variance, &q.log_variance)] {
            let far = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            prop_assert_eq!(far, 0.0);
        }
    }
}

#[test]
fn the_cosine_schedule_follows_its_formula() {
    // ᾱ(s) itself, where no beta is cut off at 0.999.
    let s = NoiseSchedule::new(BetaSchedule::Cosine, 1000, &Respacing::All).unwrap();
    let f = |i: f64| {
        ((i / 1000.0 + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2)
            .cos()
            .powi(2)
    };
    for t in [0usize, 1, 250, 500, 900, 990] {
        let expected = f(t as f64 + 1.0) / f(0.0);
        assert!((s.alphas_cumprod[t] - expected).abs() < 1e-12, "t {t}");
    }
    assert_eq!(s.betas[999], 0.999);
}

#[test]
fn malformed_respacings_name_what_is_wrong() {
    let parse = |text: &str| text.parse::<Respacing>().unwrap_err().to_string();
    for text in ["ten", "10,,20", "ddim", "ddimx", "-5", "1.5"] {
        let error = parse(text);
        assert!(error.contains(text) && error.contains("ddim50"), "{error}");
    }
    let spread = |text: &str, steps| {
        text.parse::<Respacing>()
            .unwrap()
            .timesteps(steps)
            .unwrap_err()
            .to_string()
    };
    assert!(spread("1001", 1000).contains("1001"));
    assert!(spread("10,400,10", 1000).contains("section 2"));
    assert!(spread("ddim333", 1000).contains("333"));
    assert!(spread("0", 1000).contains("at least one"));
}

#[test]
fn absurd_counts_are_usage_errors_not_panics() {
    let most = usize::MAX;
    let fails = |respacing: Respacing, steps: usize| {
        let error = respacing.timesteps(steps).unwrap_err();
        assert!(matches!(error, Error::Usage(_)), "{error}");
        error.to_string()
    };
    // One count that no memory holds, and counts whose sum overflows.
    for text in [
        format!("{most}"),
        format!("10,{most}"),
        format!("{most},{most},{most}"),
        format!("1,{}", most / 2),
    ] {
        let error = fails(text.parse().unwrap(), 1000);
        assert!(error.contains("section"), "{text}: {error}");
    }
    fails(Respacing::Ddim(most), 1000);
    fails(Respacing::Ddim(0), 1000);
    fails(Respacing::Sections(vec![]), 1000);
    // More digits than a count has.
    assert!(format!("{most}0").parse::<Respacing>().is_err());
    for respacing in [
        Respacing::All,
        Respacing::Ddim(most),
        Respacing::Sections(vec![most]),
        Respacing::Sections(vec![10]),
    ] {
        for steps in [1_000_001, most] {
            assert!(fails(respacing.clone(), steps).contains("1000000"));
        }
        assert!(fails(respacing, 0).contains("at least one step"));
    }
}

#[test]
fn the_longest_chain_is_a_million_steps() {
    let long = NoiseSchedule::new(
        BetaSchedule::Linear,
        1_000_000,
        &Respacing::Sections(vec![2]),
    );
    assert_eq!(long.unwrap().timestep_map, [0, 999_999]);
    for steps in [1_000_001, usize::MAX] {
        for schedule in [BetaSchedule::Linear, BetaSchedule::Cosine] {
            let error = GaussianDiffusion::new(DiffusionConfig {
                steps,
                schedule,
                ..DiffusionConfig::default()
            })
            .unwrap_err();
            assert!(
                matches!(&error, Error::Usage(m) if m.contains("1000000") && m.contains(&steps.to_string())),
                "{error}"
            );
        }
    }
}

#[test]
fn settings_are_checked() {
    let with = |steps| DiffusionConfig {
        steps,
        ..DiffusionConfig::default()
    };
    assert!(
        GaussianDiffusion::new(with(0))
            .unwrap_err()
            .to_string()
            .contains("at least one step")
    );
    assert!(
        GaussianDiffusion::new(with(20))
            .unwrap_err()
            .to_string()
            .contains("20 steps")
    );
    let diffusion = GaussianDiffusion::new(with(1000)).unwrap();
    let x = Tensor::zeros((2, 3, 2, 2), DType::F32, &Device::Cpu).unwrap();
    assert!(
        diffusion
            .q_sample(&x, &[0, 1000], &x)
            .unwrap_err()
            .to_string()
            .contains("1000")
    );
    assert!(
        diffusion
            .q_sample(&x, &[0], &x)
            .unwrap_err()
            .to_string()
            .contains("1 timesteps")
    );
    let error = diffusion
        .p_mean_variance(&x, &x, &[0, 1], Clip::Off)
        .unwrap_err()
        .to_string();
    assert!(error.contains("[2, 6, 2, 2]"), "{error}");
    let labels = LabelDrop {
        num_classes: 3,
        probability: 1.5,
    };
    assert!(DenoisingObjective::new(diffusion.clone(), labels).is_err());
    let objective = DenoisingObjective::new(
        diffusion,
        LabelDrop {
            num_classes: 3,
            probability: 0.0,
        },
    )
    .unwrap();
    let batch = LatentBatch {
        x,
        y: Tensor::new(&[0u32, 4], &Device::Cpu).unwrap(),
    };
    let error = objective
        .draw(&batch, &mut StepRng::new(0, 0, stream::DRAW))
        .unwrap_err()
        .to_string();
    assert!(error.contains("class 4"), "{error}");
}

#[test]
fn a_chain_of_one_step_has_finite_tables() {
    let diffusion = GaussianDiffusion::new(DiffusionConfig {
        respacing: "1".parse().unwrap(),
        variance: Variance::FixedLarge,
        ..DiffusionConfig::default()
    })
    .unwrap();
    let x = Tensor::ones((1, 1, 1, 1), DType::F32, &Device::Cpu).unwrap();
    let p = diffusion.p_mean_variance(&x, &x, &[0], Clip::Off).unwrap();
    assert!(
        p.log_variance
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()[0]
            .is_finite()
    );
}
