use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};

/// Which channels of the network's estimate are guided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuidedChannels {
    /// The first three, whatever the number of channels: what DiT and SiT do (on latents of four).
    FirstThree,
    /// All channels of the sample.
    All,
}

/// Classifier-free guidance (Ho & Salimans, 2207.12598): estimate = uncond + scale · (cond − uncond) on the guided
/// channels; the others, variance channels included, stay those of each half.
///
/// Both ways below run the network once on a doubled batch, [conditional; unconditional], for which the
/// caller's closure binds the labels: the wanted classes, then as many null classes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guidance {
    /// 1 is no guidance.
    pub scale: f64,
    /// What is guided.
    pub channels: GuidedChannels,
}

impl Guidance {
    /// The guided estimate for x (B, C, H, W) at times t (B,): (B, C_out, H, W), the unguided channels being
    /// the conditional ones. `net` is asked for the doubled batch, x (2B, C, H, W) and t (2B,).
    pub fn guide(
        &self,
        x: &Tensor,
        t: &Tensor,
        net: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let output = net(&Tensor::cat(&[x, x], 0)?, &Tensor::cat(&[t, t], 0)?)?; // (2B, C_out, H, W)
        let (guided, cond, _) = self.combine(&output, x.dim(1)?)?;
        join(guided, &cond)
    }

    /// As the official `forward_with_cfg`, for samplers that run on the doubled batch: x (2B, C, H, W), whose
    /// second half is ignored, and t (2B,) give (2B, C_out, H, W), both halves guided alike and each with
    /// its own unguided channels.
    pub fn guide_doubled(
        &self,
        x: &Tensor,
        t: &Tensor,
        net: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let rows = x.dim(0)?;
        if rows % 2 != 0 {
            return Err(Error::usage(format!(
                "guidance on a doubled batch needs an even number of rows, found {rows}"
            )));
        }
        let half = x.narrow(0, 0, rows / 2)?; // (B, C, H, W)
        let output = net(&Tensor::cat(&[&half, &half], 0)?, t)?; // (2B, C_out, H, W)
        let (guided, cond, uncond) = self.combine(&output, x.dim(1)?)?;
        Ok(Tensor::cat(
            &[join(guided.clone(), &cond)?, join(guided, &uncond)?],
            0,
        )?) // (2B, C_out, H, W)
    }

    /// From the raw output (2B, C_out, H, W): the guided channels (B, G, H, W) and both halves' other channels
    /// (B, C_out − G, H, W).
    fn combine(&self, output: &Tensor, sample_channels: usize) -> Result<(Tensor, Tensor, Tensor)> {
        let (rows, channels) = (output.dim(0)?, output.dim(1)?);
        let guided = match self.channels {
            GuidedChannels::FirstThree => 3.min(sample_channels),
            GuidedChannels::All => sample_channels,
        };
        if channels < guided || rows % 2 != 0 {
            return Err(Error::usage(format!(
                "guidance of {guided} channels needs an output of an even number of rows and at least as many \
                 channels, found {:?}",
                output.dims()
            )));
        }
        let half = |start: usize| -> Result<(Tensor, Tensor)> {
            let rows = output.narrow(0, start, rows / 2)?; // (B, C_out, H, W)
            Ok((
                rows.narrow(1, 0, guided)?,
                rows.narrow(1, guided, channels - guided)?,
            ))
        };
        let ((cond, cond_rest), (uncond, uncond_rest)) = (half(0)?, half(rows / 2)?);
        let estimate = (&uncond + ((cond - &uncond)? * self.scale)?)?;
        Ok((estimate, cond_rest, uncond_rest))
    }
}

/// Puts the unguided channels, if there are any, behind the guided ones: (B, C_out, H, W).
fn join(guided: Tensor, rest: &Tensor) -> Result<Tensor> {
    match rest.dim(1)? {
        0 => Ok(guided),
        _ => Ok(Tensor::cat(&[&guided, rest], 1)?),
    }
}
