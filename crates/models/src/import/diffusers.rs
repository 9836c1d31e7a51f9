//! A DiT in the names of diffusers' `DiTTransformer2DModel`, both ways (after its `convert_dit_to_diffusers.py`).
//!
//! diffusers keeps a copy of the embedders of time and class in every block, splits q, k and v, and computes the position
//! table instead of storing it. Nothing else differs in the weights: chunks of the adaLN projections, the final layer's
//! shift and scale among them, lie in the same order.
//!
//! Two things differ in what diffusers' class *computes* from them. It divides the exponents of the time's 128 frequencies
//! by 127 where the official code divides by 128, so that away from t = 0 its output is not the official one, of the
//! published `facebook/DiT-XL-2-256` neither; and the norm before its MLP has ε = 1e-5 unless the config says `norm_eps`.
//! Here the official network is meant.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::{Value, json};
use tinyfusion_core::{Error, ParamSpec, Result, StateDict};
use tinyfusion_nn::layers::sincos_2d;

use super::{Recognised, Sizes};
use crate::DiTConfig;

/// The position table, which old versions store.
pub(super) const POSITIONS: &str = "pos_embed.pos_embed";
/// The factor of diffusers' MLPs, which its config does not say.
const MLP_RATIO: f64 = 4.0;
/// ε of every norm of the official network.
const EPS: f64 = 1e-6;

/// What is read of the config; defaults are those of the constructor (diffusers 0.42).
#[derive(Deserialize)]
#[serde(default)]
struct Config {
    num_attention_heads: usize,
    attention_head_dim: usize,
    in_channels: usize,
    out_channels: Option<usize>,
    num_layers: usize,
    dropout: f64,
    attention_bias: bool,
    sample_size: usize,
    patch_size: usize,
    activation_fn: String,
    num_embeds_ada_norm: Option<usize>,
    norm_type: String,
    norm_elementwise_affine: bool,
    norm_eps: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            num_attention_heads: 16,
            attention_head_dim: 72,
            in_channels: 4,
            out_channels: None,
            num_layers: 28,
            dropout: 0.0,
            attention_bias: true,
            sample_size: 32,
            patch_size: 2,
            activation_fn: "gelu-approximate".into(),
            num_embeds_ada_norm: Some(1000),
            norm_type: "ada_norm_zero".into(),
            norm_elementwise_affine: false,
            norm_eps: 1e-5,
        }
    }
}

