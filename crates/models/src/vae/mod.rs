//! The autoencoders between images and the latents that diffusion works on.

mod blocks;
mod coder;
mod config;
mod flops;
mod names;
mod posterior;
mod tiling;

pub use config::{Activation, DownBlock, UpBlock, VaeConfig};
pub use names::{Layout, translate};
pub use posterior::Posterior;
pub use tiling::Tiling;

use candle_core::Tensor;
use coder::{Decoder, Encoder};
use tinyfusion_checkpoint::Loaded;
use tinyfusion_core::{Error, Result, StateDict};
use tinyfusion_nn::Scope;

/// A variational autoencoder of images (Rombach et al. 2022, arXiv 2112.10752): diffusers' `AutoencoderKL`, which is
/// also the first stage of LDM, Stable Diffusion and MAR.
///
/// For inference only: its convolutions have no backward, and asking for one is an error.
#[derive(Debug, Clone)]
pub struct AutoencoderKl {
    config: VaeConfig,
    encoder: Encoder,
    decoder: Decoder,
}

impl AutoencoderKl {
    /// The network on `weights` of [`VaeConfig::params`], whose storage it shares. Anything missing, unexpected or of another
    /// shape is an error that names it.
    pub fn new(config: &VaeConfig, weights: &StateDict) -> Result<Self> {
        config.validate()?;
        weights.check(&config.params())?;
        let root = Scope::new(weights, 0.0);
        Ok(Self {
            encoder: Encoder::load(&root, config)?,
            decoder: Decoder::load(&root, config)?,
            config: config.clone(),
        })
    }

    /// The network on the content of a weight file in any [`Layout`]; errors name the file and the keys as they are there.
    pub fn from_loaded(config: &VaeConfig, loaded: &Loaded) -> Result<Self> {
        config.validate()?;
        let layout = Layout::of(loaded.tensors.names());
        let weights = translate(config, &loaded.tensors, layout, Layout::Diffusers)
            .map_err(|e| Error::file(&loaded.path, e))?;
        Self::new(config, &weights)
    }

    /// The sizes.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Images (B, 3, H, W) in [−1, 1] → what they may be as latents (B, L, H/f, W/f). H and W must be divisible by the
    /// [`factor`](VaeConfig::factor).
    pub fn encode(&self, images: &Tensor) -> Result<Posterior> {
        self.check_images(images)?;
        Posterior::new(self.encoder.forward(images)?) // (B, 2·L, h, w)
    }

    /// Latents (B, L, h, w) as a posterior gives them, not scaled, → images (B, 3, h·f, w·f), in [−1, 1] but for what the
    /// network overshoots.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.check_latents(latents)?;
        self.decoder.forward(latents)
    }

    /// As [`encode`](Self::encode), in tiles; the moments are blended.
    pub fn encode_tiled(&self, images: &Tensor, tiling: &Tiling) -> Result<Posterior> {
        self.check_images(images)?;
        let sides = (self.config.factor(), 1);
        let moments = tiling::tiled(images, tiling, sides, |x| self.encoder.forward(x))?;
        Posterior::new(moments) // (B, 2·L, h, w)
    }

    /// As [`decode`](Self::decode), in tiles.
    pub fn decode_tiled(&self, latents: &Tensor, tiling: &Tiling) -> Result<Tensor> {
        self.check_latents(latents)?;
        let sides = (1, self.config.factor());
        tiling::tiled(latents, tiling, sides, |z| self.decoder.forward(z)) // (B, 3, h·f, w·f)
    }

    /// Latents as diffusion works on them: times the config's `scaling_factor`.
    pub fn scaled(&self, latents: &Tensor) -> Result<Tensor> {
        Ok((latents * self.config.scaling_factor)?)
    }

    /// Latents of diffusion as [`decode`](Self::decode) takes them: over the config's `scaling_factor`.
    pub fn unscaled(&self, latents: &Tensor) -> Result<Tensor> {
        Ok((latents / self.config.scaling_factor)?)
    }

    fn check_images(&self, images: &Tensor) -> Result<()> {
        let (channels, f) = (self.config.in_channels, self.config.factor());
        let fits = matches!(*images.dims(), [b, c, h, w]
            if b > 0 && c == channels && h > 0 && w > 0 && h % f == 0 && w % f == 0);
        if !fits {
            return Err(Error::usage(format!(
                "the VAE was given images {:?}; (B, {channels}, H, W) with H and W divisible by {f} is expected",
                images.dims()
            )));
        }
        Ok(())
    }

    fn check_latents(&self, latents: &Tensor) -> Result<()> {
        let channels = self.config.latent_channels;
        let fits =
            matches!(*latents.dims(), [b, c, h, w] if b > 0 && c == channels && h > 0 && w > 0);
        if !fits {
            return Err(Error::usage(format!(
                "the VAE was given latents {:?}; (B, {channels}, h, w) is expected",
                latents.dims()
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
