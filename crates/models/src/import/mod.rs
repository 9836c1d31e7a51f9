//! Which network a checkpoint holds, told from the names and shapes of its tensors.
//!
//! What shapes cannot tell (heads; whether a network is a DiT or a SiT, whose keys are alike) comes from the caller
//! ([`Hints`]) or from the published size of the same width, and every such assumption is listed ([`Recognised::assumed`]).

pub mod diffusers;
mod latent;
mod tokens;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use candle_core::Tensor;
use serde_json::Value;
use tinyfusion_core::{Error, ParamSpec, Result, StateDict};

use crate::{DiTConfig, MarConfig, SiTConfig};

/// Names and shapes of tensors that need not be in memory.
pub type Shapes<'a> = BTreeMap<&'a str, &'a [usize]>;

/// A model family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// [`DiT`](crate::DiT)
    Dit,
    /// [`SiT`](crate::SiT)
    Sit,
    /// [`Mar`](crate::Mar)
    Mar,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dit => "dit",
            Self::Sit => "sit",
            Self::Mar => "mar",
        })
    }
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Dit, Self::Sit, Self::Mar]
            .into_iter()
            .find(|k| k.to_string().eq_ignore_ascii_case(text))
            .ok_or_else(|| Error::usage(format!("family `{text}`: expected dit, sit or mar")))
    }
}

/// What the caller knows and shapes do not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hints {
    /// The family.
    pub kind: Option<Kind>,
    /// Attention heads of every block.
    pub num_heads: Option<usize>,
    /// Classes, the null class not counted.
    pub num_classes: Option<usize>,
}

/// The sizes of a network of any family.
#[derive(Debug, Clone, PartialEq)]
pub enum Sizes {
    /// A DiT's.
    Dit(DiTConfig),
    /// A SiT's.
    Sit(SiTConfig),
    /// A MAR's.
    Mar(MarConfig),
}

impl Sizes {
    /// Every tensor of the network, in the official names.
    pub fn params(&self) -> Vec<ParamSpec> {
        match self {
            Self::Dit(config) => config.params(),
            Self::Sit(config) => config.params(),
            Self::Mar(config) => config.params(),
        }
    }

    fn validate(&self) -> Result<()> {
        match self {
            Self::Dit(config) => config.validate(),
            Self::Sit(config) => config.validate(),
            Self::Mar(config) => config.validate(),
        }
    }
}

/// A network that was recognised.
#[derive(Debug, Clone)]
pub struct Recognised {
    /// Its sizes.
    pub sizes: Sizes,
    /// What tells them.
    pub inferred: Vec<String>,
    /// What was taken for granted.
    pub assumed: Vec<String>,
    /// The sizes by which diffusers names the tensors, where it does.
    renamed: Option<DiTConfig>,
}

impl Recognised {
    /// The weights in the official names.
    pub fn translate(&self, weights: &StateDict) -> Result<StateDict> {
        let mut translator = self.translator();
        for (name, tensor) in weights.iter() {
            translator.push(name.to_string(), tensor.clone())?;
        }
        translator.finish()
    }

    /// As [`translate`](Self::translate), a tensor at a time, in any order.
    pub fn translator(&self) -> Translator {
        Translator(match &self.renamed {
            Some(config) => Names::Diffusers(diffusers::Importer::new(config)),
            None => Names::Official(StateDict::new()),
        })
    }
}

/// Weights on their way into the official names. What was fused or is a copy of something is not kept: of a whole network no
/// more than a layer is in memory twice.
#[derive(Debug)]
pub struct Translator(Names);

#[derive(Debug)]
enum Names {
    Official(StateDict),
    Diffusers(diffusers::Importer),
}

impl Translator {
    /// Takes the next tensor.
    pub fn push(&mut self, name: String, tensor: Tensor) -> Result<()> {
        match &mut self.0 {
            Names::Official(all) => {
                all.insert(name, tensor);
                Ok(())
            }
            Names::Diffusers(importer) => importer.push(name, tensor),
        }
    }

    /// Everything, under the official names.
    pub fn finish(self) -> Result<StateDict> {
        match self.0 {
            Names::Official(all) => Ok(all),
            Names::Diffusers(importer) => importer.finish(),
        }
    }
}

