use std::path::PathBuf;

use anyhow::Result;
use tinyfusion::checkpoint::inspect;

/// Say what a checkpoint is: architecture, depth, parameters, tensors, provenance.
///
/// Example: tinyfusion inspect assets/teacher
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A model directory or a .safetensors file
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Also list every tensor
    #[arg(long)]
    tensors: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let found = inspect(&args.path)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
        return Ok(());
    }
    println!("path        {}", found.path.display());
    println!(
        "size        {:.2} MB, {} tensors, {} parameters",
        found.bytes as f64 / 1e6,
        found.tensors.len(),
        found.parameters
    );
    for (prefix, depth) in &found.blocks {
        println!("depth       {depth} (`{prefix}`)");
    }
    if let Some(config) = &found.config {
        let architecture = config
            .get("architecture")
            .and_then(|a| a.as_str())
            .unwrap_or("not named");
        println!("model       {architecture}");
        for section in ["model", "diffusion"] {
            if let Some(value) = config.get(section) {
                println!("{section:<11} {value}");
            }
        }
    }
    if let Some(provenance) = &found.provenance {
        println!("provenance  {}", serde_json::to_string(provenance)?);
    }
    if let Some(sha) = &found.recorded_sha256 {
        println!("sha256      {sha}");
    }
    if args.tensors {
        for t in &found.tensors {
            println!("{:<52} {:<6} {:?}", t.name, t.dtype, t.shape);
        }
    }
    Ok(())
}
