//! Draws at one timestep: all samples are at it, and everything else random is the same at all of them.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{Device, Tensor};
use tinyfusion_core::toy::{ToyImage, ToyTokens};
use tinyfusion_core::{
    BlockLayout, BlockStack, LatentBatch, Result, StepRng, TokenDenoiser, TokenQuery, stream,
};
use tinyfusion_diffusion::{
    DenoisingObjective, DiffusionConfig, GaussianDiffusion, Interpolant, InterpolantConfig,
    InterpolantObjective, LabelDrop, MarObjective, MarTraining, TimestepObjective, Variance,
    token_diffusion,
};
use tinyfusion_testing::max_diff;

const LABELS: LabelDrop = LabelDrop {
    num_classes: 5,
    probability: 0.5,
};

fn batch() -> LatentBatch {
    let x = StepRng::new(9, 0, stream::ORDER).normal((4, 3, 4, 4), &Device::Cpu);
    LatentBatch {
        x: x.unwrap(),
        y: Tensor::new(&[0u32, 1, 2, 3], &Device::Cpu).unwrap(),
    }
}

fn rng() -> StepRng {
    StepRng::new(7, 0, stream::CRITERION)
}

#[test]
fn a_dit_is_noised_alike_at_every_timestep() {
    let diffusion = GaussianDiffusion::new(DiffusionConfig {
        variance: Variance::FixedLarge,
        ..DiffusionConfig::default()
    });
    let objective = DenoisingObjective::new(diffusion.unwrap(), LABELS).unwrap();
    let at = |t| TimestepObjective::<ToyImage>::draw_timestep(&objective, &batch(), t, &mut rng());
    assert_eq!(TimestepObjective::<ToyImage>::timesteps(&objective), 1000);
    let (first, last) = (at(0).unwrap(), at(999).unwrap());
    assert_eq!((first.t, last.t), (vec![0; 4], vec![999; 4]));
    assert_eq!(max_diff(&first.noise, &last.noise), 0.0);
    let labels = |y: &Tensor| y.to_vec1::<u32>().unwrap();
    assert_eq!(labels(&first.y), labels(&last.y));
    // Little noise first, little else last.
    assert!(max_diff(&first.x_t, &first.x_start) < 0.1);
    assert!(max_diff(&last.x_t, &last.noise) < 0.1);
    let error = at(1000).unwrap_err().to_string();
    assert!(error.contains("timestep 1000"), "{error}");
}

#[test]
fn a_sit_goes_from_the_data_to_the_noise() {
    let process = Interpolant::new(InterpolantConfig::default()).unwrap();
    let objective = InterpolantObjective::new(process, LABELS).unwrap();
    let at = |t| TimestepObjective::<ToyImage>::draw_timestep(&objective, &batch(), t, &mut rng());
    let (first, last) = (at(0).unwrap(), at(999).unwrap());
    // t = 1 is data; the middle of a thousandth of [0, 1].
    assert_eq!((first.t[3], last.t[3]), (0.9995, 0.0005));
    assert_eq!(max_diff(&first.noise, &last.noise), 0.0);
    assert!(max_diff(&first.x_t, &first.x_start) < 0.01);
    assert!(max_diff(&last.x_t, &last.noise) < 0.01);
    assert!(at(1000).is_err());
}

/// [`ToyTokens`], which is never asked.
struct Toy(ToyTokens);

impl BlockStack for Toy {
    type Input = TokenQuery;
    type Cond = <ToyTokens as BlockStack>::Cond;
    fn layout(&self) -> &BlockLayout {
        self.0.layout()
    }
    fn embed(&self, q: &TokenQuery) -> Result<(Tensor, Self::Cond)> {
        self.0.embed(q)
    }
    fn block(&self, i: usize, h: &Tensor, c: &Self::Cond) -> Result<Tensor> {
        self.0.block(i, h, c)
    }
    fn head(&self, h: &Tensor, c: &Self::Cond) -> Result<Tensor> {
        self.0.head(h, c)
    }
}

impl TokenDenoiser for Toy {
    fn denoise_tokens(&self, x: &Tensor, _t: &Tensor, _z: &Tensor) -> Result<Tensor> {
        Ok(Tensor::cat(&[x, x], 1)?)
    }
}

#[test]
fn a_mar_hides_the_same_tokens_at_every_timestep_of_theirs() {
    let training = MarTraining {
        patch_size: 2,
        labels: LABELS,
        mask_ratio_min: 0.7,
        diffusion_batch_mul: 2,
        dropout: false,
    };
    let process = GaussianDiffusion::new(token_diffusion()).unwrap();
    let objective = MarObjective::new(process, training).unwrap();
    let at = |t| TimestepObjective::<Toy>::draw_timestep(&objective, &batch(), t, &mut rng());
    let (first, other) = (at(0).unwrap(), at(700).unwrap());
    assert!(first.t.iter().all(|&t| t == 0) && other.t.iter().all(|&t| t == 700));
    assert_eq!(max_diff(&first.noise, &other.noise), 0.0);
    assert_eq!(max_diff(&first.query.mask, &other.query.mask), 0.0);
    assert!(at(1000).is_err());
}