/// The network that a `transformer/config.json` describes.
pub(super) fn recognise(config: &Value) -> Result<Recognised> {
    let wrong = |what: String| Error::run(format!("config.json of diffusers: {what}"));
    let class = config.get("_class_name").and_then(Value::as_str);
    // The published folder names the class that was later split.
    if !matches!(
        class,
        Some("DiTTransformer2DModel" | "Transformer2DModel") | None
    ) {
        return Err(wrong(format!(
            "describes a {}; DiTTransformer2DModel is read",
            class.unwrap_or_default()
        )));
    }
    let c: Config = serde_json::from_value(config.clone()).map_err(|e| wrong(e.to_string()))?;
    let fixed = [
        ("norm_type", c.norm_type == "ada_norm_zero", "ada_norm_zero"),
        (
            "activation_fn",
            c.activation_fn == "gelu-approximate",
            "gelu-approximate",
        ),
        ("attention_bias", c.attention_bias, "true"),
        (
            "norm_elementwise_affine",
            !c.norm_elementwise_affine,
            "false",
        ),
    ];
    if let Some((key, _, expected)) = fixed.iter().find(|(_, holds, _)| !holds) {
        let found = config.get(*key).cloned().unwrap_or_default();
        return Err(wrong(format!(
            "{key} is {found}; a DiT has {expected}, so this is another network"
        )));
    }
    let Some(num_classes) = c.num_embeds_ada_norm else {
        return Err(wrong(
            "num_embeds_ada_norm is null; a DiT has classes".into(),
        ));
    };
    let out_channels = c.out_channels.unwrap_or(c.in_channels);
    if out_channels != c.in_channels && out_channels != c.in_channels.saturating_mul(2) {
        return Err(wrong(format!(
            "out_channels is {out_channels}; {} or twice as many are expected",
            c.in_channels
        )));
    }
    let sizes = DiTConfig {
        input_size: c.sample_size,
        patch_size: c.patch_size,
        in_channels: c.in_channels,
        hidden_size: c.num_attention_heads.saturating_mul(c.attention_head_dim),
        depth: c.num_layers,
        num_heads: c.num_attention_heads,
        mlp_ratio: MLP_RATIO,
        num_classes,
        class_dropout_prob: 0.1,
        learn_sigma: out_channels != c.in_channels,
        widths: None,
    };
    sizes.validate().map_err(|e| wrong(e.to_string()))?;
    let mut assumed = vec![
        "labels are dropped with probability 0.1 in training".into(),
        "frequencies of the time as in the official code (exponents over 128; diffusers' class divides by 127)".into(),
    ];
    if c.norm_eps != EPS {
        assumed.push(format!(
            "norms with ε = {EPS:e} as in the official code (config.json: {:e})",
            c.norm_eps
        ));
    }
    if c.dropout != 0.0 {
        assumed.push(format!("no dropout (config.json: {})", c.dropout));
    }
    Ok(Recognised {
        inferred: vec![format!(
            "from config.json of diffusers: depth {}, width {}, {} heads, patch {}, input {}×{size}×{size}",
            sizes.depth,
            sizes.hidden_size,
            sizes.num_heads,
            sizes.patch_size,
            sizes.in_channels,
            size = sizes.input_size,
        )],
        assumed,
        renamed: Some(sizes.clone()),
        sizes: Sizes::Dit(sizes),
    })
}

/// (official, diffusers') names of layers that are the same tensors, of a block and of the rest.
const IN_BLOCK: [(&str, &str); 4] = [
    ("adaLN_modulation.1", "norm1.linear"),
    ("attn.proj", "attn1.to_out.0"),
    ("mlp.fc1", "ff.net.0.proj"),
    ("mlp.fc2", "ff.net.2"),
];
const OUTSIDE: [(&str, &str); 3] = [
    ("x_embedder.proj", "pos_embed.proj"),
    ("final_layer.adaLN_modulation.1", "proj_out_1"),
    ("final_layer.linear", "proj_out_2"),
];
/// (official, diffusers' in every block) names of the tensors that every block has a copy of.
const COPIED: [(&str, &str); 5] = [
    (
        "t_embedder.mlp.0.weight",
        "norm1.emb.timestep_embedder.linear_1.weight",
    ),
    (
        "t_embedder.mlp.0.bias",
        "norm1.emb.timestep_embedder.linear_1.bias",
    ),
    (
        "t_embedder.mlp.2.weight",
        "norm1.emb.timestep_embedder.linear_2.weight",
    ),
    (
        "t_embedder.mlp.2.bias",
        "norm1.emb.timestep_embedder.linear_2.bias",
    ),
    (
        "y_embedder.embedding_table.weight",
        "norm1.emb.class_embedder.embedding_table.weight",
    ),
];
const QKV: [&str; 3] = ["attn1.to_q", "attn1.to_k", "attn1.to_v"];
const PARTS: [&str; 2] = ["weight", "bias"];

/// Every (official, diffusers') pair of names of layers with weight and bias that are the same tensors.
fn same(depth: usize) -> impl Iterator<Item = (String, String)> {
    let outside = OUTSIDE.map(|(ours, theirs)| (ours.to_string(), theirs.to_string()));
    let blocks = (0..depth).flat_map(|i| {
        IN_BLOCK.map(|(ours, theirs)| {
            (
                format!("blocks.{i}.{ours}"),
                format!("transformer_blocks.{i}.{theirs}"),
            )
        })
    });
    outside.into_iter().chain(blocks)
}

