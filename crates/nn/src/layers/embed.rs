use candle_core::{DType, Device, Tensor};
use tinyfusion_core::{Error, Result};

use crate::{Scope, layers::Linear, ops};

/// Width of the sinusoidal timestep features in every DiT.
const FREQUENCIES: usize = 256;

/// Patches of an image, linearly embedded: a convolution with kernel = stride = patch.
#[derive(Debug, Clone)]
pub struct PatchEmbed {
    weight: Tensor, // (D, C·p·p)
    bias: Tensor,   // (D,)
    patch: usize,
}

impl PatchEmbed {
    /// Takes `proj.weight` (D, C, p, p) and `proj.bias` (D,).
    pub fn load(scope: &Scope<'_>, channels: usize, patch: usize, width: usize) -> Result<Self> {
        let proj = scope.at("proj");
        let weight = proj.get("weight", &[width, channels, patch, patch])?;
        Ok(Self {
            weight: weight.reshape((width, channels * patch * patch))?,
            bias: proj.get("bias", &[width])?,
            patch,
        })
    }

    /// (B, C, H, W) → (B, T, D), tokens row by row.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let p = self.patch;
        if h % p != 0 || w % p != 0 {
            return Err(Error::usage(format!(
                "an image of {h}×{w} has no whole patches of {p}×{p}"
            )));
        }
        let patches = x
            .reshape((b, c, h / p, p, w / p, p))?
            .permute((0, 2, 4, 1, 3, 5))? // (B, H/p, W/p, C, p, p)
            .reshape((b, h / p * (w / p), c * p * p))?; // (B, T, C·p·p)
        Ok(ops::linear(&patches, &self.weight, Some(&self.bias))?) // (B, T, D)
    }
}

/// The inverse of patching with the channel fastest: (B, T, p·p·C) → (B, C, g·p, g·p), T = g².
pub fn unpatchify(x: &Tensor, grid: usize, patch: usize, channels: usize) -> Result<Tensor> {
    let b = x.dim(0)?;
    Ok(
        x.reshape((b, grid, grid, patch, patch, channels))? // (B, g, g, p, p, C)
            .permute((0, 5, 1, 3, 2, 4))? // (B, C, g, p, g, p)
            .reshape((b, channels, grid * patch, grid * patch))?,
    )
}

/// Sinusoidal features of t (B,) → (B, 256) in f32: cosines first, then sines (Ho et al. 2020, as in GLIDE).
pub fn timestep_frequencies(t: &Tensor) -> Result<Tensor> {
    let half = FREQUENCIES / 2;
    // The reference rounds the frequencies to f32 after each step; so do we.
    let freqs: Vec<f32> = (0..half)
        .map(|i| (-(10_000f64.ln()) as f32 * i as f32 / half as f32).exp())
        .collect();
    let freqs = Tensor::from_vec(freqs, (1, half), t.device())?;
    let args = t
        .to_dtype(DType::F32)?
        .unsqueeze(1)?
        .broadcast_mul(&freqs)?; // (B, 128)
    Ok(Tensor::cat(&[args.cos()?, args.sin()?], 1)?) // (B, 256)
}

/// A two-layer MLP on the timestep's sinusoidal features.
#[derive(Debug, Clone)]
pub struct TimestepEmbedder {
    first: Linear,
    second: Linear,
}

impl TimestepEmbedder {
    /// Takes `mlp.0` (D, 256) and `mlp.2` (D, D).
    pub fn load(scope: &Scope<'_>, width: usize) -> Result<Self> {
        Ok(Self {
            first: Linear::load(&scope.at("mlp.0"), FREQUENCIES, width)?,
            second: Linear::load(&scope.at("mlp.2"), width, width)?,
        })
    }

    /// t (B,), possibly fractional → (B, D) in `dtype`; the features are computed in f32 and then rounded to it.
    pub fn forward(&self, t: &Tensor, dtype: DType) -> Result<Tensor> {
        let features = timestep_frequencies(t)?.to_dtype(dtype)?; // (B, 256)
        let hidden = self.first.forward(&features)?; // (B, D)
        self.second.forward(&ops::silu(&hidden)?)
    }
}

/// A table of class embeddings; the last row is the null class when labels are dropped in training.
#[derive(Debug, Clone)]
pub struct LabelEmbedder {
    table: Tensor, // (rows, D)
}

impl LabelEmbedder {
    /// Takes `embedding_table.weight` (rows, D).
    pub fn load(scope: &Scope<'_>, rows: usize, width: usize) -> Result<Self> {
        Ok(Self {
            table: scope.at("embedding_table").get("weight", &[rows, width])?,
        })
    }

    /// y (B,) u32 → (B, D) in `dtype`.
    pub fn forward(&self, y: &Tensor, dtype: DType) -> Result<Tensor> {
        let y = y.to_device(self.table.device())?;
        Ok(self.table.index_select(&y, 0)?.to_dtype(dtype)?)
    }
}

/// Fixed 2-D sine-cosine positions, (1, grid², D) in f32; every part is D/4 long:
/// [sin(c·ω), cos(c·ω), sin(r·ω), cos(r·ω)] for the patch at row r, column c, ω_k = 10000^(−k/(D/4)).
///
/// The column stands first, as in the reference (MAE's `get_2d_sincos_pos_embed`).
pub fn sincos_2d(width: usize, grid: usize, device: &Device) -> Result<Tensor> {
    if width == 0 || !width.is_multiple_of(4) {
        return Err(Error::usage(format!(
            "2-D positions need a width divisible by 4, found {width}"
        )));
    }
    let quarter = width / 4;
    let omega: Vec<f64> = (0..quarter)
        .map(|k| 10_000f64.powf(-(k as f64) / quarter as f64))
        .collect();
    let mut values = Vec::with_capacity(grid * grid * width);
    for r in 0..grid {
        for c in 0..grid {
            for axis in [c, r] {
                values.extend(omega.iter().map(|w| (axis as f64 * w).sin() as f32));
                values.extend(omega.iter().map(|w| (axis as f64 * w).cos() as f32));
            }
        }
    }
    Ok(Tensor::from_vec(values, (1, grid * grid, width), device)?)
}
