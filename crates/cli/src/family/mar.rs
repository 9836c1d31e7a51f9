use anyhow::Result;
use candle_core::{DType, Device};
use tinyfusion::checkpoint::Root;
use tinyfusion::core::{BlockLayout, ParamSpec, StateDict, WidthGroups};
use tinyfusion::diffusion::{GaussianDiffusion, MarObjective, token_diffusion};
use tinyfusion::models::{Mar, MarConfig};

use super::{Family, Model, Samples};
use crate::commands::export::ForOriginal;
use crate::commands::sample::{Drawing, Settings, TokenDrawing};

/// MAR (Li et al., 2406.11838): an encoder of the visible tokens, a decoder of all, a diffusion for each token.
pub(crate) struct MaskedAutoregressive;

impl Family for MaskedAutoregressive {
    const NAME: &'static str = "MAR";
    const PROCESS: Option<&'static str> = None; // its sizes say it all
    const STAGES: &'static [&'static str] = &["encoder_blocks", "decoder_blocks"];
    const BETA: f64 = 1e-2;
    const ORIGINAL: ForOriginal = ForOriginal {
        file: "checkpoint-last.pth",
        roots: &[Root::Model, Root::ModelEma],
    };
    type Config = MarConfig;
    type Process = ();
    type Net = Mar;
    type Objective = MarObjective;

    fn validate(config: &MarConfig, (): &()) -> tinyfusion::core::Result<()> {
        config.validate()
    }

    fn params(config: &MarConfig) -> Vec<ParamSpec> {
        config.params()
    }

    fn init(config: &MarConfig, seed: u64, device: &Device) -> tinyfusion::core::Result<StateDict> {
        config.init(seed, device)
    }

    fn is_fixed(name: &str) -> bool {
        MarConfig::is_fixed(name)
    }

    fn layout(config: &MarConfig) -> BlockLayout {
        BlockLayout::stages([config.encoder_depth, config.decoder_depth])
    }

    fn samples(config: &MarConfig) -> Samples {
        Samples {
            channels: config.vae_embed_dim,
            size: config.img_size / config.vae_stride,
            classes: config.class_num,
            null_class: config.label_drop_prob > 0.0,
            are_pixels: config.vae_stride == 1 && config.vae_embed_dim == 3,
        }
    }

    /// Tokens, their channels, and the width of the conditions z.
    fn outputs(config: &MarConfig) -> Vec<usize> {
        let (l, c) = (config.seq_len(), config.token_embed_dim());
        vec![l, c, config.decoder_embed_dim]
    }

    fn widths(config: &MarConfig) -> Vec<usize> {
        vec![config.encoder_embed_dim, config.decoder_embed_dim]
    }

    fn keep(
        config: &MarConfig,
        weights: &StateDict,
        kept: &[usize],
    ) -> tinyfusion::core::Result<(MarConfig, StateDict)> {
        config.keep(weights, kept)
    }

    fn width_groups(config: &MarConfig) -> Vec<WidthGroups> {
        config.width_groups()
    }

    fn narrow(
        config: &MarConfig,
        weights: &StateDict,
        kept: &[Vec<usize>],
    ) -> tinyfusion::core::Result<(MarConfig, StateDict)> {
        config.narrow(weights, kept)
    }

    fn network(
        config: &MarConfig,
        weights: &StateDict,
        lora: f64,
        recompute: bool,
        dtype: DType,
    ) -> tinyfusion::core::Result<Mar> {
        Ok(Mar::with_lora(config, weights, lora)?
            .recomputing(recompute)
            .computing_in(dtype))
    }

    fn as_teacher(net: Mar) -> Mar {
        net.without_dropout()
    }

    fn objective(
        config: &MarConfig,
        (): &(),
        held_out: bool,
    ) -> tinyfusion::core::Result<MarObjective> {
        let mut training = config.training();
        if held_out {
            training = training.held_out();
        }
        MarObjective::new(GaussianDiffusion::new(token_diffusion())?, training)
    }

    fn drawing<'a>(
        model: &'a Model<Self>,
        settings: &'a Settings,
    ) -> Result<Box<dyn Drawing + 'a>> {
        Ok(Box::new(TokenDrawing::new(model, settings)?))
    }
}
