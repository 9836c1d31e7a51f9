//! MAR's objective and the sampling of tokens on a toy stack of its shape: what a draw promises, and that an image does
//! not depend on the batch it is drawn in.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{Device, Tensor};
use tinyfusion_core::toy::{TokenCond, ToyTokens};
use tinyfusion_core::{
    BlockLayout, BlockStack, Error, LatentBatch, Plan, Result, StepRng, TokenDenoiser, TokenQuery,
    run, stream,
};
use tinyfusion_diffusion::{
    CfgSchedule, DiffusionConfig, GaussianDiffusion, LabelDrop, MarObjective, MarPrediction,
    MarTraining, Objective, TokenNoise, TokenRng, TokenRows, TokenSampling, TokenStart, Variance,
    patchify, sample_tokens, token_diffusion, unpatchify,
};
use tinyfusion_testing::{flat, max_diff};

/// [`ToyTokens`] with a denoiser without weights.
struct Toy(ToyTokens);

fn toy() -> Toy {
    Toy(ToyTokens::new([1, 2], &ToyTokens::init([1, 2], 0).unwrap()).unwrap())
}

impl BlockStack for Toy {
    type Input = TokenQuery;
    type Cond = TokenCond;
    fn layout(&self) -> &BlockLayout {
        self.0.layout()
    }
    fn embed(&self, q: &TokenQuery) -> Result<(Tensor, TokenCond)> {
        self.0.embed(q)
    }
    fn block(&self, i: usize, h: &Tensor, c: &TokenCond) -> Result<Tensor> {
        self.0.block(i, h, c)
    }
    fn bridge(&self, into: usize, h: &Tensor, c: &TokenCond) -> Result<Tensor> {
        self.0.bridge(into, h, c)
    }
    fn head(&self, h: &Tensor, c: &TokenCond) -> Result<Tensor> {
        self.0.head(h, c)
    }
}

impl TokenDenoiser for Toy {
    fn denoise_tokens(&self, x: &Tensor, t: &Tensor, z: &Tensor) -> Result<Tensor> {
        let time = (t / 1000.0)?.unsqueeze(1)?; // (N, 1)
        let estimate = (x.broadcast_mul(&time)? + (z * 0.1)?)?; // (N, C)
        Ok(Tensor::cat(&[&estimate, &z.tanh()?], 1)?) // (N, 2·C)
    }
}

const CLASSES: u32 = 5;

fn labels(probability: f64) -> LabelDrop {
    LabelDrop {
        num_classes: CLASSES,
        probability,
    }
}

fn training() -> MarTraining {
    MarTraining {
        patch_size: 1,
        labels: labels(0.3),
        mask_ratio_min: 0.5,
        diffusion_batch_mul: 3,
        dropout: true,
    }
}

fn process() -> GaussianDiffusion {
    GaussianDiffusion::new(token_diffusion()).unwrap()
}

fn objective(training: MarTraining) -> MarObjective {
    MarObjective::new(process(), training).unwrap()
}

fn batch(b: usize) -> LatentBatch {
    let y: Vec<u32> = (0..b as u32).map(|i| i % CLASSES).collect();
    LatentBatch {
        x: StepRng::new(9, 0, stream::ORDER)
            .normal((b, 3, 4, 4), &Device::Cpu)
            .unwrap(),
        y: Tensor::new(y, &Device::Cpu).unwrap(),
    }
}

fn rng(step: u64) -> StepRng {
    StepRng::new(7, step, stream::DRAW)
}

#[test]
fn patches_come_back() {
    let x = rng(0).normal((2, 3, 8, 8), &Device::Cpu).unwrap();
    for patch in [1, 2, 4, 8] {
        let tokens = patchify(&x, patch).unwrap();
        let side = 8 / patch;
        assert_eq!(tokens.dims(), [2, side * side, 3 * patch * patch]);
        assert_eq!(max_diff(&unpatchify(&tokens, patch).unwrap(), &x), 0.0);
    }
    for patch in [0, 3, 16] {
        assert!(matches!(patchify(&x, patch), Err(Error::Usage(_))));
    }
    let tokens = patchify(&x, 2).unwrap();
    assert!(unpatchify(&tokens, 5).is_err());
    assert!(unpatchify(&tokens.narrow(1, 0, 15).unwrap(), 2).is_err());
}

