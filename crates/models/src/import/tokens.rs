//! MAR.

use tinyfusion_core::{Error, Result};

use super::{Hints, Kind, Recognised, Shapes, Sizes, check_dense, depth, grid, mlp_ratio, sides};
use crate::MarConfig;

/// A tensor that only MAR has.
pub(super) const CLASSES: &str = "class_emb.weight";

pub(super) fn recognise(shapes: &Shapes<'_>, hints: &Hints) -> Result<Recognised> {
    if let Some(kind) = hints.kind.filter(|&kind| kind != Kind::Mar) {
        return Err(Error::usage(format!(
            "family {kind} was asked for, but its tensors are those of a MAR"
        )));
    }
    let [class_num, encoder] = sides(shapes, CLASSES)?;
    let [_, token] = sides(shapes, "z_proj.weight")?;
    let [_, with_buffer, _] = sides(shapes, "encoder_pos_embed_learned")?;
    let [_, tokens, decoder] = sides(shapes, "diffusion_pos_embed_learned")?;
    let [diffloss_w, _] = sides(shapes, "diffloss.net.cond_embed.weight")?;
    let [encoder_hidden, _] = sides(shapes, "encoder_blocks.0.mlp.fc1.weight")?;
    let [decoder_hidden, _] = sides(shapes, "decoder_blocks.0.mlp.fc1.weight")?;
    let [encoder_depth, decoder_depth] = MarConfig::STAGES.map(|stage| depth(shapes, stage));
    let (encoder_depth, decoder_depth) = (encoder_depth?, decoder_depth?);
    check_dense(
        shapes,
        "encoder_blocks",
        encoder_depth,
        encoder,
        encoder_hidden,
    )?;
    check_dense(
        shapes,
        "decoder_blocks",
        decoder_depth,
        decoder,
        decoder_hidden,
    )?;
    let Some(buffer_size) = with_buffer.checked_sub(tokens) else {
        return Err(Error::run(format!(
            "`encoder_pos_embed_learned` has {with_buffer} positions, fewer than the {tokens} tokens of \
             `diffusion_pos_embed_learned`"
        )));
    };
    if let Some(n) = hints.num_classes.filter(|&n| n != class_num) {
        return Err(Error::usage(format!(
            "{n} classes were asked for, but `{CLASSES}` has {class_num} rows"
        )));
    }
    let official = MarConfig::default();
    let mut assumed = Vec::new();
    // Patches of KL-16's latents, or else tokens that are not cut from patches.
    let channels = official.vae_embed_dim;
    let side = (token / channels).isqrt();
    let (patch_size, vae_embed_dim) = if side > 0 && side * side * channels == token {
        (side, channels)
    } else {
        (1, token)
    };
    assumed.push(format!(
        "tokens of {token} values are {patch_size}×{patch_size} of {vae_embed_dim} channels, latents of stride {}",
        official.vae_stride
    ));
    let mut heads = |width: usize, stage: &str| {
        if let Some(heads) = hints.num_heads {
            return Ok(heads);
        }
        let presets = MarConfig::presets();
        let known = presets.iter().find(|p| p.config.encoder_embed_dim == width);
        let Some(preset) = known else {
            return Err(Error::usage(format!(
                "its {stage} has width {width}, of which no published size is: say how many heads it has; write the \
                 address with #heads=N behind it"
            )));
        };
        let heads = preset.config.encoder_num_heads;
        assumed.push(format!(
            "{heads} heads in the {stage}, as {} of width {width} has (#heads=N says otherwise)",
            preset.name
        ));
        Ok(heads)
    };
    let (encoder_num_heads, decoder_num_heads) =
        (heads(encoder, "encoder")?, heads(decoder, "decoder")?);
    assumed.push(
        "dropout, dropped labels, mask ratio and diffusion steps are those of the official training".into(),
    );
    let grid = grid("diffusion_pos_embed_learned", tokens)?;
    let config = MarConfig {
        img_size: grid
            .saturating_mul(patch_size)
            .saturating_mul(official.vae_stride),
        patch_size,
        vae_embed_dim,
        encoder_embed_dim: encoder,
        encoder_depth,
        encoder_num_heads,
        decoder_embed_dim: decoder,
        decoder_depth,
        decoder_num_heads,
        mlp_ratio: mlp_ratio(encoder, encoder_hidden),
        class_num,
        buffer_size,
        diffloss_d: depth(shapes, "diffloss.net.res_blocks")?,
        diffloss_w,
        ..official
    };
    let inferred = vec![format!(
        "from names and shapes: {encoder_depth} blocks of width {encoder} and {decoder_depth} of width {decoder}, {grid}×{grid} \
         tokens of {token} values behind a buffer of {buffer_size}, {class_num} classes, a denoiser of {} blocks of width \
         {diffloss_w}",
        config.diffloss_d
    )];
    Ok(Recognised {
        sizes: Sizes::Mar(config),
        inferred,
        assumed,
        renamed: None,
    })
}