/// Every tensor of the network, as diffusers names it.
pub(super) fn params(config: &DiTConfig) -> Vec<ParamSpec> {
    let ours: BTreeMap<String, Vec<usize>> = config
        .params()
        .into_iter()
        .map(|p| (p.name, p.shape))
        .collect();
    let shape = |name: &str| ours.get(name).cloned().unwrap_or_default();
    let mut specs = Vec::new();
    let mut add = |name: String, shape: Vec<usize>| specs.push(ParamSpec { name, shape });
    for (ours, theirs) in same(config.depth) {
        for part in PARTS {
            add(format!("{theirs}.{part}"), shape(&format!("{ours}.{part}")));
        }
    }
    for i in 0..config.depth {
        for (ours, theirs) in COPIED {
            add(format!("transformer_blocks.{i}.{theirs}"), shape(ours));
        }
        for theirs in QKV {
            let (d, name) = (
                config.hidden_size,
                format!("transformer_blocks.{i}.{theirs}"),
            );
            add(format!("{name}.weight"), vec![d, d]);
            add(format!("{name}.bias"), vec![d]);
        }
    }
    specs
}

/// What becomes of one of diffusers' tensors.
#[derive(Debug)]
enum Place {
    /// It is the one of that name.
    Same(String),
    /// It is a copy of it.
    Copied(&'static str),
    /// It is the piece of that index.
    Piece(String, usize),
}

/// Weights on their way from diffusers' names into the official ones.
#[derive(Debug)]
pub(super) struct Importer {
    config: DiTConfig,
    places: BTreeMap<String, Place>,
    /// q, k and v, until the three are there.
    pieces: BTreeMap<String, [Option<Tensor>; 3]>,
    ours: StateDict,
}

impl Importer {
    pub(super) fn new(config: &DiTConfig) -> Self {
        let mut places = BTreeMap::new();
        for (ours, theirs) in same(config.depth) {
            for part in PARTS {
                places.insert(
                    format!("{theirs}.{part}"),
                    Place::Same(format!("{ours}.{part}")),
                );
            }
        }
        for i in 0..config.depth {
            let at = |name: &str| format!("transformer_blocks.{i}.{name}");
            for (ours, theirs) in COPIED {
                places.insert(at(theirs), Place::Copied(ours));
            }
            for (j, theirs) in QKV.into_iter().enumerate() {
                for part in PARTS {
                    let fused = format!("blocks.{i}.attn.qkv.{part}");
                    places.insert(at(&format!("{theirs}.{part}")), Place::Piece(fused, j));
                }
            }
        }
        Self {
            config: config.clone(),
            places,
            pieces: BTreeMap::new(),
            ours: StateDict::new(),
        }
    }

