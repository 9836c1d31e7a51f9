//! DiT and SiT, whose tensors have the same names.

use tinyfusion_core::{Error, Result};

use super::{Hints, Kind, Recognised, Shapes, Sizes, check_dense, depth, grid, mlp_ratio, sides};
use crate::{DiTConfig, SiTConfig, presets};

/// A tensor that both have, and nothing else that is read here.
pub(super) const PATCHES: &str = "x_embedder.proj.weight";

pub(super) fn recognise(shapes: &Shapes<'_>, hints: &Hints) -> Result<Recognised> {
    let kind = match hints.kind {
        Some(Kind::Mar) | None => {
            return Err(Error::usage(
                "is a DiT or a SiT: their tensors have the same names and shapes, so say which; write the address with \
                 #family=dit or #family=sit behind it",
            ));
        }
        Some(kind) => kind,
    };
    let [width, channels, patch, _] = sides(shapes, PATCHES)?;
    let [_, tokens, _] = sides(shapes, "pos_embed")?;
    let [outputs, _] = sides(shapes, "final_layer.linear.weight")?;
    let [labels, _] = sides(shapes, "y_embedder.embedding_table.weight")?;
    let [hidden, _] = sides(shapes, "blocks.0.mlp.fc1.weight")?;
    let depth = depth(shapes, "blocks")?;
    check_dense(shapes, "blocks", depth, width, hidden)?;
    let grid = grid("pos_embed", tokens)?;
    let per_patch = patch.saturating_mul(patch).saturating_mul(channels);
    let learn_sigma = match outputs {
        n if n == per_patch => false,
        n if n == per_patch.saturating_mul(2) => true,
        n => {
            return Err(Error::run(format!(
                "`final_layer.linear.weight` has {n} rows, expected {per_patch} (or twice as many with learned σ) for \
                 patches of {patch}×{patch} with {channels} channels"
            )));
        }
    };
    let mut assumed = Vec::new();
    let (num_classes, null_row) = match hints.num_classes {
        Some(n) if labels == n => (n, false),
        Some(n) if labels == n.saturating_add(1) => (n, true),
        Some(n) => {
            return Err(Error::usage(format!(
                "{n} classes were asked for, but the table of labels has {labels} rows"
            )));
        }
        None => {
            assumed.push(format!(
                "the last of the {labels} rows of labels is the null class (#classes=N says otherwise)"
            ));
            (labels.saturating_sub(1), true)
        }
    };
    if null_row {
        assumed.push("labels are dropped with probability 0.1 in training".into());
    }
    let num_heads = heads(hints, width, &mut assumed)?;
    let config = DiTConfig {
        input_size: grid.saturating_mul(patch),
        patch_size: patch,
        in_channels: channels,
        hidden_size: width,
        depth,
        num_heads,
        mlp_ratio: mlp_ratio(width, hidden),
        num_classes,
        class_dropout_prob: if null_row { 0.1 } else { 0.0 },
        learn_sigma,
        widths: None,
    };
    let inferred = vec![format!(
        "from names and shapes: depth {depth}, width {width}, patch {patch}, input {channels}×{0}×{0}, {num_classes} classes, \
         {1} σ",
        config.input_size,
        if learn_sigma { "learned" } else { "no learned" }
    )];
    Ok(Recognised {
        sizes: match kind {
            Kind::Sit => Sizes::Sit(SiTConfig(config)),
            _ => Sizes::Dit(config),
        },
        inferred,
        assumed,
        renamed: None,
    })
}

/// As the caller says, or as in the published size of that width.
fn heads(hints: &Hints, width: usize, assumed: &mut Vec<String>) -> Result<usize> {
    if let Some(heads) = hints.num_heads {
        return Ok(heads);
    }
    let known = presets()
        .into_iter()
        .find(|p| p.config.hidden_size == width);
    let Some(preset) = known else {
        return Err(Error::usage(format!(
            "has width {width}, of which no published size is: say how many heads it has; write the address with \
             #heads=N behind it"
        )));
    };
    let heads = preset.config.num_heads;
    assumed.push(format!(
        "{heads} heads, as {} of width {width} has (#heads=N says otherwise)",
        preset.name
    ));
    Ok(heads)
}
