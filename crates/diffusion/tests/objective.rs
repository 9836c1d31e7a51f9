//! Objectives on toy stacks: what a draw promises, and that the trait fits MAR's shape. SiT's is in `interpolant.rs`.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{DType, Device, Tensor};
use tinyfusion_core::toy::{ToyLatent, ToyTokens};
use tinyfusion_core::{BlockStack, LatentBatch, Plan, Result, StepRng, TokenQuery, run, stream};
use tinyfusion_diffusion::{
    DenoisingDraw, DenoisingObjective, DiffusionConfig, GaussianDiffusion, LabelDrop, Objective,
    Variance,
};

const CLASSES: u32 = 5;

fn objective(variance: Variance, probability: f64) -> DenoisingObjective {
    let diffusion = GaussianDiffusion::new(DiffusionConfig {
        variance,
        ..DiffusionConfig::default()
    })
    .unwrap();
    DenoisingObjective::new(
        diffusion,
        LabelDrop {
            num_classes: CLASSES,
            probability,
        },
    )
    .unwrap()
}

fn batch(b: usize) -> LatentBatch {
    let x = StepRng::new(9, 0, stream::ORDER)
        .normal((b, 3, 4, 4), &Device::Cpu)
        .unwrap();
    let y: Vec<u32> = (0..b as u32).map(|i| i % CLASSES).collect();
    LatentBatch {
        x,
        y: Tensor::new(y, &Device::Cpu).unwrap(),
    }
}

fn rng(step: u64) -> StepRng {
    StepRng::new(7, step, stream::DRAW)
}

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

#[test]
fn a_draw_depends_on_the_generator_alone() {
    let objective = objective(Variance::FixedLarge, 0.1);
    let (a, b, other) = (
        objective.draw(&batch(16), &mut rng(0)).unwrap(),
        objective.draw(&batch(16), &mut rng(0)).unwrap(),
        objective.draw(&batch(16), &mut rng(1)).unwrap(),
    );
    assert_eq!(
        (&a.t, values(&a.noise), values(&a.y)),
        (&b.t, values(&b.noise), values(&b.y))
    );
    assert_ne!(a.t, other.t);
    assert_ne!(values(&a.noise), values(&other.noise));
}

#[test]
fn labels_drop_to_the_null_class_with_the_given_probability() {
    let count = |probability: f64| {
        let draw = objective(Variance::FixedLarge, probability)
            .draw(&batch(4000), &mut rng(0))
            .unwrap();
        let y = draw.y.to_vec1::<u32>().unwrap();
        let clean = batch(4000).y.to_vec1::<u32>().unwrap();
        assert!(
            y.iter()
                .zip(&clean)
                .all(|(y, clean)| y == clean || *y == CLASSES)
        );
        y.iter().filter(|y| **y == CLASSES).count()
    };
    assert_eq!((count(0.0), count(1.0)), (0, 4000));
    // 400 expected, standard deviation 19.
    assert!((320..480).contains(&count(0.1)), "{}", count(0.1));
}

#[test]
fn timesteps_are_uniform_over_the_chain() {
    let draw = objective(Variance::FixedLarge, 0.0)
        .draw(&batch(8000), &mut rng(0))
        .unwrap();
    let mut tenths = [0usize; 10];
    draw.t.iter().for_each(|t| tenths[*t as usize / 100] += 1);
    // 800 expected in each, standard deviation 27.
    assert!(tenths.iter().all(|n| (680..920).contains(n)), "{tenths:?}");
}

/// A whole step through the trait, as the trainers write it.
fn step<S: BlockStack, O: Objective<S>>(
    objective: &O,
    net: &S,
    depth: usize,
    draw: &O::Draw,
) -> Result<Tensor> {
    let output = run(net, &objective.input(draw)?, &Plan::full(depth))?.output;
    let prediction = objective.predict(net, output, draw)?;
    objective.loss(&prediction, draw)
}

/// [`ToyLatent`] with its tokens put back into an image, as DiT's head does.
struct Image(ToyLatent);

impl BlockStack for Image {
    type Input = tinyfusion_core::LatentQuery;
    type Cond = Tensor;
    fn layout(&self) -> &tinyfusion_core::BlockLayout {
        self.0.layout()
    }
    fn embed(&self, q: &Self::Input) -> Result<(Tensor, Tensor)> {
        self.0.embed(q)
    }
    fn block(&self, i: usize, h: &Tensor, c: &Tensor) -> Result<Tensor> {
        self.0.block(i, h, c)
    }
    fn head(&self, h: &Tensor, c: &Tensor) -> Result<Tensor> {
        let out = self.0.head(h, c)?.transpose(1, 2)?.contiguous()?; // (B, C, T)
        let (b, channels, _) = out.dims3()?;
        Ok(out.reshape((b, channels, 4, 4))?) // (B, C, H, W)
    }
}