    pub(super) fn push(&mut self, name: String, tensor: Tensor) -> Result<()> {
        match self.places.get(&name) {
            // Unexpected, and reported as such when the names are compared.
            None => self.ours.insert(name, tensor),
            Some(Place::Same(ours)) => self.ours.insert(ours, tensor),
            Some(Place::Copied(ours)) => match self.ours.get(ours) {
                None => self.ours.insert(*ours, tensor),
                Some(first) if is_equal(first, &tensor)? => {}
                Some(_) => {
                    return Err(Error::run(format!(
                        "`{name}` differs from that of another block: blocks with embedders of their own were trained \
                         apart, and a DiT has one for all"
                    )));
                }
            },
            Some(Place::Piece(fused, j)) => {
                let pieces = self.pieces.entry(fused.clone()).or_default();
                pieces[*j] = Some(tensor);
                if let [Some(q), Some(k), Some(v)] = &*pieces {
                    let whole = Tensor::cat(&[q, k, v], 0)?; // (3·D, D) or (3·D,)
                    self.ours.insert(fused, whole);
                    self.pieces.remove(fused);
                }
            }
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<StateDict> {
        if let Some(fused) = self.pieces.keys().next() {
            return Err(Error::run(format!(
                "missing a piece of q, k and v of `{fused}`"
            )));
        }
        let table = sincos_2d(self.config.hidden_size, self.config.grid(), &Device::Cpu)?; // (1, T, D)
        if let Some(stored) = self.ours.remove(POSITIONS) {
            check_positions(POSITIONS, &stored, &table)?;
        }
        self.ours.insert("pos_embed", table);
        Ok(self.ours)
    }
}

/// The `transformer/config.json` and the weights of diffusers' `DiTTransformer2DModel`; large tensors share storage.
///
/// # Errors
/// Where diffusers' class has no way to say what the network is: blocks cut in width, MLPs of another ratio than 4, a table
/// of labels without a null class, other positions than the computed ones.
pub fn export(config: &DiTConfig, weights: &StateDict) -> Result<(Value, StateDict)> {
    let cannot = |what: &str| {
        Err(Error::usage(format!(
            "diffusers' DiTTransformer2DModel cannot hold {what}; the format safetensors can"
        )))
    };
    if config.widths.is_some() {
        return cannot("a network cut in width");
    }
    if config.mlp_hidden() != 4 * config.hidden_size {
        return cannot("MLPs that are not 4 times as wide as the network");
    }
    if config.class_dropout_prob <= 0.0 {
        return cannot("a network without a null class");
    }
    let table = sincos_2d(config.hidden_size, config.grid(), &Device::Cpu)?;
    check_positions("pos_embed", weights.require("pos_embed")?, &table)?;
    let mut theirs = StateDict::new();
    for (name, other) in same(config.depth) {
        for part in PARTS {
            let tensor = weights.require(&format!("{name}.{part}"))?;
            theirs.insert(format!("{other}.{part}"), tensor.clone());
        }
    }
    for i in 0..config.depth {
        for (name, other) in COPIED {
            let tensor = weights.require(name)?;
            theirs.insert(format!("transformer_blocks.{i}.{other}"), tensor.clone());
        }
        for part in PARTS {
            let fused = weights.require(&format!("blocks.{i}.attn.qkv.{part}"))?;
            for (j, other) in QKV.into_iter().enumerate() {
                let d = config.hidden_size;
                let piece = fused.narrow(0, j * d, d)?; // (D, D) or (D,)
                theirs.insert(format!("transformer_blocks.{i}.{other}.{part}"), piece);
            }
        }
    }
    let described = json!({
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": "0.42.1",
        "activation_fn": "gelu-approximate",
        "attention_bias": true,
        "attention_head_dim": config.head_size(),
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": false,
        "norm_eps": EPS,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels(),
        "patch_size": config.patch_size,
        "sample_size": config.input_size,
        "upcast_attention": false,
    });
    Ok((described, theirs))
}

fn is_equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(a.dims() == b.dims() && a.eq(b)?.flatten_all()?.min(0)?.to_scalar::<u8>()? == 1)
}

/// The stored table must be the computed one, up to the rounding of the type it was once stored in.
fn check_positions(name: &str, stored: &Tensor, table: &Tensor) -> Result<()> {
    /// A unit in the last place of values near 1, several times over: powers and sines differ that much between libraries.
    const ROUNDING: f32 = 1e-6;
    let stored = stored.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    if stored.elem_count() == table.elem_count() {
        let stored = stored.reshape(table.shape())?;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let rounded = table.to_dtype(dtype)?.to_dtype(DType::F32)?;
            let apart = (&stored - rounded)?.abs()?.max_all()?.to_scalar::<f32>()?;
            if apart <= ROUNDING {
                return Ok(());
            }
        }
    }
    Err(Error::usage(format!(
        "`{name}` {:?} is not the table of sines and cosines that diffusers computes in its place ({:?}); the format \
         safetensors keeps it",
        stored.dims(),
        table.dims()
    )))
}