/// Recognises the network that tensors of these names and `shapes` are; `config` is what diffusers writes beside its own.
///
/// Every tensor is accounted for: names and shapes are compared with those of the network that was found.
///
/// # Errors
/// [`Error::Usage`] where the caller has to say more, or something else; [`Error::Run`] where the tensors are none of these
/// networks.
pub fn recognise(shapes: &Shapes<'_>, config: Option<&Value>, hints: &Hints) -> Result<Recognised> {
    let found = match config {
        Some(config) => diffusers::recognise(config)?,
        None if shapes.contains_key(latent::PATCHES) => latent::recognise(shapes, hints)?,
        None if shapes.contains_key(tokens::CLASSES) => tokens::recognise(shapes, hints)?,
        None if shapes.keys().any(|n| n.starts_with("transformer_blocks.")) => {
            return Err(Error::usage(
                "has the names of diffusers, whose config.json tells the sizes; give the folder, not the file in it",
            ));
        }
        None => {
            let some: Vec<String> = shapes.keys().take(3).map(|n| format!("`{n}`")).collect();
            return Err(Error::run(format!(
                "is no DiT, SiT or MAR: they have `{}` or `{}`, this has {}…",
                latent::PATCHES,
                tokens::CLASSES,
                some.join(", ")
            )));
        }
    };
    let kind = match found.sizes {
        Sizes::Dit(_) => Kind::Dit,
        Sizes::Sit(_) => Kind::Sit,
        Sizes::Mar(_) => Kind::Mar,
    };
    if let Some(wanted) = hints.kind.filter(|&wanted| wanted != kind) {
        return Err(Error::usage(format!(
            "family {wanted} was asked for, but its tensors are those of {kind}"
        )));
    }
    let unfit = |e: Error| Error::run(e.to_string());
    found.sizes.validate().map_err(|e| match hints.num_heads {
        Some(_) => e, // what the caller said does not fit
        None => unfit(e),
    })?;
    match &found.renamed {
        Some(config) => {
            let mut shapes = shapes.clone();
            shapes.remove(diffusers::POSITIONS); // some versions store it
            tinyfusion_core::check_shapes(&shapes, &diffusers::params(config)).map_err(unfit)?;
        }
        None => tinyfusion_core::check_shapes(shapes, &found.sizes.params()).map_err(unfit)?,
    }
    Ok(found)
}

/// The shape of `name`, which must have `N` sides.
fn sides<const N: usize>(shapes: &Shapes<'_>, name: &str) -> Result<[usize; N]> {
    let found = shapes
        .get(name)
        .ok_or_else(|| Error::run(format!("has no `{name}`, which tells its sizes")))?;
    (*found).try_into().map_err(|_| {
        Error::run(format!(
            "`{name}` has shape {found:?}; {N} sides are expected"
        ))
    })
}

/// How many blocks there are whose tensors start with `prefix`, which must be numbered from 0 without a gap.
fn depth(shapes: &Shapes<'_>, prefix: &str) -> Result<usize> {
    let mut indices: Vec<usize> = shapes
        .keys()
        .filter_map(|name| tinyfusion_checkpoint::block_of(name, prefix))
        .collect();
    indices.sort_unstable();
    indices.dedup();
    match indices.iter().enumerate().find(|(i, index)| i != *index) {
        None => Ok(indices.len()),
        Some((i, _)) => Err(Error::run(format!("has no block {i} of `{prefix}`"))),
    }
}

/// The side of a square of `tokens`.
fn grid(name: &str, tokens: usize) -> Result<usize> {
    let side = tokens.isqrt();
    if side > 0 && side * side == tokens {
        Ok(side)
    } else {
        Err(Error::run(format!(
            "`{name}` has {tokens} positions, which are no square"
        )))
    }
}

/// The ratio of which `hidden` is what a config makes.
fn mlp_ratio(width: usize, hidden: usize) -> f64 {
    let ratio = hidden as f64 / width as f64;
    if (width as f64 * ratio) as usize == hidden {
        ratio
    } else {
        // Rounded down to one less.
        (hidden as f64 + 0.5) / width as f64
    }
}

/// All blocks of `prefix` must be dense: of a network cut in width the shapes do not tell the heads that it had.
fn check_dense(
    shapes: &Shapes<'_>,
    prefix: &str,
    depth: usize,
    width: usize,
    hidden: usize,
) -> Result<()> {
    for i in 0..depth {
        let [rows, _] = sides(shapes, &format!("{prefix}.{i}.attn.qkv.weight"))?;
        let [found, _] = sides(shapes, &format!("{prefix}.{i}.mlp.fc1.weight"))?;
        if rows != width.saturating_mul(3) || found != hidden {
            return Err(Error::run(format!(
                "block {i} of `{prefix}` has {rows} rows of q, k and v and {found} hidden channels, expected {} and \
                 {hidden}: a network cut in width is read from a model directory, or from the safetensors file of \
                 `tinyfusion export`, which say what it was cut from",
                width.saturating_mul(3)
            )));
        }
    }
    Ok(())
}