#[test]
fn a_draw_depends_on_the_generator_alone() {
    let objective = objective(training());
    let draw = |step| Objective::<Toy>::draw(&objective, &batch(6), &mut rng(step)).unwrap();
    let (a, b, other) = (draw(0), draw(0), draw(1));
    assert_eq!(
        (&a.t, &a.hidden, &a.query.dropout),
        (&b.t, &b.hidden, &b.query.dropout)
    );
    assert_eq!(max_diff(&a.x_t, &b.x_t), 0.0);
    assert_ne!(a.hidden, other.hidden);
    assert_ne!(a.query.dropout, other.query.dropout);
    let seeds = a.query.dropout.clone().unwrap();
    assert!((1..6).all(|i| seeds[i] != seeds[0]));
    // Without dropout nothing else changes.
    let calm = MarTraining {
        dropout: false,
        ..training()
    };
    let calm = Objective::<Toy>::draw(&self::objective(calm), &batch(6), &mut rng(0)).unwrap();
    assert_eq!((&calm.t, calm.query.dropout), (&a.t, None));
}

#[test]
fn mask_rates_follow_the_truncated_normal() {
    let one = LatentBatch {
        x: batch(1).x,
        y: batch(1).y,
    };
    for least in [0.0, 0.5, 0.7, 0.99, 1.0] {
        let objective = objective(MarTraining {
            mask_ratio_min: least,
            diffusion_batch_mul: 1,
            ..training()
        });
        let rates: Vec<f64> = (0..3000)
            .map(|step| {
                objective
                    .randomness(&one, &mut rng(step))
                    .unwrap()
                    .mask_rate
            })
            .collect();
        assert!(rates.iter().all(|r| (least..=1.0).contains(r)), "{least}");
        // The mean of |x| for a normal x of deviation σ cut to [0, w], by quadrature.
        let (sigma, width) = (0.25, 1.0 - least);
        let (mut mass, mut moment) = (0.0, 0.0);
        for i in 0..10_000 {
            let x = width * (f64::from(i) + 0.5) / 10_000.0;
            let density = (-0.5 * (x / sigma).powi(2)).exp();
            mass += density;
            moment += density * x;
        }
        let (want, found) = (1.0 - moment / mass, rates.iter().sum::<f64>() / 3000.0);
        // The deviation of the mean is at most 0.25/√3000 = 0.0046.
        assert!((found - want).abs() < 0.015, "{least}: {found} and {want}");
    }
}

#[test]
fn equally_many_tokens_are_hidden_and_labels_drop_to_the_fake_latent() {
    let objective = objective(training());
    let mut dropped = 0;
    for step in 0..100 {
        let random = objective.randomness(&batch(8), &mut rng(step)).unwrap();
        let draw = objective.draw_at(&batch(8), &random).unwrap();
        let n = (16.0 * random.mask_rate).ceil() as f32;
        let counts = draw.query.mask.sum(1).unwrap().to_vec1::<f32>().unwrap();
        assert!(counts.iter().all(|c| *c == n), "{counts:?}");
        for (b, order) in random.orders.iter().enumerate() {
            for (k, &i) in order.iter().enumerate() {
                let hidden = draw.hidden.rows.contains(&(b as u32, i as u32));
                assert_eq!(hidden, k < n as usize);
            }
        }
        let (y, clean) = (draw.query.y.to_vec1::<u32>().unwrap(), batch(8).y);
        let clean = clean.to_vec1::<u32>().unwrap();
        assert!(y.iter().zip(&clean).all(|(y, c)| y == c || *y == CLASSES));
        dropped += y.iter().filter(|y| **y == CLASSES).count();
    }
    // 240 of 800 expected, standard deviation 13.
    assert!((185..295).contains(&dropped), "{dropped}");
    let held_out = self::objective(training().held_out());
    let draw = Objective::<Toy>::draw(&held_out, &batch(8), &mut rng(0)).unwrap();
    assert_eq!(flat(&draw.query.y), flat(&batch(8).y));
    assert!(draw.query.dropout.is_none());
}

