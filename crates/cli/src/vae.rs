//! Autoencoders from files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{Device, Tensor};
use tinyfusion::checkpoint::{CONFIG_FILE, Checkpoint, DTypePolicy, Loaded, Root};
use tinyfusion::core::{Error, check_shapes};
use tinyfusion::data::to_uint8;
use tinyfusion::models::vae::{Layout, Posterior, Tiling};
use tinyfusion::models::{AutoencoderKl, VaeConfig};

/// What diffusers calls one.
pub(crate) const CLASS: &str = "AutoencoderKL";

/// An autoencoder with the hash of its weights.
pub(crate) struct Vae {
    pub(crate) net: AutoencoderKl,
    pub(crate) sha256: String,
    device: Device,
    /// How large images are cut, where they are.
    tiling: Option<Tiling>,
}

impl Vae {
    /// Reads a folder of diffusers (config.json beside the weights, or both in its folder `vae`), or weights in any
    /// published layout, whose sizes are then those of Stable Diffusion's or MAR's autoencoder.
    pub(crate) fn load(path: &Path, device: &Device) -> Result<Self> {
        let folder = vae_folder(path);
        let file = Checkpoint::open(&folder)?;
        let config = match file.config() {
            Some(config) => {
                let config = VaeConfig::from_diffusers(&config.to_string());
                Some(config.map_err(|e| Error::file(folder.join(CONFIG_FILE), e))?)
            }
            None => None,
        };
        let mut loaded = file.load(root_of(&file)?, DTypePolicy::F32, device)?;
        let network = loaded.tensors.iter().filter(|(name, _)| is_network(name));
        loaded.tensors = network
            .map(|(name, t)| (name.to_string(), t.clone()))
            .collect();
        let config = match config {
            Some(config) => config,
            None => known_sizes(&loaded)?,
        };
        Ok(Self {
            sha256: loaded.sha256.clone(),
            net: AutoencoderKl::from_loaded(&config, &loaded)?,
            device: device.clone(),
            tiling: None,
        })
    }

    /// The same with images coded in tiles, as diffusers cuts them: memory for one tile.
    pub(crate) fn in_tiles(mut self, tiles: bool) -> Self {
        self.tiling = tiles.then(|| Tiling::of(self.net.config()));
        self
    }

    /// The posterior of images (B, 3, H, W), on the CPU.
    pub(crate) fn encode(&self, images: &Tensor) -> tinyfusion::core::Result<Posterior> {
        let images = images.to_device(&self.device)?;
        let found = match &self.tiling {
            Some(tiling) => self.net.encode_tiled(&images, tiling),
            None => self.net.encode(&images),
        };
        found?.to_device(&Device::Cpu)
    }

    /// Images (B, 3, H, W) of latents (B, L, h, w).
    fn decode(&self, latents: &Tensor) -> tinyfusion::core::Result<Tensor> {
        match &self.tiling {
            Some(tiling) => self.net.decode_tiled(latents, tiling),
            None => self.net.decode(latents),
        }
    }

    /// Channels and side of the latents of images of `size` pixels.
    pub(crate) fn latents(&self, size: usize) -> Result<(usize, usize)> {
        let config = self.net.config();
        let factor = config.factor();
        if !size.is_multiple_of(factor) {
            return Err(Error::usage(format!(
                "images of {size} pixels: the autoencoder takes multiples of {factor}"
            ))
            .into());
        }
        Ok((config.latent_channels, size / factor))
    }

    /// Scaled latents (B, L, h, w) as images (B, 3, H, W) of u8, one at a time: a decoder's activations are large.
    pub(crate) fn images(&self, latents: &Tensor) -> tinyfusion::core::Result<Tensor> {
        let one = |i: usize| {
            let latent = self.net.unscaled(&latents.narrow(0, i, 1)?)?;
            to_uint8(&self.decode(&latent)?.to_device(&Device::Cpu)?) // (1, 3, H, W)
        };
        let all = (0..latents.dim(0)?)
            .map(one)
            .collect::<tinyfusion::core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&all, 0)?)
    }
}

/// The autoencoder's own folder: `vae` of a pipeline, or the folder itself.
pub(crate) fn vae_folder(path: &Path) -> PathBuf {
    let inner = path.join("vae");
    if inner.is_dir() {
        inner
    } else {
        path.to_path_buf()
    }
}

/// Whether a tensor is of the network. Stable Diffusion's training checkpoints also hold their loss (a discriminator is part
/// of it) and the averaged weights under other names.
fn is_network(name: &str) -> bool {
    !["loss.", "model_ema."].iter().any(|p| name.starts_with(p))
}

/// The published autoencoder that has tensors of these names and shapes.
fn published(shapes: &BTreeMap<&str, &[usize]>) -> Option<VaeConfig> {
    let layout = Layout::of(shapes.keys().copied());
    let known = [VaeConfig::sd(), VaeConfig::kl16()];
    let fits = |config: &VaeConfig| check_shapes(shapes, &config.params_in(layout)).is_ok();
    known.into_iter().find(fits)
}

/// The published autoencoder whose tensors these are.
fn known_sizes(loaded: &Loaded) -> Result<VaeConfig> {
    let shapes = loaded.tensors.iter().map(|(name, t)| (name, t.dims()));
    published(&shapes.collect()).ok_or_else(|| {
        Error::file(
            &loaded.path,
            "holds neither Stable Diffusion's nor MAR's autoencoder; for another one pass the folder with its config.json",
        )
        .into()
    })
}

/// The autoencoder that a checkpoint is, if it is one: what its config.json says, compared with its tensors, or else
/// what these are.
pub(crate) fn recognised(checkpoint: &Checkpoint) -> Result<Option<VaeConfig>> {
    let Ok(root) = root_of(checkpoint) else {
        return Ok(None); // a training checkpoint of something else
    };
    let tensors = checkpoint.tensors(root);
    let network = tensors.iter().filter(|t| is_network(&t.name));
    let shapes = network.map(|t| (t.name.as_str(), t.shape.as_slice()));
    let shapes: BTreeMap<&str, &[usize]> = shapes.collect();
    let Some(config) = checkpoint.config().filter(|c| c["_class_name"] == CLASS) else {
        return Ok(published(&shapes));
    };
    let wrong = |e| Error::file(checkpoint.path(), e);
    let config = VaeConfig::from_diffusers(&config.to_string()).map_err(wrong)?;
    let layout = Layout::of(shapes.keys().copied());
    check_shapes(&shapes, &config.params_in(layout)).map_err(wrong)?;
    Ok(Some(config))
}

/// Where the one network of a published file is: under `model`, or plainly.
fn root_of(file: &Checkpoint) -> Result<Root> {
    let plain = file.roots().contains(&Root::Plain).then_some(Root::Plain);
    Ok(file.choose(plain)?)
}
