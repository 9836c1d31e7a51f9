use anyhow::Result;
use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};
use tinyfusion::diffusion::{
    CfgSchedule, DiffusionConfig, GaussianDiffusion, Respacing, TokenRng, TokenSampling,
    TokenStart, sample_tokens, token_diffusion, unpatchify,
};
use tinyfusion::models::Mar;

use super::{Drawing, Images, Settings};
use crate::family::{MaskedAutoregressive, Model};
use crate::settings::finite;

/// Flags that only the sampling of a MAR knows.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct TokenFlags {
    /// MAR: iterations, in each of which the network runs once and some more tokens are drawn [default: 64, at most the
    /// number of tokens]
    #[arg(long)]
    iterations: Option<usize>,
    /// MAR: how guidance grows while tokens appear [default: linear]
    #[arg(long, value_enum)]
    cfg_schedule: Option<Schedule>,
    /// MAR: factor on the noise of the tokens' diffusion [default: 1]
    #[arg(long, value_parser = finite)]
    temperature: Option<f64>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Schedule {
    Linear,
    Constant,
}

impl TokenFlags {
    /// An error where one of them was given, which mean nothing to `whom`.
    pub(super) fn refuse(&self, whom: &str) -> tinyfusion::core::Result<()> {
        Settings::refuse(
            whom,
            &[
                ("iterations", self.iterations.is_some()),
                ("cfg-schedule", self.cfg_schedule.is_some()),
                ("temperature", self.temperature.is_some()),
            ],
        )
    }
}

/// MAR's: token by token, each by a diffusion of its own.
pub(crate) struct TokenDrawing<'a> {
    net: Mar,
    device: Device,
    process: GaussianDiffusion,
    config: TokenSampling,
    settings: &'a Settings,
}

impl<'a> TokenDrawing<'a> {
    pub(crate) fn new(model: &Model<MaskedAutoregressive>, settings: &'a Settings) -> Result<Self> {
        let whom = "a MAR";
        Settings::refuse(
            whom,
            &[
                ("sampler", settings.sampler.is_some()),
                ("eta", settings.eta.is_some()),
                ("clip", settings.clip.is_some()),
                ("cfg-channels", settings.cfg_channels.is_some()),
            ],
        )?;
        settings.flow.refuse(whom)?;
        let flags = &settings.tokens;
        let tokens = model.config.seq_len();
        let config = TokenSampling {
            num_iter: flags.iterations.unwrap_or(64.min(tokens)),
            cfg: settings.cfg,
            cfg_schedule: match flags.cfg_schedule {
                None | Some(Schedule::Linear) => CfgSchedule::Linear,
                Some(Schedule::Constant) => CfgSchedule::Constant,
            },
            temperature: flags.temperature.unwrap_or(1.0),
        };
        config.validate()?;
        let respacing = match (&settings.respacing, settings.steps) {
            (Some(respacing), _) => respacing.clone(),
            (None, Some(steps)) => Respacing::Sections(vec![steps]),
            (None, None) => model.config.sampling_steps()?,
        };
        Ok(Self {
            net: model.network()?,
            device: model.compute.device.clone(),
            process: GaussianDiffusion::new(DiffusionConfig {
                respacing,
                ..token_diffusion()
            })?,
            config,
            settings,
        })
    }
}

impl Drawing for TokenDrawing<'_> {
    fn steps(&self) -> Option<usize> {
        let iterations = self.config.num_iter.min(self.net.config().seq_len());
        Some(iterations * self.process.num_timesteps())
    }

    fn report(&self) -> Map<String, Value> {
        let mut all = Map::new();
        all.insert("sampler".into(), "tokens".into());
        all.insert("cfg".into(), self.settings.cfg.into());
        all.insert("steps".into(), self.process.num_timesteps().into());
        all.insert("respacing".into(), json!(self.process.config().respacing));
        all.insert("tokens".into(), json!(self.config));
        all
    }

    fn draw(
        &self,
        images: &Images,
        on_step: &dyn Fn() -> tinyfusion::core::Result<()>,
    ) -> tinyfusion::core::Result<Tensor> {
        let config = self.net.config();
        let channels = config.token_embed_dim();
        let numbers = images.numbers.start as u64..images.numbers.end as u64;
        let mut rng = TokenRng::new(images.seed, numbers, channels, &self.device);
        let start = TokenStart {
            y: Tensor::new(images.classes.as_slice(), &self.device)?,
            fake: config.class_num as u32,
            orders: rng.orders(config.seq_len()),
            channels,
        };
        let tokens = sample_tokens(
            &self.net,
            &self.process,
            &self.config,
            &start,
            |request| rng.noise(request),
            |_| on_step(),
            |_| Ok(()),
        )?; // (B, L, C)
        unpatchify(&tokens, config.patch_size) // (B, C, H, W)
    }
}
