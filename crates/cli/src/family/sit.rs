use anyhow::Result;
use candle_core::{DType, Device};
use tinyfusion::core::{BlockLayout, ParamSpec, StateDict, WidthGroups};
use tinyfusion::diffusion::{Interpolant, InterpolantConfig, InterpolantObjective};
use tinyfusion::models::{SiT, SiTConfig};

use super::dit::label_drop;
use super::{Dit, Family, Model, Samples};
use crate::commands::export::ForOriginal;
use crate::commands::sample::{Drawing, FlowDrawing, Settings};

/// SiT (Ma et al., 2401.08740): DiT's network under an interpolant.
pub(crate) struct Sit;

impl Family for Sit {
    const NAME: &'static str = "SiT";
    const PROCESS: Option<&'static str> = Some("interpolant");
    const STAGES: &'static [&'static str] = &["blocks"];
    const BETA: f64 = 2e-4;
    const ORIGINAL: ForOriginal = Dit::ORIGINAL;
    type Config = SiTConfig;
    type Process = InterpolantConfig;
    type Net = SiT;
    type Objective = InterpolantObjective;

    fn validate(config: &SiTConfig, process: &InterpolantConfig) -> tinyfusion::core::Result<()> {
        config.validate()?;
        process.validate()
    }

    fn params(config: &SiTConfig) -> Vec<ParamSpec> {
        config.params()
    }

    fn init(config: &SiTConfig, seed: u64, device: &Device) -> tinyfusion::core::Result<StateDict> {
        config.init(seed, device)
    }

    fn is_fixed(name: &str) -> bool {
        SiTConfig::is_fixed(name)
    }

    fn layout(config: &SiTConfig) -> BlockLayout {
        Dit::layout(&config.0)
    }

    fn samples(config: &SiTConfig) -> Samples {
        Dit::samples(&config.0)
    }

    fn outputs(config: &SiTConfig) -> Vec<usize> {
        vec![config.out_channels()]
    }

    fn widths(config: &SiTConfig) -> Vec<usize> {
        Dit::widths(&config.0)
    }

    fn keep(
        config: &SiTConfig,
        weights: &StateDict,
        kept: &[usize],
    ) -> tinyfusion::core::Result<(SiTConfig, StateDict)> {
        let (config, weights) = Dit::keep(&config.0, weights, kept)?;
        Ok((SiTConfig(config), weights))
    }

    fn width_groups(config: &SiTConfig) -> Vec<WidthGroups> {
        config.width_groups()
    }

    fn narrow(
        config: &SiTConfig,
        weights: &StateDict,
        kept: &[Vec<usize>],
    ) -> tinyfusion::core::Result<(SiTConfig, StateDict)> {
        config.narrow(weights, kept)
    }

    fn network(
        config: &SiTConfig,
        weights: &StateDict,
        lora: f64,
        recompute: bool,
        dtype: DType,
    ) -> tinyfusion::core::Result<SiT> {
        Ok(SiT::with_lora(config, weights, lora)?
            .recomputing(recompute)
            .computing_in(dtype))
    }

    fn objective(
        config: &SiTConfig,
        process: &InterpolantConfig,
        held_out: bool,
    ) -> tinyfusion::core::Result<InterpolantObjective> {
        let labels = label_drop(&config.0, held_out);
        InterpolantObjective::new(Interpolant::new(*process)?, labels)
    }

    fn drawing<'a>(
        model: &'a Model<Self>,
        settings: &'a Settings,
    ) -> Result<Box<dyn Drawing + 'a>> {
        Ok(Box::new(FlowDrawing::new(model, settings)?))
    }
}
