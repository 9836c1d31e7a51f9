//! From the hub to the table, over a hub on a loopback port: every published layout is pulled, inspected, learned on, cut,
//! distilled, sampled, evaluated and exported.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use tinyfusion::checkpoint::{DTypePolicy, Metadata, save, save_torch};
use tinyfusion::models::VaeConfig;
use tinyfusion::models::vae::{DownBlock, UpBlock};
use tinyfusion_testing::hub_server::{Access, HubServer, Storage, TOKEN};
use tinyfusion_tests::{Place, inception_weights, partials};

/// A hub, and a place whose commands ask it.
struct World {
    server: HubServer,
    place: Place,
}

/// Files of a repository: name and content.
type Files = Vec<(String, Vec<u8>)>;

impl World {
    fn new() -> Self {
        Self {
            server: HubServer::start(),
            place: Place::new(),
        }
    }

    /// Large files go where the hub has them.
    fn serve(&self, repo: &str, files: &Files) -> String {
        let storage = |name: &str| match name.ends_with(".json") {
            true => Storage::Git,
            false => Storage::Lfs,
        };
        let files: Vec<(&str, &[u8], Storage)> = files
            .iter()
            .map(|(name, content)| (name.as_str(), content.as_slice(), storage(name)))
            .collect();
        self.server.commit(repo, "main", &files)
    }

    fn command(&self, line: &str) -> std::process::Command {
        let mut command = self.place.command(line);
        command
            .env("HF_HOME", self.place.path("home"))
            .env("HF_ENDPOINT", self.server.endpoint())
            .env_remove("HF_TOKEN")
            .env_remove("HF_HUB_OFFLINE")
            .env_remove("HF_HUB_CACHE");
        // The hub is on this machine, whatever stands between it and others.
        for proxy in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(proxy).env_remove(proxy.to_lowercase());
        }
        command
    }

    fn ok(&self, line: &str) -> String {
        let output = self.command(line).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}\n{said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn fails(&self, code: i32, line: &str) -> String {
        let output = self.command(line).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{line}\n{said}");
        said
    }

    /// `GET`s of files since the last call.
    fn downloads(&self) -> usize {
        let seen = self.server.seen();
        let file = |s: &&tinyfusion_testing::hub_server::Seen| {
            s.method == "GET" && !s.path.starts_with("/api/")
        };
        seen.iter().filter(file).count()
    }
}

/// Everything under a folder of the golden checkpoints, or one file of them.
fn golden(name: &str) -> Files {
    fn add(files: &mut Files, root: &Path, path: &Path) {
        if path.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                add(files, root, &entry.unwrap().path());
            }
            return;
        }
        let name = path.strip_prefix(root).unwrap().to_str().unwrap();
        files.push((name.into(), fs::read(path).unwrap()));
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/golden/checkpoints");
    let path = folder.join(name);
    let mut files = Files::new();
    add(
        &mut files,
        if path.is_dir() { &path } else { &folder },
        &path,
    );
    files
}

/// A small autoencoder as diffusers keeps it, in the folder `prefix`.
fn autoencoder(place: &Place, prefix: &str, levels: usize, channels: usize) -> Files {
    let config = VaeConfig {
        down_block_types: vec![DownBlock::Plain; levels],
        up_block_types: vec![UpBlock::Plain; levels],
        block_out_channels: vec![8; levels],
        norm_num_groups: 4,
        latent_channels: channels,
        ..VaeConfig::default()
    };
    let weights = config.init(3, &Device::Cpu).unwrap();
    let file = place.path("vae.safetensors");
    save(&file, &weights, &Metadata::new(), DTypePolicy::F32).unwrap();
    vec![
        (
            format!("{prefix}config.json"),
            config.to_diffusers().unwrap().into_bytes(),
        ),
        (
            format!("{prefix}diffusion_pytorch_model.safetensors"),
            fs::read(file).unwrap(),
        ),
    ]
}

/// Six images of this side in three classes.
fn images(place: &Place, side: usize) {
    place.ok("pretrain teacher --steps 2 --depth 2 --hidden-size 16 --num-heads 2 --patch-size 8 --batch-size 4");
    place.ok("sample teacher/model drawn --count 6 --steps 2 --pngs");
    for i in 0..6 {
        let folder = place.path("images").join(format!("class-{}", i % 3));
        fs::create_dir_all(&folder).unwrap();
        let from = place.path(&format!("drawn/images/{i:08}.png"));
        fs::copy(from, folder.join(format!("{i}.png"))).unwrap();
    }
    assert!(
        side <= 24 || side == 32,
        "images are drawn at 24 pixels and resized"
    );
}

