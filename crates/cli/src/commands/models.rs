use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};
use tinyfusion::models::{DiTConfig, MarConfig, Preset, SiTConfig, presets};

use crate::output::say;

/// List the model presets.
///
/// Example: tinyfusion models --json
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A line of the list.
struct Row {
    name: String,
    depth: String,
    width: usize,
    heads: usize,
    patch: usize,
    parameters: usize,
    config: Value,
}

fn rows() -> Result<Vec<Row>> {
    let dits = presets();
    let sits = SiTConfig::presets();
    let dits = dits.iter().map(|p| of_dit(p, &p.config));
    let sits = sits.iter().map(|p| of_dit(p, &p.config.0));
    let mars = MarConfig::presets();
    let mars = mars.iter().map(|p| of_mar(&p.name, &p.config));
    dits.chain(sits).chain(mars).collect()
}

fn of_mar(name: &str, sizes: &MarConfig) -> Result<Row> {
    Ok(Row {
        name: name.into(),
        // Encoder and decoder, of one width in every preset.
        depth: format!("{}+{}", sizes.encoder_depth, sizes.decoder_depth),
        width: sizes.decoder_embed_dim,
        heads: sizes.decoder_num_heads,
        patch: sizes.patch_size,
        parameters: sizes.parameters(),
        config: serde_json::to_value(sizes)?,
    })
}

fn of_dit<C: Serialize>(preset: &Preset<C>, sizes: &DiTConfig) -> Result<Row> {
    Ok(Row {
        name: preset.name.clone(),
        depth: sizes.depth.to_string(),
        width: sizes.hidden_size,
        heads: sizes.num_heads,
        patch: sizes.patch_size,
        parameters: sizes.parameters(),
        config: serde_json::to_value(&preset.config)?,
    })
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let rows = rows()?;
    if args.json {
        let all: Vec<_> = rows
            .iter()
            .map(|r| json!({ "name": r.name, "parameters": r.parameters, "config": r.config }))
            .collect();
        say!("{:#}", json!(all))?;
        return Ok(());
    }
    say!(
        "{:<10} {:>7} {:>6} {:>6} {:>6} {:>12}",
        "name",
        "depth",
        "width",
        "heads",
        "patch",
        "parameters"
    )?;
    for r in rows {
        say!(
            "{:<10} {:>7} {:>6} {:>6} {:>6} {:>10.1} M",
            r.name,
            r.depth,
            r.width,
            r.heads,
            r.patch,
            r.parameters as f64 / 1e6
        )?;
    }
    Ok(())
}
