//! The cache is shared with the real `huggingface_hub`, both ways. Needs a Python that has it:
//! `TINYFUSION_PYTHON=venv/bin/python cargo nextest run -p tinyfusion-hub --run-ignored only`.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod support;

use std::fs;
use std::process::Command;

use support::{CONFIG, REPO, World, in_repo, weights};
use tinyfusion_hub::{Hub, resolve};

const WEIGHTS: &str = "transformer/model.safetensors";

/// Runs a script with this world's hub and cache; returns what it printed.
fn python(world: &World, offline: bool, script: &str) -> String {
    let program = std::env::var_os("TINYFUSION_PYTHON").expect("TINYFUSION_PYTHON names a Python");
    let output = Command::new(program)
        .args(["-c", script])
        .env("HF_ENDPOINT", world.server.endpoint())
        .env("HF_HOME", world.home.path())
        .env("HF_HUB_OFFLINE", if offline { "1" } else { "0" })
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .env("NO_PROXY", "127.0.0.1")
        .env_remove("HF_HUB_CACHE")
        .env_remove("HF_TOKEN")
        .output()
        .expect("Python runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
#[ignore = "needs a Python with huggingface_hub"]
fn python_uses_what_we_downloaded() {
    let (world, _) = World::with_model();
    let root = Hub::new(world.settings())
        .resolve(&in_repo(""), &mut ())
        .unwrap();
    let ask = format!(
        "from huggingface_hub import hf_hub_download, snapshot_download as s\n\
         print(hf_hub_download({REPO:?}, {WEIGHTS:?}))\nprint(s({REPO:?}))"
    );
    let expected = format!("{}\n{}", root.join(WEIGHTS).display(), root.display());
    assert_eq!(python(&world, true, &ask), expected);
    // Online it asks, and loads nothing.
    world.server.seen();
    let ask =
        format!("import huggingface_hub as h; print(h.hf_hub_download({REPO:?}, {WEIGHTS:?}))");
    assert_eq!(
        python(&world, false, &ask),
        root.join(WEIGHTS).display().to_string()
    );
    assert!(world.downloads().is_empty());
    let scan = "from huggingface_hub import scan_cache_dir\n\
                info = scan_cache_dir()\n\
                print(len(info.warnings), sum(len(v.files) for r in info.repos for v in r.revisions))";
    assert_eq!(python(&world, true, scan), "0 2");
}

#[test]
#[ignore = "needs a Python with huggingface_hub"]
fn we_use_what_python_downloaded() {
    let (world, _) = World::with_model();
    let ask = format!("import huggingface_hub as h; print(h.snapshot_download({REPO:?}))");
    let root = python(&world, false, &ask);
    world.server.seen();
    let mut settings = world.settings();
    settings.offline = true;
    let local = Hub::new(settings).resolve(&in_repo(""), &mut ()).unwrap();
    assert_eq!(local.display().to_string(), root);
    assert_eq!(fs::read(local.join(WEIGHTS)).unwrap(), weights());
    let config = in_repo("/transformer/config.json");
    let online = resolve(&config, &world.settings(), &mut ()).unwrap();
    assert_eq!(fs::read(online).unwrap(), CONFIG);
    assert!(world.downloads().is_empty());
}