fn step(objective: &MarObjective, draw: &tinyfusion_diffusion::MarDraw) -> (MarPrediction, Tensor) {
    let net = toy();
    let query = Objective::<Toy>::input(objective, draw).unwrap();
    let z = run(&net, &query, &Plan::full(3)).unwrap().output;
    let prediction = objective.predict(&net, z, draw).unwrap();
    let loss = Objective::<Toy>::loss(objective, &prediction, draw).unwrap();
    (prediction, loss)
}

#[test]
fn micro_batches_have_the_losses_and_distillation_of_the_whole() {
    let objective = objective(training());
    let draw = Objective::<Toy>::draw(&objective, &batch(6), &mut rng(3)).unwrap();
    let kd = |draw: &tinyfusion_diffusion::MarDraw| {
        let (student, _) = step(&objective, draw);
        let teacher = MarPrediction {
            z: (&student.z * 1.1).unwrap(),
            output: (&student.output + 0.2).unwrap(),
        };
        objective.distillation(&student, &teacher, draw).unwrap()
    };
    let (whole, whole_kd) = (flat(&step(&objective, &draw).1), flat(&kd(&draw)));
    let (mut parts, mut parts_kd) = (Vec::new(), Vec::new());
    for (start, len) in [(0, 4), (4, 2)] {
        let part = Objective::<Toy>::rows(&objective, &draw, start, len).unwrap();
        parts.extend(flat(&step(&objective, &part).1));
        parts_kd.extend(flat(&kd(&part)));
    }
    assert_eq!((whole.len(), whole_kd.len()), (6, 6));
    for (a, b) in whole
        .iter()
        .zip(&parts)
        .chain(whole_kd.iter().zip(&parts_kd))
    {
        assert!((a - b).abs() <= 1e-5 * a.abs() && *a > 0.0, "{a} and {b}");
    }
    assert!(objective.rows(&draw, 4, 3).is_err());
}

#[test]
fn the_mean_over_samples_is_the_references_sum_over_hidden_tokens() {
    let objective = objective(training());
    let random = objective.randomness(&batch(5), &mut rng(8)).unwrap();
    let draw = objective.draw_at(&batch(5), &random).unwrap();
    let (_, loss) = step(&objective, &draw);
    // Every row, hidden or not, as the reference: sum(loss·mask)/sum(mask).
    let (net, process, k) = (toy(), process(), training().diffusion_batch_mul);
    let z = run(&net, &draw.query, &Plan::full(3)).unwrap().output;
    let all = |t: &Tensor| t.flatten_to(1).unwrap().repeat((k, 1)).unwrap();
    let (x_start, z) = (all(&draw.query.tokens), all(&z));
    let noise = random.noise.flatten_to(2).unwrap();
    let x_t = process.q_sample(&x_start, &random.t, &noise).unwrap();
    let t = process.model_timesteps(&random.t, &Device::Cpu).unwrap();
    let output = net.denoise_tokens(&x_t, &t, &z).unwrap();
    let noised = tinyfusion_diffusion::Noised {
        x_start: &x_start,
        noise: &noise,
        x_t: &x_t,
        t: &random.t,
    };
    let rows = flat(&process.losses(&output, &noised).unwrap().loss);
    let mask = flat(&draw.query.mask.flatten_all().unwrap());
    let mask = mask.iter().cycle();
    let (sum, count) = rows
        .iter()
        .zip(mask)
        .fold((0.0, 0.0), |(s, n), (l, m)| (s + l * m, n + m));
    let mean = flat(&loss).iter().sum::<f64>() / 5.0;
    assert!(
        (mean - sum / count).abs() < 1e-5 * mean,
        "{mean} and {}",
        sum / count
    );
}

