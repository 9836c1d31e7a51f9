use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, LatentBatch, Result, StepRng, TokenDenoiser, TokenQuery};

use crate::objective::check_timestep;
use crate::tokens::{TokenRows, check_orders, mask_of, patchify};
use crate::{
    BetaSchedule, DiffusionConfig, GaussianDiffusion, LabelDrop, Noised, Objective,
    TimestepObjective, Variance,
};

/// MAR's training problem.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MarTraining {
    /// Side of the patch of latents (or pixels) that makes a token.
    pub patch_size: usize,
    /// How labels are dropped; the null class is the fake latent.
    pub labels: LabelDrop,
    /// Smallest share of the tokens that is hidden.
    pub mask_ratio_min: f64,
    /// Times and noises per token, at most [`MAX_BATCH_MUL`](Self::MAX_BATCH_MUL).
    pub diffusion_batch_mul: usize,
    /// Whether questions come with the seeds of dropout.
    pub dropout: bool,
}

impl MarTraining {
    /// Most times and noises per token: all of them are drawn at once.
    pub const MAX_BATCH_MUL: usize = 1024;

    /// The same problem with nothing dropped, no label and no activation: for held-out losses.
    #[must_use]
    pub fn held_out(self) -> Self {
        Self {
            labels: LabelDrop {
                probability: 0.0,
                ..self.labels
            },
            dropout: false,
            ..self
        }
    }
}

/// MAR's per-token process: 1000 steps of the cosine schedule with a learned variance (Li et al. 2024, §4).
pub fn token_diffusion() -> DiffusionConfig {
    DiffusionConfig {
        schedule: BetaSchedule::Cosine,
        ..DiffusionConfig::default()
    }
}

/// MAR's training problem (Li et al. 2024, arXiv 2406.11838): hide a random share of the tokens, predict each of them
/// by a diffusion of its own, conditioned on what the network makes of the visible ones.
///
/// The loss is the diffusion loss of the hidden tokens, the mean over tokens and `diffusion_batch_mul` times and noises
/// for each. The reference sums over the batch and divides by the hidden tokens of the batch; since every sample hides
/// equally many, the mean over the samples of our per-sample means is that number, whole or in micro-batches. The
/// denoiser is run on the hidden tokens alone: the others are multiplied by zero in the reference.
#[derive(Debug, Clone)]
pub struct MarObjective {
    diffusion: GaussianDiffusion,
    training: MarTraining,
}

/// Everything random of one step of [`MarObjective`], for B samples of L tokens and K = `diffusion_batch_mul`.
#[derive(Debug, Clone)]
pub struct MarRandomness {
    /// An order of the tokens per sample; its first ones are hidden.
    pub orders: Vec<Vec<usize>>,
    /// Share of the tokens that is hidden; the same for all samples.
    pub mask_rate: f64,
    /// Which labels are dropped, (B,).
    pub dropped: Vec<bool>,
    /// Timesteps of the chain (K, B, L), flattened.
    pub t: Vec<u32>,
    /// Noise (K, B, L, C) f32, of which the hidden tokens' is used.
    pub noise: Tensor,
    /// Seeds of dropout, one per sample; none without dropout.
    pub dropout: Option<Vec<u64>>,
}

/// A batch with tokens hidden and noised: everything random of one step. Every sample hides n tokens.
#[derive(Debug, Clone)]
pub struct MarDraw {
    /// What the network is asked.
    pub query: TokenQuery,
    /// The hidden tokens, B·n of them.
    pub hidden: TokenRows,
    /// Timesteps of the chain (K, B, n), flattened.
    pub t: Vec<u32>,
    /// Clean hidden tokens (K, B, n, C), the same K times.
    pub x_start: Tensor,
    /// ε (K, B, n, C).
    pub noise: Tensor,
    /// x_t (K, B, n, C).
    pub x_t: Tensor,
}

/// What [`MarObjective`]'s losses are taken on.
#[derive(Debug, Clone)]
pub struct MarPrediction {
    /// The conditions of the hidden tokens, (B·n, D).
    pub z: Tensor,
    /// The denoiser's output for them, (K·B·n, 2·C).
    pub output: Tensor,
}

impl MarDraw {
    /// (K, B, n) of the draw.
    fn sizes(&self) -> Result<(usize, usize, usize)> {
        let (k, b, n, _) = self.noise.dims4()?;
        Ok((k, b, n))
    }

