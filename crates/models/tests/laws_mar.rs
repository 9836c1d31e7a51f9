//! The laws of `BlockStack` on MAR, and its dropout.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{Device, Tensor, Var};
use tinyfusion_core::laws::{self, Subject};
use tinyfusion_core::{
    BlockStack, Error, LatentBatch, Plan, Result, Rows, StateDict, StepRng, TokenDenoiser,
    TokenQuery, run, run_exact, stream,
};
use tinyfusion_diffusion::{GaussianDiffusion, MarObjective, MarTraining, token_diffusion};
use tinyfusion_models::{Mar, MarConfig};
use tinyfusion_nn::{Gradients, layers::LoraSpec};
use tinyfusion_testing::{flat, max_diff};

/// Pixel patches as tokens: 3×3 of 2·2·3 values.
fn config() -> MarConfig {
    MarConfig {
        img_size: 6,
        vae_stride: 1,
        patch_size: 2,
        encoder_embed_dim: 12,
        encoder_depth: 2,
        encoder_num_heads: 2,
        decoder_embed_dim: 16,
        decoder_depth: 3,
        decoder_num_heads: 4,
        vae_embed_dim: 3,
        class_num: 4,
        attn_dropout: 0.2,
        proj_dropout: 0.3,
        buffer_size: 2,
        diffloss_d: 2,
        diffloss_w: 8,
        diffusion_batch_mul: 2,
        ..MarConfig::default()
    }
}

const DEPTH: usize = 5;

/// Every tensor random, the zero-initialised ones included.
fn random_weights(config: &MarConfig) -> Result<StateDict> {
    let mut rng = StepRng::new(5, 0, stream::INIT);
    let tensor = |shape: &[usize], rng: &mut StepRng| -> Result<Tensor> {
        Ok((rng.normal(shape, &Device::Cpu)? * 0.3)?)
    };
    let specs = config.params();
    specs
        .iter()
        .map(|s| Ok((s.name.clone(), tensor(&s.shape, &mut rng)?)))
        .collect()
}