#[test]
fn distilling_from_oneself_costs_nothing_and_reaches_no_teacher() {
    let objective = objective(training());
    let draw = Objective::<Toy>::draw(&objective, &batch(3), &mut rng(4)).unwrap();
    let (prediction, _) = step(&objective, &draw);
    let kd = objective
        .distillation(&prediction, &prediction, &draw)
        .unwrap();
    assert_eq!(flat(&kd), [0.0; 3]);
    let var = candle_core::Var::from_tensor(&prediction.z).unwrap();
    let teacher = MarPrediction {
        z: (var.as_tensor() + 1.0).unwrap(),
        output: prediction.output.clone(),
    };
    let kd = objective
        .distillation(&prediction, &teacher, &draw)
        .unwrap();
    assert!(!kd.track_op());
    assert!(flat(&kd).iter().all(|v| (v - 1.0).abs() < 1e-5), "{kd}");
    // The denoisers' outputs count as much, and neither half reaches the teacher.
    let var = |t: &Tensor| candle_core::Var::from_tensor(t).unwrap();
    let (z, output) = (var(&prediction.z), var(&prediction.output));
    let (of_z, of_output) = (
        var(&prediction.z),
        var(&(&prediction.output + 0.2).unwrap()),
    );
    let of = |z: &candle_core::Var, output: &candle_core::Var| MarPrediction {
        z: z.as_tensor().clone(),
        output: output.as_tensor().clone(),
    };
    let (student, teacher) = (of(&z, &output), of(&of_z, &of_output));
    let kd = objective.distillation(&student, &teacher, &draw).unwrap();
    assert!(flat(&kd).iter().all(|v| (v - 0.04).abs() < 1e-6), "{kd}");
    let gradients = kd.sum_all().unwrap().backward().unwrap();
    assert!(gradients.get(&z).is_some());
    let pulled = gradients.get(&output).unwrap();
    assert!(flat(pulled).iter().all(|v| *v < 0.0), "towards the teacher");
    assert!(gradients.get(&of_z).is_none() && gradients.get(&of_output).is_none());
    let narrow = MarPrediction {
        z: prediction.z.narrow(1, 0, 2).unwrap(),
        output: prediction.output.clone(),
    };
    assert!(objective.distillation(&prediction, &narrow, &draw).is_err());
}

#[test]
fn settings_that_make_no_sense_are_usage_errors() {
    let base = training();
    for bad in [
        MarTraining {
            mask_ratio_min: f64::NAN,
            ..base
        },
        MarTraining {
            mask_ratio_min: 1.5,
            ..base
        },
        MarTraining {
            labels: labels(-1.0),
            ..base
        },
        MarTraining {
            diffusion_batch_mul: 0,
            ..base
        },
        MarTraining {
            diffusion_batch_mul: MarTraining::MAX_BATCH_MUL + 1,
            ..base
        },
        MarTraining {
            patch_size: 0,
            ..base
        },
    ] {
        assert!(
            matches!(MarObjective::new(process(), bad), Err(Error::Usage(_))),
            "{bad:?}"
        );
    }
    let fixed = DiffusionConfig {
        variance: Variance::FixedLarge,
        ..token_diffusion()
    };
    let fixed = GaussianDiffusion::new(fixed).unwrap();
    assert!(MarObjective::new(fixed, base).is_err());
    let objective = objective(MarTraining {
        patch_size: 3,
        ..base
    });
    assert!(Objective::<Toy>::draw(&objective, &batch(2), &mut rng(0)).is_err());
    let strange = LatentBatch {
        y: Tensor::new(&[0u32, CLASSES + 1], &Device::Cpu).unwrap(),
        ..batch(2)
    };
    let objective = self::objective(base);
    assert!(Objective::<Toy>::draw(&objective, &strange, &mut rng(0)).is_err());
    let mut random = objective.randomness(&batch(2), &mut rng(0)).unwrap();
    for rate in [f64::NAN, -0.1, 1.1, f64::INFINITY] {
        random.mask_rate = rate;
        let draw = objective.draw_at(&batch(2), &random);
        assert!(matches!(draw, Err(Error::Usage(_))), "{rate}");
    }
    for (rate, hidden) in [(0.0, 1), (1.0, 16)] {
        random.mask_rate = rate;
        let draw = objective.draw_at(&batch(2), &random).unwrap();
        assert_eq!(draw.hidden.rows.len(), 2 * hidden, "{rate}");
    }
    assert_eq!(
        "constant".parse::<CfgSchedule>().unwrap(),
        CfgSchedule::Constant
    );
    let unknown = "cosine".parse::<CfgSchedule>().unwrap_err().to_string();
    assert!(unknown.contains("linear, constant"), "{unknown}");
    let base = TokenSampling::default();
    for bad in [
        TokenSampling {
            num_iter: 0,
            ..base
        },
        TokenSampling {
            num_iter: usize::MAX,
            ..base
        },
        TokenSampling {
            cfg: f64::NAN,
            ..base
        },
        TokenSampling {
            temperature: -1.0,
            ..base
        },
        TokenSampling {
            temperature: f64::INFINITY,
            ..base
        },
    ] {
        assert!(matches!(bad.validate(), Err(Error::Usage(_))), "{bad:?}");
    }
}