    /// A tensor (K, B, n, C) as rows (K·B·n, C).
    fn rows_of(tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.flatten_to(2)?)
    }

    /// Values of rows (K·B·n,) as their means per sample, (B,).
    fn per_sample(&self, rows: &Tensor) -> Result<Tensor> {
        Ok(rows.reshape(self.sizes()?)?.mean(2)?.mean(0)?)
    }
}

impl MarObjective {
    /// The objective over `diffusion`, the process of single tokens.
    pub fn new(diffusion: GaussianDiffusion, training: MarTraining) -> Result<Self> {
        let MarTraining {
            patch_size,
            labels,
            mask_ratio_min,
            diffusion_batch_mul,
            ..
        } = training;
        labels.validate()?;
        if !(0.0..=1.0).contains(&mask_ratio_min) {
            return Err(Error::usage(format!(
                "mask_ratio_min must be in [0, 1], found {mask_ratio_min}"
            )));
        }
        if patch_size == 0 {
            return Err(Error::usage("patch_size must be at least 1"));
        }
        let most = MarTraining::MAX_BATCH_MUL;
        if !(1..=most).contains(&diffusion_batch_mul) {
            return Err(Error::usage(format!(
                "diffusion_batch_mul must be in 1..={most}, found {diffusion_batch_mul}"
            )));
        }
        if diffusion.config().variance != Variance::LearnedRange {
            return Err(Error::usage(format!(
                "MAR's denoiser learns its variance, but the process has {:?}",
                diffusion.config().variance
            )));
        }
        Ok(Self {
            diffusion,
            training,
        })
    }

    /// The process of single tokens.
    pub fn diffusion(&self) -> &GaussianDiffusion {
        &self.diffusion
    }

    /// The settings.
    pub fn training(&self) -> MarTraining {
        self.training
    }

    /// Draws the orders, the mask rate, which labels are dropped, t, ε and the seeds of dropout, in that order.
    pub fn randomness(&self, batch: &LatentBatch, rng: &mut StepRng) -> Result<MarRandomness> {
        let MarTraining {
            patch_size: p,
            diffusion_batch_mul: k,
            ..
        } = self.training;
        let (b, c, h, w) = batch.x.dims4()?;
        let (l, width) = ((h / p) * (w / p), c * p * p);
        let orders = (0..b).map(|_| rng.permutation(l)).collect();
        let mask_rate = mask_rate(self.training.mask_ratio_min, rng);
        let dropped = self.training.labels.coins(b, rng);
        let t = rng.below(self.diffusion.num_timesteps(), k * b * l);
        let noise = rng.normal((k, b, l, width), batch.x.device())?;
        let seeds = rng.below(usize::MAX, b).into_iter().map(|s| s as u64);
        Ok(MarRandomness {
            orders,
            mask_rate,
            dropped,
            t: t.into_iter().map(|t| t as u32).collect(),
            noise,
            dropout: self.training.dropout.then(|| seeds.collect()),
        })
    }

