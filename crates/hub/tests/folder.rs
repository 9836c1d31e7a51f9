//! Folders: what is wanted of them, and what it will cost.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod support;

use std::fs;

use support::{CONFIG, REPO, Watch, World, in_repo, tree, weights};
use tinyfusion_core::Error;
use tinyfusion_hub::{Hub, Listed, Selection};
use tinyfusion_testing::hub_server::Storage;

/// A diffusers pipeline in small.
fn pipeline() -> World {
    let world = World::new();
    let weights = weights();
    world.server.commit(
        REPO,
        "main",
        &[
            ("README.md", b"# tiny", Storage::Git),
            ("model_index.json", b"{}", Storage::Git),
            ("transformer/config.json", CONFIG, Storage::Git),
            ("transformer/model.bin", b"pickle", Storage::Lfs),
            ("transformer/model.safetensors", &weights, Storage::Lfs),
            ("vae/config.json", b"{}", Storage::Git),
            ("vae/model.bin", b"vae", Storage::Lfs),
        ],
    );
    world
}

#[test]
fn a_repository_gives_what_a_model_needs() {
    let world = pipeline();
    let mut watch = Watch::default();
    let mut hub = Hub::new(world.settings());
    let root = hub.resolve(&in_repo(""), &mut watch).unwrap();
    assert_eq!(
        fs::read(root.join("transformer/model.safetensors")).unwrap(),
        weights()
    );
    assert_eq!(fs::read(root.join("vae/model.bin")).unwrap(), b"vae");
    assert!(!root.join("README.md").exists() && !root.join("transformer/model.bin").exists());
    let bytes = 700_000 + 3 + CONFIG.len() as u64 + 2 + 2;
    assert_eq!((watch.planned, watch.done), (Some((5, bytes)), 5));

    // Again: one question, nothing loaded, and offline too.
    world.downloads();
    let mut watch = Watch::default();
    assert_eq!(hub.resolve(&in_repo(""), &mut watch).unwrap(), root);
    assert!(watch.planned.is_none() && world.downloads().is_empty());
    let mut settings = world.settings();
    settings.offline = true;
    assert_eq!(
        Hub::new(settings).resolve(&in_repo(""), &mut ()).unwrap(),
        root
    );
}

#[test]
fn a_folder_is_told_from_a_file() {
    let world = pipeline();
    let mut hub = Hub::new(world.settings());
    for place in ["/transformer", "/transformer/"] {
        let root = hub.resolve(&in_repo(place), &mut ()).unwrap();
        assert!(root.ends_with("transformer") && root.join("config.json").is_file());
    }
    let seen = world.server.seen();
    assert!(
        !seen.iter().any(|s| s.path.contains("vae")),
        "only the folder was loaded"
    );
    let error = hub.resolve(&in_repo("/trans"), &mut ()).unwrap_err();
    assert!(matches!(error, Error::Usage(_)) && error.to_string().contains("no file or folder"));
}

/// The cache has one folder of the repository; that is no repository.
#[test]
fn a_part_is_not_taken_for_the_whole_without_a_network() {
    let world = pipeline();
    let part = Hub::new(world.settings()).resolve(&in_repo("/transformer"), &mut ());
    let part = part.unwrap();
    let mut settings = world.settings();
    settings.offline = true;
    let mut offline = Hub::new(settings);
    assert_eq!(
        offline.resolve(&in_repo("/transformer"), &mut ()).unwrap(),
        part
    );
    let error = offline.resolve(&in_repo(""), &mut ()).unwrap_err();
    assert!(error.to_string().contains("model_index.json"), "{error}");
}