fn query(rows: Option<&[usize]>, seeds: bool) -> Result<TokenQuery> {
    let tokens = StepRng::new(6, 0, stream::DRAW).normal((3, 9, 12), &Device::Cpu)?;
    let mask = Tensor::new(
        &[
            [1f32, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0],
            [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
            [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0],
        ],
        &Device::Cpu,
    )?;
    let y = Tensor::new(&[0u32, 3, 4], &Device::Cpu)?; // 4 is the fake latent
    let all: &[usize] = &[0, 1, 2];
    let rows = rows.unwrap_or(all);
    let index: Vec<u32> = rows.iter().map(|&r| r as u32).collect();
    let index = Tensor::new(index, &Device::Cpu)?;
    let of_sample = [11u64, 1 << 50, 3];
    Ok(TokenQuery {
        tokens: tokens.select(&index)?,
        mask: mask.select(&index)?,
        y: y.select(&index)?,
        dropout: seeds.then(|| rows.iter().map(|&r| of_sample[r]).collect()),
    })
}

struct Subjects;

impl Subject for Subjects {
    type Net = Mar;
    fn depth(&self) -> usize {
        DEPTH
    }
    fn weights(&self) -> Result<StateDict> {
        random_weights(&config())
    }
    fn build(&self, weights: &StateDict) -> Result<Mar> {
        Mar::new(&config(), weights)
    }
    fn rebuild(&self, weights: &StateDict, kept: &[usize]) -> Result<Mar> {
        let (config, weights) = config().keep(weights, kept)?;
        Mar::new(&config, &weights)
    }
    fn input(&self, rows: Option<&[usize]>) -> Result<TokenQuery> {
        query(rows, false)
    }
    fn selections(&self) -> Vec<Vec<usize>> {
        vec![vec![0, 3], vec![1, 2, 4], vec![0, 1, 2, 3]]
    }
    /// The stack ends before the denoiser, which its output only conditions; the audit of the whole model is below.
    fn is_fixed(&self, name: &str) -> bool {
        name.starts_with("diffloss.")
    }
}

#[test]
fn mar_keeps_the_laws() {
    laws::check(&Subjects).unwrap();
}

fn objective(dropout: bool) -> MarObjective {
    let config = MarConfig {
        mask_ratio_min: 0.3,
        label_drop_prob: 0.4,
        ..config()
    };
    let training = MarTraining {
        dropout,
        ..config.training()
    };
    MarObjective::new(GaussianDiffusion::new(token_diffusion()).unwrap(), training).unwrap()
}

fn batch(b: usize) -> LatentBatch {
    let y: Vec<u32> = (0..b as u32).map(|i| i % 4).collect();
    LatentBatch {
        x: StepRng::new(9, 0, stream::ORDER)
            .normal((b, 3, 6, 6), &Device::Cpu)
            .unwrap(),
        y: Tensor::new(y, &Device::Cpu).unwrap(),
    }
}

fn losses(net: &Mar, objective: &MarObjective, draw: &tinyfusion_diffusion::MarDraw) -> Tensor {
    let depth = net.layout().depth();
    let z = run(net, &draw.query, &Plan::full(depth)).unwrap().output;
    let prediction = objective.prediction(net, &z, draw).unwrap();
    objective.losses(&prediction, draw).unwrap()
}

fn draw(objective: &MarObjective, b: usize) -> tinyfusion_diffusion::MarDraw {
    let mut rng = StepRng::new(4, 2, stream::DRAW);
    let random = objective.randomness(&batch(b), &mut rng).unwrap();
    objective.draw_at(&batch(b), &random).unwrap()
}

#[test]
fn the_loss_reaches_every_weight_with_and_without_dropout() {
    for dropout in [false, true] {
        let objective = objective(dropout);
        let mut weights = random_weights(&config()).unwrap();
        let vars = weights.make_trainable(|_| true).unwrap();
        assert_eq!(vars.len(), config().params().len());
        let net = Mar::new(&config(), &weights).unwrap();
        let draw = draw(&objective, 8);
        let y = draw.query.y.to_vec1::<u32>().unwrap();
        assert!(y.contains(&4) && y.iter().any(|class| *class < 4), "{y:?}");
        let loss = losses(&net, &objective, &draw).mean_all().unwrap();
        let gradients = loss.backward().unwrap();
        for (name, var) in &vars {
            let g = gradients.get(var).unwrap_or_else(|| panic!("{name}"));
            let sum: f64 = flat(g).iter().map(|v| v.abs()).sum();
            assert!(sum.is_finite() && sum > 0.0, "{name}: {sum}");
        }
    }
}

#[test]
fn micro_batches_have_the_losses_of_the_whole() {
    let net = Mar::new(&config(), &random_weights(&config()).unwrap()).unwrap();
    for dropout in [false, true] {
        let objective = objective(dropout);
        let draw = draw(&objective, 7);
        let whole = flat(&losses(&net, &objective, &draw));
        let parts: Vec<f64> = [(0, 3), (3, 1), (4, 3)]
            .iter()
            .flat_map(|&(start, len)| {
                let part = objective.rows(&draw, start, len).unwrap();
                flat(&losses(&net, &objective, &part))
            })
            .collect();
        assert_eq!(whole.len(), 7);
        for (a, b) in whole.iter().zip(&parts) {
            assert!((a - b).abs() <= 1e-5 * a.abs(), "{a} and {b}");
        }
        assert!(objective.rows(&draw, 5, 3).is_err());
    }
}

#[test]
fn dropout_comes_from_the_seeds_alone() {
    let weights = random_weights(&config()).unwrap();
    let net = Mar::new(&config(), &weights).unwrap();
    let out = |net: &Mar, query: &TokenQuery| run(net, query, &Plan::full(DEPTH)).unwrap().output;
    let (plain, dropped) = (query(None, false).unwrap(), query(None, true).unwrap());
    let (a, b) = (out(&net, &dropped), out(&net, &dropped));
    assert_eq!(max_diff(&a, &b), 0.0, "the same question, the same answer");
    assert!(
        max_diff(&a, &out(&net, &plain)) > 1e-2,
        "something is dropped"
    );
    let other = TokenQuery {
        dropout: Some(vec![1, 2, 3]),
        ..plain.clone()
    };
    assert!(max_diff(&a, &out(&net, &other)) > 1e-2);
    for row in 0..3 {
        let alone = out(&net, &query(Some(&[row]), true).unwrap());
        let together = a.narrow(0, row, 1).unwrap();
        assert!(max_diff(&alone, &together) < 1e-5, "sample {row}");
    }
    // A teacher and a network whose rates are 0 answer as if there were no seeds.
    let calm = MarConfig {
        attn_dropout: 0.0,
        proj_dropout: 0.0,
        ..config()
    };
    for calm in [
        Mar::new(&calm, &weights).unwrap(),
        net.clone().without_dropout(),
    ] {
        assert_eq!(max_diff(&out(&calm, &dropped), &out(&net, &plain)), 0.0);
    }
}

#[test]
fn the_exact_blend_is_the_plain_blend_under_dropout() {
    let mut weights = random_weights(&config()).unwrap();
    let vars = weights.make_trainable(|n| !Subjects.is_fixed(n)).unwrap();
    let net = Mar::new(&config(), &weights).unwrap();
    let untracked = Mar::new(&config(), &weights.detached()).unwrap();
    let mask: Vec<f32> = StepRng::new(11, 0, stream::MASK)
        .below(2, 3 * DEPTH)
        .into_iter()
        .map(|v| v as f32)
        .collect();
    let mask = Tensor::from_vec(mask, (3, DEPTH), &Device::Cpu).unwrap();
    let mask = Var::from_tensor(&mask).unwrap();
    let plan = Plan::blend(&mask).unwrap();
    let query = query(None, true).unwrap();
    let plain = run(&net, &query, &plan).unwrap().output;
    let exact = run_exact(&net, &untracked, &query, &plan).unwrap().output;
    assert!(max_diff(&plain, &exact) < 1e-5);
    let gradients = |out: &Tensor| out.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let (plain, exact) = (gradients(&plain), gradients(&exact));
    let all = vars.iter().map(|(_, v)| v).chain([&mask]);
    let largest = |t: &Tensor| flat(t).iter().fold(0f64, |m, v| m.max(v.abs()));
    let mut compared = 0;
    for var in all {
        match (plain.get(var), exact.get(var)) {
            (Some(p), Some(e)) => {
                let largest = largest(p);
                assert!(max_diff(p, e) <= 1e-4 * largest.max(0.1), "{largest}");
                compared += 1;
            }
            // Of a block that no sample keeps, and of the denoiser: none is a gradient of zero.
            (Some(one), None) | (None, Some(one)) => assert_eq!(largest(one), 0.0),
            (None, None) => {}
        }
    }
    assert!(compared > vars.len() / 2);
}

#[test]
fn recomputed_blocks_have_the_same_gradients_bit_for_bit() {
    let objective = objective(true);
    let draw = draw(&objective, 3);
    let gradients = |recomputing: bool| {
        let mut weights = random_weights(&config()).unwrap();
        let vars = weights.make_trainable(|_| true).unwrap();
        let net = Mar::new(&config(), &weights).unwrap();
        let loss = losses(&net.recomputing(recomputing), &objective, &draw);
        let vars: Vec<&Var> = vars.iter().map(|(_, v)| v).collect();
        let mut sums = Gradients::new(&vars);
        sums.backward(&loss.mean_all().unwrap()).unwrap();
        let sums = sums.sums().unwrap();
        sums.iter().map(flat).collect::<Vec<_>>()
    };
    assert_eq!(gradients(false), gradients(true));
}

#[test]
fn lora_merged_is_lora_beside() {
    let (config, spec) = (
        config(),
        LoraSpec {
            rank: 3,
            alpha: 6.0,
        },
    );
    let mut weights = random_weights(&config).unwrap();
    let low = spec
        .init(&config.params(), |_| true, 1, &Device::Cpu)
        .unwrap();
    // Four in each block, z_proj and decoder_embed; in the denoiser four of the time, condition and input, three in each
    // block, two at the end.
    assert_eq!(
        low.len(),
        2 * (4 * DEPTH + 2 + 4 + 3 * config.diffloss_d + 2)
    );
    let mut rng = StepRng::new(8, 0, stream::INIT);
    for (name, t) in low.iter() {
        let noise = rng.normal(t.shape().clone(), &Device::Cpu).unwrap();
        weights.insert(name, (noise * 0.1).unwrap());
    }
    let beside = Mar::with_lora(&config, &weights, spec.scale()).unwrap();
    let merged = Mar::new(&config, &spec.merge(&weights).unwrap()).unwrap();
    let plain = Mar::new(&config, &random_weights(&config).unwrap()).unwrap();
    let x = StepRng::new(2, 0, stream::DRAW)
        .normal((9, 12), &Device::Cpu)
        .unwrap();
    let t = Tensor::new(
        &[3f32, 5.0, 80.0, 200.0, 400.0, 600.0, 800.0, 900.0, 999.0],
        &Device::Cpu,
    );
    let t = t.unwrap();
    let out = |net: &Mar| {
        let query = query(Some(&[0]), false).unwrap();
        let z = run(net, &query, &Plan::full(DEPTH)).unwrap().output;
        let denoised = net.denoise_tokens(&x, &t, &z.squeeze(0).unwrap()).unwrap();
        Tensor::cat(&[z.squeeze(0).unwrap(), denoised], 1).unwrap()
    };
    let scale = flat(&out(&merged)).iter().fold(0f64, |m, v| m.max(v.abs()));
    assert!(max_diff(&out(&beside), &out(&merged)) < 1e-5 * scale);
    assert!(max_diff(&out(&plain), &out(&merged)) > 1e-2 * scale);
}

#[test]
fn initial_weights_are_finite_and_predict_nothing() {
    let config = config();
    let weights = config.init(0, &Device::Cpu).unwrap();
    weights.check(&config.params()).unwrap();
    let net = Mar::new(&config, &weights).unwrap();
    let z = run(&net, &query(None, false).unwrap(), &Plan::full(DEPTH)).unwrap();
    assert!(flat(&z.output).iter().all(|v| v.is_finite()));
    let z = z.output.flatten_to(1).unwrap();
    let x = Tensor::ones((27, 12), candle_core::DType::F32, &Device::Cpu).unwrap();
    let t = Tensor::full(500f32, 27, &Device::Cpu).unwrap();
    let out = net.denoise_tokens(&x, &t, &z).unwrap();
    assert!(flat(&out).iter().all(|v| *v == 0.0), "a zero final layer");
}

#[test]
fn everything_and_nothing_can_be_hidden() {
    let net = Mar::new(&config(), &random_weights(&config()).unwrap()).unwrap();
    let plain = query(None, false).unwrap();
    for mask in [
        plain.mask.zeros_like().unwrap(),
        plain.mask.ones_like().unwrap(),
    ] {
        let query = TokenQuery {
            mask,
            ..plain.clone()
        };
        let z = run(&net, &query, &Plan::full(DEPTH)).unwrap().output;
        assert_eq!(z.dims(), [3, 9, 16]);
        assert!(flat(&z).iter().all(|v| v.is_finite()));
    }
}

#[test]
fn questions_that_do_not_fit_are_usage_errors() {
    let net = Mar::new(&config(), &random_weights(&config()).unwrap()).unwrap();
    let plain = query(None, false).unwrap();
    let ragged = {
        let mut rows = plain.mask.to_vec2::<f32>().unwrap();
        rows[1][0] = 1.0;
        Tensor::new(rows, &Device::Cpu).unwrap()
    };
    for (bad, said) in [
        (
            TokenQuery {
                mask: ragged,
                ..plain.clone()
            },
            "equally many",
        ),
        (
            TokenQuery {
                tokens: plain.tokens.narrow(1, 0, 8).unwrap(),
                ..plain.clone()
            },
            "[3, 8, 12]",
        ),
        (
            TokenQuery {
                y: plain.y.narrow(0, 0, 2).unwrap(),
                ..plain.clone()
            },
            "classes [2]",
        ),
        (
            TokenQuery {
                dropout: Some(vec![1]),
                ..plain.clone()
            },
            "seeds",
        ),
    ] {
        match net.embed(&bad) {
            Err(Error::Usage(message)) => assert!(message.contains(said), "{message}"),
            other => panic!("{said}: {:?}", other.is_ok()),
        }
    }
}
