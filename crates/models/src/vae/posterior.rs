use candle_core::{Device, Tensor};
use tinyfusion_core::{Error, Result, StepRng};

/// The reference clamps the logarithm of the variance to this.
const LOGVAR: (f64, f64) = (-30.0, 20.0);

/// What an image may be as a latent: a normal distribution of independent values (Kingma & Welling 2014, arXiv 1312.6114;
/// LDM's `DiagonalGaussianDistribution`). Its latents are not scaled yet.
#[derive(Debug, Clone)]
pub struct Posterior {
    moments: Tensor,
}

impl Posterior {
    /// Of `moments` (B, 2·L, h, w): the means, then the logarithms of the variances, not clamped.
    pub fn new(moments: Tensor) -> Result<Self> {
        let (_, channels, _, _) = moments.dims4()?;
        if !channels.is_multiple_of(2) {
            return Err(Error::usage(format!(
                "moments {:?} are not two halves: means and logarithms of variances (B, 2·L, h, w) are expected",
                moments.dims()
            )));
        }
        Ok(Self { moments })
    }

    /// The same on a device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Self::new(self.moments.to_device(device)?)
    }

    /// (B, 2·L, h, w) as the encoder gave them.
    pub fn moments(&self) -> &Tensor {
        &self.moments
    }

    /// The means (B, L, h, w).
    pub fn mean(&self) -> Result<Tensor> {
        self.half(0)
    }

    /// The logarithms of the variances (B, L, h, w), clamped to [−30, 20].
    pub fn logvar(&self) -> Result<Tensor> {
        Ok(self.half(1)?.clamp(LOGVAR.0, LOGVAR.1)?)
    }

    /// The standard deviations (B, L, h, w).
    pub fn std(&self) -> Result<Tensor> {
        Ok((self.logvar()? * 0.5)?.exp()?)
    }

    /// The most probable latent (B, L, h, w): the mean.
    pub fn mode(&self) -> Result<Tensor> {
        self.mean()
    }

    /// mean + std·`noise`, (B, L, h, w); the noise is standard normal.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        let mean = self.mean()?;
        if noise.dims() != mean.dims() {
            return Err(Error::usage(format!(
                "the noise has shape {:?}, expected {:?}",
                noise.dims(),
                mean.dims()
            )));
        }
        Ok((mean + (self.std()? * noise)?)?)
    }

    /// [`sample`](Self::sample) with noise drawn from `rng`.
    pub fn draw(&self, rng: &mut StepRng) -> Result<Tensor> {
        let (b, channels, h, w) = self.moments.dims4()?;
        let noise = rng.normal((b, channels / 2, h, w), self.moments.device())?;
        self.sample(&noise.to_dtype(self.moments.dtype())?)
    }

    fn half(&self, i: usize) -> Result<Tensor> {
        let channels = self.moments.dim(1)? / 2;
        Ok(self.moments.narrow(1, i * channels, channels)?)
    }
}