/// All commands on the model at `model`, whose images `vae` makes from latents.
fn whole_way(world: &World, model: &str, vae: &str, side: usize, keep: &str, drawn: &str) {
    let place = &world.place;
    let pulled: serde_json::Value = serde_json::from_str(&world.ok(&format!(
        "pull {} --lock hub.lock",
        model.split('#').next().unwrap()
    )))
    .unwrap();
    let path = PathBuf::from(pulled[0]["path"].as_str().unwrap());
    assert!(path.starts_with(place.path("home")) && path.exists());
    world.downloads();

    let lock = "--lock hub.lock";
    let found: serde_json::Value =
        serde_json::from_str(&world.ok(&format!("inspect {model} --json {lock}"))).unwrap();
    assert_eq!(found["asks"].as_array().map(Vec::len), Some(0), "{found}");
    world.ok(&format!(
        "encode images latents --vae {vae} --size {side} --batch-size 2 {lock}"
    ));
    let data = "--data latents --steps 2 --batch-size 4";
    world.ok(&format!(
        "learn {model} learned --pattern 1:2 {data} {lock}"
    ));
    world.ok(&format!(
        "cut {model} cut --selection learned/selection.json {lock}"
    ));
    assert_eq!(
        place.json("cut/selection.json")["kept"]
            .as_array()
            .unwrap()
            .len()
            .to_string(),
        keep
    );
    world.ok(&format!(
        "distill cut student --teacher {model} {data} {lock}"
    ));
    let student = "student/model";
    for (from, to) in [(model, "by-teacher"), (student, "by-student")] {
        world.ok(&format!(
            "sample {from} {to} --count 6 --vae {vae} {drawn} {lock}"
        ));
    }
    world.ok(&format!(
        "evaluate by-teacher/samples.npz by-student/samples.npz --weights hub://tiny/inception/inception.safetensors \
         --metrics fid --force --json scores.json {lock}"
    ));
    assert!(place.json("scores.json")["fid"].is_number());
    world.ok(&format!(
        "export {student} exported --format original --metrics scores.json"
    ));
    let card = place.text("exported/README.md");
    // What it was made from is still known by its address.
    assert!(card.contains("hub://"), "{card}");
    assert!(partials(&place.path("")).is_empty());
    let locked = place.text("hub.lock");
    assert!(
        locked.contains("repo = \"tiny/inception\"") && locked.contains("sha256"),
        "{locked}"
    );
}

fn with_inception() -> World {
    let world = World::new();
    let file = world.place.path("inception.safetensors");
    inception_weights(&file);
    let files = vec![(
        "inception.safetensors".to_string(),
        fs::read(&file).unwrap(),
    )];
    fs::remove_file(file).unwrap();
    world.serve("tiny/inception", &files);
    world
}

/// The transformer's weights as a pickle: facebook/DiT-XL-2-256 has them in this form alone.
fn as_bin(place: &Place, files: &mut Files) {
    const WEIGHTS: &str = "transformer/diffusion_pytorch_model.safetensors";
    let at = files.iter().position(|(name, _)| name == WEIGHTS).unwrap();
    let weights = candle_core::safetensors::load_buffer(&files[at].1, &Device::Cpu).unwrap();
    let bin = place.path("weights.bin");
    save_torch(&bin, &weights.into_iter().collect(), &[], DTypePolicy::Keep).unwrap();
    files[at] = (
        WEIGHTS.replace(".safetensors", ".bin"),
        fs::read(&bin).unwrap(),
    );
    fs::remove_file(bin).unwrap();
}

#[test]
fn a_diffusers_pipeline_goes_the_whole_way() {
    let world = with_inception();
    let mut files = golden("pipeline");
    as_bin(&world.place, &mut files);
    files.extend(autoencoder(&world.place, "vae/", 2, 4));
    world.serve("tiny/pipeline", &files);
    images(&world.place, 8);
    let model = "hub://tiny/pipeline";
    whole_way(&world, model, model, 8, "1", "--steps 2");
    // What diffusers wrote is written for it again.
    world.ok("export student/model pipeline --format diffusers --vae hub://tiny/pipeline/vae");
    assert_eq!(
        world.place.json("pipeline/transformer/config.json")["num_layers"],
        1
    );
    assert!(world.place.path("pipeline/vae/config.json").exists());
}

