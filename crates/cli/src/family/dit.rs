use anyhow::Result;
use candle_core::{DType, Device};
use serde_json::{Value, json};
use tinyfusion::checkpoint::keep_blocks;
use tinyfusion::core::{BlockLayout, Error, ParamSpec, StateDict, WidthGroups};
use tinyfusion::diffusion::{
    BetaSchedule, DenoisingObjective, DiffusionConfig, GaussianDiffusion, LabelDrop, Target,
};
use tinyfusion::models::import::diffusers;
use tinyfusion::models::{DiT, DiTConfig};

use super::{Family, Model, Samples};
use crate::commands::export::{ForDiffusers, ForOriginal};
use crate::commands::sample::{Drawing, GaussianDrawing, Settings};

/// DiT (Peebles & Xie, 2212.09748).
pub(crate) struct Dit;

impl Family for Dit {
    const NAME: &'static str = "DiT";
    const PROCESS: Option<&'static str> = Some("diffusion");
    const STAGES: &'static [&'static str] = &["blocks"];
    const BETA: f64 = 1e-2;
    const ORIGINAL: ForOriginal = ForOriginal {
        file: "model.pt",
        roots: &[],
    };
    type Config = DiTConfig;
    type Process = DiffusionConfig;
    type Net = DiT;
    type Objective = DenoisingObjective;

    fn validate(config: &DiTConfig, process: &DiffusionConfig) -> tinyfusion::core::Result<()> {
        config.validate()?;
        let outputs = GaussianDiffusion::new(process.clone())?.output_channels(config.in_channels);
        if outputs == config.out_channels() {
            return Ok(());
        }
        Err(Error::usage(format!(
            "the diffusion ({:?}) needs {outputs} output channels, the model has {} (learn_sigma = {}); a network \
             without learned σ needs \"diffusion\": {{\"variance\": \"fixed_large\"}} or \"fixed_small\"",
            process.variance,
            config.out_channels(),
            config.learn_sigma
        )))
    }

    fn params(config: &DiTConfig) -> Vec<ParamSpec> {
        config.params()
    }

    fn init(config: &DiTConfig, seed: u64, device: &Device) -> tinyfusion::core::Result<StateDict> {
        config.init(seed, device)
    }

    fn is_fixed(name: &str) -> bool {
        DiTConfig::is_fixed(name)
    }

    fn layout(config: &DiTConfig) -> BlockLayout {
        BlockLayout::single(config.depth)
    }

    fn samples(config: &DiTConfig) -> Samples {
        Samples {
            channels: config.in_channels,
            size: config.input_size,
            classes: config.num_classes,
            null_class: config.class_dropout_prob > 0.0,
            are_pixels: config.in_channels == 3,
        }
    }

    fn outputs(config: &DiTConfig) -> Vec<usize> {
        vec![config.out_channels()]
    }

    fn widths(config: &DiTConfig) -> Vec<usize> {
        vec![config.hidden_size]
    }

    fn keep(
        config: &DiTConfig,
        weights: &StateDict,
        kept: &[usize],
    ) -> tinyfusion::core::Result<(DiTConfig, StateDict)> {
        let weights = keep_blocks(weights, "blocks", kept)?; // checks that they are there
        Ok((config.with_blocks(kept), weights))
    }

    fn width_groups(config: &DiTConfig) -> Vec<WidthGroups> {
        config.width_groups()
    }

    fn narrow(
        config: &DiTConfig,
        weights: &StateDict,
        kept: &[Vec<usize>],
    ) -> tinyfusion::core::Result<(DiTConfig, StateDict)> {
        config.narrow(weights, kept)
    }

    fn network(
        config: &DiTConfig,
        weights: &StateDict,
        lora: f64,
        recompute: bool,
        dtype: DType,
    ) -> tinyfusion::core::Result<DiT> {
        Ok(DiT::with_lora(config, weights, lora)?
            .recomputing(recompute)
            .computing_in(dtype))
    }

    fn objective(
        config: &DiTConfig,
        process: &DiffusionConfig,
        held_out: bool,
    ) -> tinyfusion::core::Result<DenoisingObjective> {
        let labels = label_drop(config, held_out);
        DenoisingObjective::new(GaussianDiffusion::new(process.clone())?, labels)
    }

    fn for_diffusers(
        config: &DiTConfig,
        process: &DiffusionConfig,
        weights: &StateDict,
    ) -> tinyfusion::core::Result<ForDiffusers> {
        let (described, weights) = diffusers::export(config, weights)?;
        Ok(ForDiffusers {
            config: described,
            scheduler: scheduler(process)?,
            weights,
        })
    }

    fn drawing<'a>(
        model: &'a Model<Self>,
        settings: &'a Settings,
    ) -> Result<Box<dyn Drawing + 'a>> {
        Ok(Box::new(GaussianDrawing::new(model, settings)?))
    }
}

/// The process as a DDIMScheduler of diffusers, whose chain is the trained one.
fn scheduler(process: &DiffusionConfig) -> tinyfusion::core::Result<Value> {
    let betas = process.schedule.betas(process.steps)?;
    let schedule = match process.schedule {
        BetaSchedule::Linear => "linear",
        BetaSchedule::Cosine => "squaredcos_cap_v2",
    };
    let target = match process.target {
        Target::Noise => "epsilon",
        Target::XStart => "sample",
    };
    Ok(json!({
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.42.1",
        "beta_start": betas.first(),
        "beta_end": betas.last(),
        "beta_schedule": schedule,
        "clip_sample": false,
        "num_train_timesteps": process.steps,
        "prediction_type": target,
    }))
}

/// How labels are dropped in training, and not at all in judging.
pub(super) fn label_drop(config: &DiTConfig, held_out: bool) -> LabelDrop {
    LabelDrop {
        num_classes: config.num_classes as u32,
        probability: if held_out {
            0.0
        } else {
            config.class_dropout_prob
        },
    }
}
