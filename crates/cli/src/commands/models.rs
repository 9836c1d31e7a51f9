use anyhow::Result;
use serde_json::json;
use tinyfusion::models::presets;

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

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.json {
        let all: Vec<_> = presets()
            .iter()
            .map(|p| json!({ "name": p.name, "parameters": p.config.parameters(), "config": p.config }))
            .collect();
        say!("{:#}", json!(all))?;
        return Ok(());
    }
    say!(
        "{:<10} {:>5} {:>6} {:>6} {:>6} {:>12}",
        "name",
        "depth",
        "width",
        "heads",
        "patch",
        "parameters"
    )?;
    for p in presets() {
        let c = &p.config;
        say!(
            "{:<10} {:>5} {:>6} {:>6} {:>6} {:>10.1} M",
            p.name,
            c.depth,
            c.hidden_size,
            c.num_heads,
            c.patch_size,
            c.parameters() as f64 / 1e6
        )?;
    }
    Ok(())
}
