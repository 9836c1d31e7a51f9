use std::path::Path;

use anyhow::Result;
use serde_json::json;
use tinyfusion::hub::HubPath;
use tinyfusion::train::Stop;

use crate::hub::Client;
use crate::output::say;

/// Download models from the Hugging Face hub into the cache that the Python tools share.
///
/// Every command takes hub://OWNER/REPO[@REVISION][/FILE] where it reads a file or folder, and downloads what the cache
/// lacks; this one does it beforehand, or tells with --list what it would be. A repository or folder means what a
/// model needs of it: every .json, and the weights in the best format there is. Files are verified before they get
/// their names, and an interrupted download goes on where it ended. The environment is that of the Python tools:
/// HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
///
/// Examples:
///   tinyfusion pull hub://facebook/DiT-XL-2-256 --list
///   tinyfusion pull hub://facebook/DiT-XL-2-256 hub://stabilityai/sd-vae-ft-ema --lock hub.lock
///   tinyfusion inspect hub://facebook/DiT-XL-2-256 --lock hub.lock
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// hub://OWNER/REPO[@REVISION][/FILE]
    #[arg(required = true)]
    places: Vec<HubPath>,
    /// Download nothing: tell files, sizes and what the cache has
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(args: &Args, lock: Option<&Path>, stop: &Stop) -> Result<()> {
    let mut client = Client::new(lock)?;
    let mut all = Vec::new();
    for place in &args.places {
        if args.list {
            let files = client.list(place, stop)?;
            let missing = files.iter().filter(|f| !f.cached);
            all.push(json!({
                "place": place.to_string(),
                "bytes": files.iter().map(|f| f.size).sum::<u64>(),
                "to_download": missing.map(|f| f.size).sum::<u64>(),
                "files": files.iter().map(|f| json!({ "file": f.file, "bytes": f.size, "cached": f.cached }))
                    .collect::<Vec<_>>(),
            }));
        } else {
            let path = client.pull(place, stop)?;
            all.push(json!({ "place": place.to_string(), "path": path }));
        }
    }
    Ok(say!("{:#}", serde_json::Value::from(all))?)
}