fn short() -> GaussianDiffusion {
    GaussianDiffusion::new(DiffusionConfig {
        respacing: "ddim10".parse().unwrap(),
        ..token_diffusion()
    })
    .unwrap()
}

/// The images `numbers` of a run.
fn images(config: &TokenSampling, numbers: std::ops::Range<u64>) -> (Tensor, usize) {
    let mut rng = TokenRng::new(3, numbers.clone(), 3, &Device::Cpu);
    let y: Vec<u32> = numbers.map(|i| i as u32 % CLASSES).collect();
    let start = TokenStart {
        y: Tensor::new(y, &Device::Cpu).unwrap(),
        fake: CLASSES,
        orders: rng.orders(16),
        channels: 3,
    };
    let (mut drawn, mut inner) = (0, 0);
    let tokens = sample_tokens(
        &toy(),
        &short(),
        config,
        &start,
        |request| rng.noise(request),
        |_| {
            inner += 1;
            Ok(())
        },
        |step| {
            drawn += step.drawn.rows.len();
            assert!(step.done <= step.total);
            Ok(())
        },
    );
    assert_eq!(inner, config.num_iter.min(16) * short().num_timesteps());
    (tokens.unwrap(), drawn)
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    for cfg in [1.0, 3.0] {
        for cfg_schedule in [CfgSchedule::Linear, CfgSchedule::Constant] {
            let config = TokenSampling {
                num_iter: 5,
                cfg,
                cfg_schedule,
                temperature: 0.9,
            };
            let (all, drawn) = images(&config, 0..5);
            assert_eq!(drawn, 5 * 16, "every token is drawn once");
            assert!(flat(&all).iter().all(|v| v.is_finite() && *v != 0.0));
            let parts = [images(&config, 0..2).0, images(&config, 2..5).0];
            let parts = Tensor::cat(&parts, 0).unwrap();
            assert!(max_diff(&all, &parts) < 1e-5);
        }
    }
}

#[test]
fn any_number_of_iterations_draws_every_token_once() {
    for num_iter in [1, 2, 15, 16, 17, 100] {
        let config = TokenSampling {
            num_iter,
            ..TokenSampling::default()
        };
        assert_eq!(images(&config, 0..2).1, 2 * 16, "{num_iter}");
    }
}

#[test]
fn a_request_to_stop_ends_the_run_and_orders_must_be_orders() {
    let mut start = TokenStart {
        y: Tensor::new(&[0u32, 1], &Device::Cpu).unwrap(),
        fake: CLASSES,
        orders: vec![(0..16).collect(), (0..16).rev().collect()],
        channels: 3,
    };
    let config = TokenSampling::default();
    let noise = |request: &TokenNoise<'_>| {
        Ok(Tensor::zeros(
            (request.tokens.rows.len(), 3),
            candle_core::DType::F32,
            &Device::Cpu,
        )?)
    };
    let run = |start: &TokenStart, inner: usize, outer: usize| {
        let mut left = (inner, outer);
        let count = |left: &mut usize| {
            *left = left.checked_sub(1).ok_or(Error::Stopped)?;
            Ok(())
        };
        let found = sample_tokens(
            &toy(),
            &short(),
            &config,
            start,
            noise,
            |_| count(&mut left.0),
            |_| count(&mut left.1),
        );
        (found, left)
    };
    // After an iteration of ten steps, and in the midst of the second one.
    let (stopped, left) = run(&start, 1000, 0);
    assert!(matches!(stopped, Err(Error::Stopped)));
    assert_eq!(left.0, 990);
    let (stopped, left) = run(&start, 13, 1000);
    assert!(matches!(stopped, Err(Error::Stopped)));
    assert_eq!(left.1, 999);
    for bad in [
        vec![],
        vec![vec![0, 1]; 3],
        vec![vec![0, 0, 1], vec![0, 1, 2]],
        vec![vec![]; 2],
    ] {
        start.orders = bad;
        assert!(matches!(run(&start, 1000, 1000).0, Err(Error::Usage(_))));
    }
    assert_eq!(TokenRows::default().rows, []);
}
