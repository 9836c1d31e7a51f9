//! The noise that images start from, and the network that is asked about them.

use std::ops::Range;

use candle_core::{Device, Tensor};
use tinyfusion::core::{BlockStack, LatentQuery, Plan, StepRng, run as run_plan, stream};
use tinyfusion::diffusion::{Guidance, GuidedChannels};

use super::{Channels, Settings};
use crate::family::Samples;

/// Some of the images of a run.
pub(crate) struct Images {
    pub(crate) seed: u64,
    pub(crate) numbers: Range<usize>,
    pub(crate) classes: Vec<u32>,
}

/// The noise of some images, each from a generator of its own: who its neighbours are does not show.
pub(super) struct Noise {
    rngs: Vec<StepRng>,
    device: Device,
}

impl Noise {
    /// On `device`: drawn on the CPU, so that a seed gives the same noise everywhere.
    pub(super) fn of(images: &Images, device: &Device) -> Self {
        let numbers = images.numbers.clone();
        let rng = |i| StepRng::new(images.seed, i as u64, stream::SAMPLE);
        Self {
            rngs: numbers.map(rng).collect(),
            device: device.clone(),
        }
    }

    /// Standard normal (B, C, H, W).
    pub(super) fn normal(&mut self, of: Samples) -> tinyfusion::core::Result<Tensor> {
        let shape = (1, of.channels, of.size, of.size);
        let each = self
            .rngs
            .iter_mut()
            .map(|rng| rng.normal(shape, &Device::Cpu))
            .collect::<tinyfusion::core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&each, 0)?.to_device(&self.device)?)
    }
}

/// A network that is asked a latent, its time and its class, with guidance.
pub(super) struct Guided<'a, N> {
    pub(super) net: N,
    pub(super) device: Device,
    pub(super) samples: Samples,
    pub(super) settings: &'a Settings,
}

impl<N: BlockStack<Input = LatentQuery>> Guided<'_, N> {
    /// The guided estimate (B, C', H, W) for x (B, C, H, W) at the times t (B,).
    pub(super) fn ask(
        &self,
        x: &Tensor,
        t: &Tensor,
        classes: &[u32],
    ) -> tinyfusion::core::Result<Tensor> {
        let plan = Plan::full(self.net.layout().depth());
        let plain = |x: &Tensor, t: &Tensor, y: &[u32]| {
            let query = LatentQuery {
                x: x.clone(),
                t: t.clone(),
                y: Tensor::new(y, x.device())?,
            };
            Ok(run_plan(&self.net, &query, &plan)?.output)
        };
        if self.settings.cfg == 1.0 {
            return plain(x, t, classes);
        }
        let mut doubled = classes.to_vec();
        doubled.resize(2 * classes.len(), self.samples.classes as u32);
        let guidance = Guidance {
            scale: self.settings.cfg,
            channels: match self.settings.guided() {
                Channels::FirstThree => GuidedChannels::FirstThree,
                Channels::All => GuidedChannels::All,
            },
        };
        guidance.guide(x, t, |x, t| plain(x, t, &doubled))
    }
}