    /// The draw with given randomness.
    pub fn draw_at(&self, batch: &LatentBatch, random: &MarRandomness) -> Result<MarDraw> {
        let labels = self.training.labels;
        let tokens = patchify(&batch.x, self.training.patch_size)?; // (B, L, C)
        let (b, l, c) = tokens.dims3()?;
        let k = self.training.diffusion_batch_mul;
        check_orders(&random.orders, b, l)?;
        labels.check(batch)?;
        let seeds = random.dropout.as_ref().map_or(b, Vec::len);
        if random.dropped.len() != b || seeds != b {
            return Err(Error::usage(format!(
                "a batch of {b} samples came with {} label drops and {seeds} dropout seeds",
                random.dropped.len()
            )));
        }
        if random.noise.dims() != [k, b, l, c] || random.t.len() != k * b * l {
            return Err(Error::usage(format!(
                "the noise of a draw must be {:?} with as many timesteps as rows, found {:?} and {}",
                [k, b, l, c],
                random.noise.dims(),
                random.t.len()
            )));
        }
        if !(0.0..=1.0).contains(&random.mask_rate) {
            return Err(Error::usage(format!(
                "the mask rate of a draw must be in [0, 1], found {}",
                random.mask_rate
            )));
        }
        // A rate of 0, too, hides one token: there is no loss of none.
        let n = ((l as f64 * random.mask_rate).ceil() as usize).clamp(1, l);
        let mask = mask_of(&random.orders, n)?; // (B, L)
        let hidden = {
            let mask = mask.to_vec2::<f32>()?;
            TokenRows::filter(b, l, |b, i| mask[b][i] != 0.0)
        };
        let at = |&(b, i): &(u32, u32)| b as usize * l + i as usize;
        let t = random.t.chunks_exact(b * l);
        let t: Vec<u32> = t
            .flat_map(|t| hidden.rows.iter().map(move |row| t[at(row)]))
            .collect();
        let shape = (k, b, n, c);
        let of_hidden = |x: &Tensor| hidden.of(x); // (B, L, C) → (B·n, C)
        let start = of_hidden(&tokens)?;
        let noise = (0..k)
            .map(|k| of_hidden(&random.noise.get(k)?))
            .collect::<Result<Vec<_>>>()?;
        let noise = Tensor::cat(&noise, 0)?; // (K·B·n, C)
        let x_start = start.repeat((k, 1))?; // (K·B·n, C), whole blocks
        let x_t = self.diffusion.q_sample(&x_start, &t, &noise)?;
        Ok(MarDraw {
            query: TokenQuery {
                tokens,
                mask,
                y: labels.replaced(batch, &random.dropped)?.y,
                dropout: random.dropout.clone(),
            },
            hidden,
            t,
            x_start: x_start.reshape(shape)?,
            noise: noise.reshape(shape)?,
            x_t: x_t.reshape(shape)?,
        })
    }

    /// The samples start..start + len.
    pub fn rows(&self, draw: &MarDraw, start: usize, len: usize) -> Result<MarDraw> {
        let (k, b, n) = draw.sizes()?;
        if start + len > b {
            return Err(Error::usage(format!(
                "rows {start}..{} were asked of a draw of {b} samples",
                start + len
            )));
        }
        let TokenQuery {
            tokens,
            mask,
            y,
            dropout,
        } = &draw.query;
        let query = TokenQuery {
            tokens: tokens.narrow(0, start, len)?, // (len, L, C)
            mask: mask.narrow(0, start, len)?,
            y: y.narrow(0, start, len)?,
            dropout: dropout.as_ref().map(|s| s[start..start + len].to_vec()),
        };
        let hidden = draw.hidden.rows[start * n..(start + len) * n].iter();
        let t = (0..k).flat_map(|k| &draw.t[(k * b + start) * n..][..len * n]);
        let part = |x: &Tensor| x.narrow(1, start, len); // (K, len, n, C)
        Ok(MarDraw {
            query,
            hidden: TokenRows {
                rows: hidden.map(|&(b, i)| (b - start as u32, i)).collect(),
            },
            t: t.copied().collect(),
            x_start: part(&draw.x_start)?,
            noise: part(&draw.noise)?,
            x_t: part(&draw.x_t)?,
        })
    }

    /// The denoiser's prediction for the hidden tokens under `z` (B, L, D), the output of the stack.
    pub fn prediction<S: TokenDenoiser>(
        &self,
        net: &S,
        z: &Tensor,
        draw: &MarDraw,
    ) -> Result<MarPrediction> {
        let (k, _, _) = draw.sizes()?;
        let z = draw.hidden.of(z)?; // (B·n, D)
        let every = Tensor::cat(&vec![&z; k], 0)?; // (K·B·n, D), whole blocks
        let x_t = MarDraw::rows_of(&draw.x_t)?; // (K·B·n, C)
        let t = self.diffusion.model_timesteps(&draw.t, x_t.device())?; // (K·B·n,)
        let output = net.denoise_tokens(&x_t, &t, &every)?; // (K·B·n, 2·C)
        Ok(MarPrediction { z, output })
    }

    /// The diffusion loss per sample, (B,).
    pub fn losses(&self, prediction: &MarPrediction, draw: &MarDraw) -> Result<Tensor> {
        let (x_start, noise, x_t) = (
            MarDraw::rows_of(&draw.x_start)?,
            MarDraw::rows_of(&draw.noise)?,
            MarDraw::rows_of(&draw.x_t)?,
        );
        let noised = Noised {
            x_start: &x_start,
            noise: &noise,
            x_t: &x_t,
            t: &draw.t,
        };
        let rows = self.diffusion.losses(&prediction.output, &noised)?.loss; // (K·B·n,)
        draw.per_sample(&rows)
    }