#[test]
fn micro_batches_have_the_losses_of_the_whole() {
    let objective = objective(Variance::FixedLarge, 0.5);
    let net = Image(ToyLatent::new(2, &ToyLatent::init(2, 0).unwrap()).unwrap());
    let draw = objective.draw(&batch(6), &mut rng(3)).unwrap();
    let whole = values(&step(&objective, &net, 2, &draw).unwrap());
    let parts: Vec<f32> = [(0, 4), (4, 2)]
        .iter()
        .flat_map(|(start, len)| {
            let part = objective.rows(&draw, *start, *len).unwrap();
            values(&step(&objective, &net, 2, &part).unwrap())
        })
        .collect();
    assert_eq!(whole.len(), 6);
    for (a, b) in whole.iter().zip(&parts) {
        assert!((a - b).abs() <= 1e-6 * a.abs(), "{a} and {b}");
    }
    assert!(
        objective
            .rows(&draw, 4, 3)
            .unwrap_err()
            .to_string()
            .contains("6 samples")
    );
}

#[test]
fn distilling_from_oneself_costs_nothing_but_the_decoder_term() {
    let objective = objective(Variance::LearnedRange, 0.0);
    let x = batch(3);
    let noise = rng(4).normal(x.x.shape().clone(), &Device::Cpu).unwrap();
    let draw: DenoisingDraw = objective.draw_at(&x, vec![0, 1, 700], noise).unwrap();
    let output = rng(5).normal((3, 6, 4, 4), &Device::Cpu).unwrap();
    let kd = objective.distillation(&output, &output, &draw).unwrap();
    let vb = objective.losses(&output, &draw).unwrap().vb.unwrap();
    let (kd, vb) = (values(&kd.loss), values(&vb));
    assert_eq!(
        kd[0], vb[0],
        "at t = 0 the term is the student's own likelihood"
    );
    assert!(kd[0] != 0.0);
    assert_eq!(kd[1..], [0.0, 0.0]);
}

/// A token objective in MAR's shape: the prediction needs the network, the loss counts hidden tokens only.
struct HiddenTokens;

struct TokenDraw {
    query: TokenQuery,
    noise: Tensor, // (B, L, C)
}

impl Objective<ToyTokens> for HiddenTokens {
    type Batch = Tensor; // (B, L, C)
    type Draw = TokenDraw;
    type Prediction = Tensor; // (B, L, C)

    fn draw(&self, tokens: &Tensor, rng: &mut StepRng) -> Result<TokenDraw> {
        let (b, l, _) = tokens.dims3()?;
        let mut mask = vec![0f32; b * l];
        for row in mask.chunks_mut(l) {
            rng.permutation(l)[..l / 2]
                .iter()
                .for_each(|i| row[*i] = 1.0);
        }
        let noise = rng.normal(tokens.shape().clone(), tokens.device())?;
        let mask = Tensor::from_vec(mask, (b, l), tokens.device())?;
        let y = Tensor::zeros(b, DType::U32, tokens.device())?;
        Ok(TokenDraw {
            query: TokenQuery {
                tokens: tokens.clone(),
                mask,
                y,
                dropout: None,
            },
            noise,
        })
    }
    fn rows(&self, draw: &TokenDraw, start: usize, len: usize) -> Result<TokenDraw> {
        let part = |t: &Tensor| t.narrow(0, start, len);
        let q = &draw.query;
        let query = TokenQuery {
            tokens: part(&q.tokens)?,
            mask: part(&q.mask)?,
            y: part(&q.y)?,
            dropout: None,
        };
        Ok(TokenDraw {
            query,
            noise: part(&draw.noise)?,
        })
    }
    fn input(&self, draw: &TokenDraw) -> Result<TokenQuery> {
        Ok(draw.query.clone())
    }
    fn noise_free(&self, draw: &TokenDraw) -> Result<TokenQuery> {
        Ok(draw.query.clone())
    }
    fn predict(&self, net: &ToyTokens, output: Tensor, draw: &TokenDraw) -> Result<Tensor> {
        // Stands for the per-token denoiser, which lives in the model.
        assert_eq!(net.layout().stage_depths().len(), 2);
        Ok((output + &draw.noise)?)
    }
    fn loss(&self, prediction: &Tensor, draw: &TokenDraw) -> Result<Tensor> {
        let error = (prediction - &draw.query.tokens)?.sqr()?.mean(2)?; // (B, L)
        Ok((error * &draw.query.mask)?.mean(1)?)
    }
    fn distill(&self, student: &Tensor, teacher: &Tensor, draw: &TokenDraw) -> Result<Tensor> {
        let error = (student - teacher.detach())?.sqr()?.mean(2)?; // (B, L)
        Ok((error * &draw.query.mask)?.mean(1)?)
    }
}

#[test]
fn the_trait_fits_a_two_stage_token_model() {
    let net = ToyTokens::new([1, 2], &ToyTokens::init([1, 2], 0).unwrap()).unwrap();
    let tokens = rng(6)
        .normal((4, 6, ToyTokens::CHANNELS), &Device::Cpu)
        .unwrap();
    let draw = HiddenTokens.draw(&tokens, &mut rng(7)).unwrap();
    let whole = values(&step(&HiddenTokens, &net, 3, &draw).unwrap());
    let last = HiddenTokens.rows(&draw, 3, 1).unwrap();
    let part = values(&step(&HiddenTokens, &net, 3, &last).unwrap());
    assert!((whole[3] - part[0]).abs() < 1e-6 && whole[3] > 0.0);
}
