//! The names of the autoencoder's tensors, in the layouts that published files have.

use candle_core::Tensor;
use tinyfusion_core::{ParamSpec, Result, StateDict};

use super::config::{Stage, VaeConfig};

/// How a file names the tensors of an autoencoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// diffusers: `encoder.down_blocks.0.resnets.0.conv1.weight`, `mid_block.attentions.0.to_q.weight`. Ours.
    Diffusers,
    /// diffusers before 0.17, among them published Stable Diffusion files: attention is `query`, `key`, `value`, `proj_attn`.
    OldDiffusers,
    /// The code of LDM, Stable Diffusion and MAR: `encoder.down.0.block.0.conv1.weight`, `encoder.mid.attn_1.q.weight`;
    /// attention is made of 1×1 convolutions (C, C, 1, 1), and the decoder's stages are counted from the image.
    Original,
}

impl Layout {
    /// The layout that a file with these names has. Names of no layout are taken for [`Diffusers`](Self::Diffusers); a check
    /// against [`VaeConfig::params_in`] then lists what is wrong.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        for name in names {
            if [".down.", ".up.", ".mid."]
                .iter()
                .any(|part| name.contains(part))
            {
                return Self::Original;
            }
            if [".query.", ".key.", ".value.", ".proj_attn."]
                .iter()
                .any(|part| name.contains(part))
            {
                return Self::OldDiffusers;
            }
        }
        Self::Diffusers
    }
}

/// The same tensors under the names and in the shapes of layout `to`; `weights` are those of `config` in the layout `from`.
///
/// Nothing is computed: the values of both are the same memory. An error lists everything missing, unexpected and
/// mismatched under the names of `from`.
pub fn translate(
    config: &VaeConfig,
    weights: &StateDict,
    from: Layout,
    to: Layout,
) -> Result<StateDict> {
    let source = params_in(config, from);
    weights.check(&source)?;
    let target = params_in(config, to);
    let moved = source.iter().zip(target).map(|(source, target)| {
        let tensor: Tensor = weights.require(&source.name)?.reshape(target.shape)?;
        Ok((target.name, tensor))
    });
    moved.collect()
}

/// Every tensor in the layout `layout`, in the same order for all layouts.
pub(super) fn params_in(config: &VaeConfig, layout: Layout) -> Vec<ParamSpec> {
    let stages = config.block_out_channels.len();
    let mut specs = params(config);
    for spec in &mut specs {
        match layout {
            Layout::Diffusers => {}
            Layout::OldDiffusers => spec.name = old(&spec.name),
            Layout::Original => {
                if spec.name.contains(".attentions.") && spec.shape.len() == 2 {
                    spec.shape.extend([1, 1]);
                }
                spec.name = original(&spec.name, stages);
            }
        }
    }
    specs
}

/// Every tensor by our name and shape.
pub(super) fn params(config: &VaeConfig) -> Vec<ParamSpec> {
    let mut list = List::default();
    let (first, deepest) = (
        config.block_out_channels.first().copied().unwrap_or(0),
        config.deepest(),
    );
    let latent = config.latent_channels;
    list.conv("encoder.conv_in", config.in_channels, first, 3);
    for (i, stage) in config.down().iter().enumerate() {
        list.stage(&format!("encoder.down_blocks.{i}"), stage, "downsamplers");
    }
    list.middle("encoder.mid_block", deepest, config.mid_block_add_attention);
    list.norm("encoder.conv_norm_out", deepest);
    list.conv("encoder.conv_out", deepest, 2 * latent, 3);
    list.conv("decoder.conv_in", latent, deepest, 3);
    list.middle("decoder.mid_block", deepest, config.mid_block_add_attention);
    for (i, stage) in config.up().iter().enumerate() {
        list.stage(&format!("decoder.up_blocks.{i}"), stage, "upsamplers");
    }
    list.norm("decoder.conv_norm_out", first);
    list.conv("decoder.conv_out", first, config.out_channels, 3);
    if config.use_quant_conv {
        list.conv("quant_conv", 2 * latent, 2 * latent, 1);
    }
    if config.use_post_quant_conv {
        list.conv("post_quant_conv", latent, latent, 1);
    }
    list.0
}

#[derive(Default)]
struct List(Vec<ParamSpec>);