#[test]
fn an_original_sit_and_a_mar_go_the_whole_way() {
    let world = with_inception();
    world.serve("tiny/sit", &golden("plain.pt"));
    world.serve("tiny/vae", &autoencoder(&world.place, "", 2, 4));
    images(&world.place, 8);
    whole_way(
        &world,
        "hub://tiny/sit#family=sit,heads=2", // its one file
        "hub://tiny/vae",
        8,
        "1",
        "--steps 2",
    );
    let old = [
        "latents",
        "learned",
        "cut",
        "student",
        "by-teacher",
        "by-student",
        "exported",
    ];
    for folder in old {
        fs::remove_dir_all(world.place.path(folder)).unwrap();
    }
    fs::remove_file(world.place.path("scores.json")).unwrap();
    world.serve("tiny/mar", &golden("mar.pth"));
    world.serve("tiny/kl16", &autoencoder(&world.place, "", 5, 16));
    whole_way(
        &world,
        "hub://tiny/mar/mar.pth#model_ema,heads=2",
        "hub://tiny/kl16",
        32,
        "2",
        "--iterations 2 --steps 2",
    );
}

#[test]
fn a_training_checkpoint_goes_the_whole_way() {
    let world = with_inception();
    world.serve("tiny/dit", &golden("training.pt"));
    world.serve("tiny/vae", &autoencoder(&world.place, "", 2, 4));
    images(&world.place, 8);
    whole_way(
        &world,
        "hub://tiny/dit/training.pt#ema,family=dit,heads=2",
        "hub://tiny/vae",
        8,
        "1",
        "--steps 2",
    );
}

#[test]
fn what_is_listed_cached_pinned_and_refused() {
    let world = World::new();
    let place = &world.place;
    let commit = world.serve("tiny/pipeline", &golden("pipeline"));
    let listed: serde_json::Value =
        serde_json::from_str(&world.ok("pull hub://tiny/pipeline --list")).unwrap();
    let (bytes, missing) = (&listed[0]["bytes"], &listed[0]["to_download"]);
    assert!(
        bytes == missing && bytes.as_u64().unwrap() > 30_000,
        "{listed}"
    );
    assert!(
        !place
            .path("home")
            .join("hub/models--tiny--pipeline/snapshots")
            .exists()
    );

    world.ok("inspect hub://tiny/pipeline --lock hub.lock");
    let listed: serde_json::Value =
        serde_json::from_str(&world.ok("pull hub://tiny/pipeline --list")).unwrap();
    assert_eq!(listed[0]["to_download"], 0);
    assert!(place.text("hub.lock").contains(&commit));
    // The branch moves on; the lock does not.
    world.serve(
        "tiny/pipeline",
        &vec![("x.safetensors".into(), b"other".to_vec())],
    );
    world.ok("cut hub://tiny/pipeline cut --keep 0 --lock hub.lock");
    let mut offline = world.command("cut hub://tiny/pipeline again --keep 1 --lock hub.lock");
    let offline = offline.env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(
        offline.status.success(),
        "{}",
        String::from_utf8_lossy(&offline.stderr)
    );

    world.serve("tiny/gated", &golden("plain.pt"));
    world.server.restrict("tiny/gated", Access::Gated);
    for (code, line, says) in [
        (
            2,
            "cut hub://tiny/nothing out --keep 0",
            "no model repository",
        ),
        (
            2,
            "cut hub://tiny/gated/plain.pt#family=dit,heads=2 out --keep 0",
            "accept the licence",
        ),
        (
            2,
            "cut hub://tiny/pipeline/unet out --keep 0",
            "no file or folder",
        ),
        (2, "cut hub://tiny out --keep 0", "no repository"),
        (2, "cut cut hub://tiny/out --keep 0", "only what is read"),
        (
            2,
            "loss cut --images 2 --json=hub://tiny/out",
            "only what is read",
        ),
        (2, "pull cut", "does not begin with hub://"),
    ] {
        let said = world.fails(code, line);
        assert!(said.contains(says), "{line}: {said}");
        assert!(!place.path("out").exists() && !place.path("hub:").exists());
    }
    let mut token = world.command("cut hub://tiny/gated/plain.pt#family=dit,heads=2 out --keep 0");
    assert!(token.env("HF_TOKEN", TOKEN).status().unwrap().success());
}