#[test]
fn patterns_choose_files() {
    let world = pipeline();
    let mut hub = Hub::new(world.settings());
    let chosen = Selection::globs(&["*.bin", "config.json"]).unwrap();
    let folder = hub.folder(&in_repo("/vae"), &chosen, &mut ()).unwrap();
    assert_eq!(folder.files, ["config.json", "model.bin"]);
    assert!(folder.root.join("model.bin").is_file());
    let none = Selection::globs(&["*.onnx"]).unwrap();
    let message = hub
        .folder(&in_repo("/vae"), &none, &mut ())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("no file matching *.onnx is there"),
        "{message}"
    );
    assert!(
        message.contains("there is config.json, model.bin"),
        "{message}"
    );
}

#[test]
fn what_would_be_loaded_is_told_before() {
    let world = pipeline();
    let mut hub = Hub::new(world.settings());
    hub.resolve(&in_repo("/transformer/config.json"), &mut ())
        .unwrap();
    world.downloads();
    let listed = |file: &str, size, cached| Listed {
        file: file.into(),
        size,
        cached,
    };
    let list = hub
        .list(&in_repo("/transformer"), &Selection::model(), &mut ())
        .unwrap();
    let config = listed("transformer/config.json", CONFIG.len() as u64, true);
    let weights = listed("transformer/model.safetensors", 700_000, false);
    assert_eq!(list, [config, weights]);
    let file = in_repo("/vae/model.bin");
    let list = hub.list(&file, &Selection::model(), &mut ()).unwrap();
    assert_eq!(list, [listed("vae/model.bin", 3, false)]);
    assert!(world.downloads().is_empty());
}

#[test]
fn a_killed_folder_goes_on_with_the_file_it_was_at() {
    let world = pipeline();
    let mut watch = Watch {
        stop_at: Some(300_000),
        ..Watch::default()
    };
    let mut hub = Hub::new(world.settings());
    assert!(matches!(
        hub.resolve(&in_repo(""), &mut watch),
        Err(Error::Stopped)
    ));
    assert!(
        !world.repo().join("refs/main").exists(),
        "the branch is noted when its files are here"
    );
    let mut watch = Watch::default();
    let root = hub.resolve(&in_repo(""), &mut watch).unwrap();
    assert_eq!(
        fs::read(root.join("transformer/model.safetensors")).unwrap(),
        weights()
    );
    assert_eq!(watch.planned.unwrap().0, 3, "the first two stayed");
    assert!(watch.at[0] >= 300_000);
}

#[test]
fn several_checkpoints_are_asked_about_before_anything_is_downloaded() {
    let world = World::new();
    let files = [
        ("README.md", b"#".as_slice(), Storage::Git),
        ("DiT-256.pt", b"small", Storage::Lfs),
        ("DiT-512.pt", b"large", Storage::Lfs),
    ];
    world.server.commit(REPO, "main", &files);
    let mut hub = Hub::new(world.settings());
    let error = hub.resolve(&in_repo("@main"), &mut ()).unwrap_err();
    assert!(matches!(error, Error::Usage(_)), "{error}");
    let message = error.to_string();
    let example = format!("name one: hub://{REPO}@main/DiT-256.pt");
    assert!(
        message.contains("(DiT-256.pt, DiT-512.pt)") && message.contains(&example),
        "{message}"
    );
    assert!(world.downloads().is_empty() && tree(&world.cache()).is_empty());
    // What it would be can still be listed, and one be named.
    let listed = hub
        .list(&in_repo(""), &Selection::model(), &mut ())
        .unwrap();
    assert_eq!(listed.len(), 2);
    hub.resolve(&in_repo("/DiT-512.pt"), &mut ()).unwrap();
}

#[test]
fn a_hub_that_lists_no_sizes_leaves_a_cache_that_works_offline() {
    let (world, _) = World::with_model();
    world.server.hide_sizes();
    let mut settings = world.settings();
    let online = Hub::new(settings.clone())
        .resolve(&in_repo(""), &mut ())
        .unwrap();
    settings.offline = true;
    let offline = Hub::new(settings).resolve(&in_repo(""), &mut ()).unwrap();
    assert_eq!(online, offline);
}