impl List {
    fn pair(&mut self, name: &str, weight: &[usize], bias: usize) {
        for (end, shape) in [("weight", weight), ("bias", &[bias])] {
            self.0.push(ParamSpec {
                name: format!("{name}.{end}"),
                shape: shape.to_vec(),
            });
        }
    }

    fn conv(&mut self, name: &str, inputs: usize, outputs: usize, kernel: usize) {
        self.pair(name, &[outputs, inputs, kernel, kernel], outputs);
    }

    fn norm(&mut self, name: &str, channels: usize) {
        self.pair(name, &[channels], channels);
    }

    fn resnet(&mut self, name: &str, inputs: usize, outputs: usize) {
        self.norm(&format!("{name}.norm1"), inputs);
        self.conv(&format!("{name}.conv1"), inputs, outputs, 3);
        self.norm(&format!("{name}.norm2"), outputs);
        self.conv(&format!("{name}.conv2"), outputs, outputs, 3);
        if inputs != outputs {
            self.conv(&format!("{name}.conv_shortcut"), inputs, outputs, 1);
        }
    }

    fn attention(&mut self, name: &str, channels: usize) {
        self.norm(&format!("{name}.group_norm"), channels);
        for part in ["to_q", "to_k", "to_v", "to_out.0"] {
            self.pair(&format!("{name}.{part}"), &[channels, channels], channels);
        }
    }

    fn middle(&mut self, name: &str, channels: usize, attention: bool) {
        if attention {
            self.attention(&format!("{name}.attentions.0"), channels);
        }
        for j in 0..2 {
            self.resnet(&format!("{name}.resnets.{j}"), channels, channels);
        }
    }

    fn stage(&mut self, name: &str, stage: &Stage, resampler: &str) {
        for j in 0..stage.blocks {
            let resnet = format!("{name}.resnets.{j}");
            self.resnet(&resnet, stage.inputs_of(j), stage.outputs);
            if stage.attention {
                self.attention(&format!("{name}.attentions.{j}"), stage.outputs);
            }
        }
        if stage.resamples {
            let conv = format!("{name}.{resampler}.0.conv");
            self.conv(&conv, stage.outputs, stage.outputs, 3);
        }
    }
}

/// Our name → that of diffusers before 0.17.
fn old(name: &str) -> String {
    if !name.contains(".attentions.") {
        return name.to_string();
    }
    let parts = [
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ];
    let mut name = name.to_string();
    for (new, old) in parts {
        name = name.replace(new, old);
    }
    name
}

/// Our name → that of the original code, in a network of so many stages.
fn original(name: &str, stages: usize) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let number = |text: &str| text.parse::<usize>().unwrap_or(0);
    let inside = |rest: &[&str]| rest.join(".");
    match parts.as_slice() {
        [side, "mid_block", "resnets", j, rest @ ..] => {
            format!("{side}.mid.block_{}.{}", number(j) + 1, inside(rest))
        }
        [side, "mid_block", "attentions", _, rest @ ..] => {
            format!("{side}.mid.attn_1.{}", original_attention(rest))
        }
        [side, "down_blocks" | "up_blocks", i, kind, j, rest @ ..] => {
            // The original counts the decoder's stages from the image, too.
            let stage = match *side {
                "decoder" => format!("up.{}", stages - 1 - number(i)),
                _ => format!("down.{i}"),
            };
            match *kind {
                "resnets" => {
                    let rest = inside(rest).replace("conv_shortcut", "nin_shortcut");
                    format!("{side}.{stage}.block.{j}.{rest}")
                }
                "attentions" => format!("{side}.{stage}.attn.{j}.{}", original_attention(rest)),
                "downsamplers" => format!("{side}.{stage}.downsample.{}", inside(rest)),
                _ => format!("{side}.{stage}.upsample.{}", inside(rest)),
            }
        }
        [side, "conv_norm_out", rest @ ..] => format!("{side}.norm_out.{}", inside(rest)),
        _ => name.to_string(),
    }
}

/// What follows an attention's name, in the original code.
fn original_attention(rest: &[&str]) -> String {
    match rest {
        ["group_norm", end] => format!("norm.{end}"),
        ["to_out", "0", end] => format!("proj_out.{end}"),
        [part, end] => format!("{}.{end}", part.trim_start_matches("to_")),
        _ => rest.join("."),
    }
}