    /// L_KD per sample, (B,): the mean squared difference of the conditions z of the hidden tokens, over tokens and
    /// channels, plus that of the denoisers' outputs for them on the same noise, over tokens, times and all 2·C channels
    /// (the estimate's and the variance's alike). Visible tokens are not compared: nothing is drawn from their z.
    pub fn distillation(
        &self,
        student: &MarPrediction,
        teacher: &MarPrediction,
        draw: &MarDraw,
    ) -> Result<Tensor> {
        let (_, b, n) = draw.sizes()?;
        if student.z.dims() != teacher.z.dims() {
            return Err(Error::usage(format!(
                "the student's conditions are {:?} and the teacher's {:?} (tokens, width): a MAR is distilled only \
                 between decoders of one width",
                student.z.dims(),
                teacher.z.dims()
            )));
        }
        let difference = |student: &Tensor, teacher: &Tensor| -> Result<Tensor> {
            let (student, teacher) = (student.to_dtype(DType::F32)?, teacher.detach());
            Ok((student - teacher.to_dtype(DType::F32)?)?.sqr()?.mean(1)?)
        };
        let z = difference(&student.z, &teacher.z)?; // (B·n,)
        let outputs = difference(&student.output, &teacher.output)?; // (K·B·n,)
        Ok((z.reshape((b, n))?.mean(1)? + draw.per_sample(&outputs)?)?)
    }
}

/// The share of hidden tokens: normal around 1 with deviation 0.25, cut to [least, 1] (Li et al. 2024, §4).
fn mask_rate(least: f64, rng: &mut StepRng) -> f64 {
    const DEVIATION: f64 = 0.25;
    // Uniform proposals, kept as often as the density says: even for the widest range, [0, 1], every third is.
    const MOST: usize = 10_000;
    for _ in 0..MOST {
        let coins = rng.uniform(2);
        let rate = least + (1.0 - least) * coins[0];
        if coins[1] < (-0.5 * ((1.0 - rate) / DEVIATION).powi(2)).exp() {
            return rate;
        }
    }
    1.0 // the mode; 10⁴ refusals in a row do not happen
}

impl<S: TokenDenoiser> Objective<S> for MarObjective {
    type Batch = LatentBatch;
    type Draw = MarDraw;
    type Prediction = MarPrediction;

    fn draw(&self, batch: &LatentBatch, rng: &mut StepRng) -> Result<MarDraw> {
        self.draw_at(batch, &self.randomness(batch, rng)?)
    }

    fn rows(&self, draw: &MarDraw, start: usize, len: usize) -> Result<MarDraw> {
        self.rows(draw, start, len)
    }

    fn input(&self, draw: &MarDraw) -> Result<TokenQuery> {
        Ok(draw.query.clone())
    }

    /// The stack sees tokens that are hidden or clean; only the small denoiser sees noise.
    fn noise_free(&self, draw: &MarDraw) -> Result<TokenQuery> {
        Ok(draw.query.clone())
    }

    fn predict(&self, net: &S, output: Tensor, draw: &MarDraw) -> Result<MarPrediction> {
        self.prediction(net, &output, draw)
    }

    fn loss(&self, prediction: &MarPrediction, draw: &MarDraw) -> Result<Tensor> {
        self.losses(prediction, draw)
    }

    fn distill(
        &self,
        student: &MarPrediction,
        teacher: &MarPrediction,
        draw: &MarDraw,
    ) -> Result<Tensor> {
        self.distillation(student, teacher, draw)
    }
}

impl<S: TokenDenoiser> TimestepObjective<S> for MarObjective {
    /// Of the per-token diffusion.
    fn timesteps(&self) -> usize {
        self.diffusion.num_timesteps()
    }

    fn draw_timestep(&self, batch: &LatentBatch, t: usize, rng: &mut StepRng) -> Result<MarDraw> {
        check_timestep(t, self.diffusion.num_timesteps())?;
        let mut random = self.randomness(batch, rng)?;
        random.t.fill(t as u32); // those of the draw are not used
        self.draw_at(batch, &random)
    }
}
