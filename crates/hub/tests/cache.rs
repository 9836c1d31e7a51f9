//! A cache that Python filled, and what can be done without a network.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use support::{CONFIG, REPO, World, in_repo, weights};
use tinyfusion_core::Error;
use tinyfusion_hub::{Hub, Selection, Settings, resolve};
use tinyfusion_testing::hub_server::{Fault, HubServer, Storage};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "transformer/model.safetensors";

/// Lays out what `huggingface_hub` leaves behind.
fn python_cache(cache: &Path, files: &[(&str, &str, &[u8])]) -> PathBuf {
    let repo = cache.join("models--facebook--tiny-dit");
    for folder in ["blobs", "refs", "snapshots"] {
        fs::create_dir_all(repo.join(folder)).unwrap();
    }
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
    for (name, etag, content) in files {
        fs::write(repo.join("blobs").join(etag), content).unwrap();
        let pointer = repo.join("snapshots").join(COMMIT).join(name);
        fs::create_dir_all(pointer.parent().unwrap()).unwrap();
        let up = "../".repeat(2 + name.matches('/').count());
        #[cfg(unix)]
        std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), pointer).unwrap();
        #[cfg(not(unix))]
        drop((
            up,
            fs::copy(repo.join("blobs").join(etag), pointer).unwrap(),
        ));
    }
    repo.join("snapshots").join(COMMIT)
}

fn offline(cache: &Path) -> Settings {
    let mut settings = Settings::new(cache).unwrap();
    settings.endpoint = "http://127.0.0.1:9".into(); // never asked
    settings.offline = true;
    settings
}

#[test]
fn what_python_downloaded_is_used_offline() {
    let home = tempfile::tempdir().unwrap();
    let files = [
        ("transformer/config.json", "aa", CONFIG),
        (WEIGHTS, "bb", b"weights"),
        ("vae/config.json", "cc", b"{}"),
    ];
    let snapshot = python_cache(home.path(), &files);
    for (revision, file) in [
        ("", WEIGHTS),
        ("@main", "vae/config.json"),
        (&format!("@{COMMIT}"), WEIGHTS),
    ] {
        let path = in_repo(&format!("{revision}/{file}"));
        let local = resolve(&path, &offline(home.path()), &mut ()).unwrap();
        assert_eq!(local, snapshot.join(file));
    }
    // Folders too: what is wanted of them, as far as the cache has it.
    let mut hub = Hub::new(offline(home.path()));
    let folder = hub.resolve(&in_repo("/transformer"), &mut ()).unwrap();
    assert_eq!(folder, snapshot.join("transformer"));
    let all = hub
        .folder(&in_repo(""), &Selection::model(), &mut ())
        .unwrap();
    assert_eq!(all.root, snapshot);
    assert_eq!(
        all.files,
        ["transformer/config.json", WEIGHTS, "vae/config.json"]
    );
    let error = hub
        .resolve(&in_repo("/vae"), &mut ())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no weights") && error.contains("offline"),
        "{error}"
    );
}

#[test]
fn what_python_began_is_finished() {
    let (world, _) = World::with_model();
    resolve(&in_repo(&format!("/{WEIGHTS}")), &world.settings(), &mut ()).unwrap();
    let blob = fs::read_dir(world.repo().join("blobs"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    fs::remove_dir_all(world.repo().join("snapshots")).unwrap();
    fs::remove_file(&blob).unwrap();
    let part = format!("{}.incomplete", blob.display());
    fs::write(part, &weights()[..123_456]).unwrap();
    world.downloads();
    let local = resolve(&in_repo(&format!("/{WEIGHTS}")), &world.settings(), &mut ()).unwrap();
    assert_eq!(fs::read(local).unwrap(), weights());
    assert!(
        world
            .downloads()
            .iter()
            .all(|s| s.range.as_deref() == Some("bytes=123456-"))
    );
}

#[test]
fn offline_without_the_file_says_what_to_fetch_and_where_to_put_it() {
    let home = tempfile::tempdir().unwrap();
    let path = in_repo(&format!("/{WEIGHTS}"));
    let error = resolve(&path, &offline(home.path()), &mut ()).unwrap_err();
    assert!(matches!(error, Error::Run(_)));
    let message = error.to_string();
    let url = format!("http://127.0.0.1:9/{REPO}/resolve/main/{WEIGHTS}");
    let place = home
        .path()
        .join("models--facebook--tiny-dit/snapshots/main")
        .join(WEIGHTS);
    assert!(
        message.contains(&format!(
            "download {url} by hand and put it at {}",
            place.display()
        )),
        "{message}"
    );
    assert!(message.contains("HF_HUB_OFFLINE"), "{message}");

    // Which works.
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    fs::write(&place, b"by hand").unwrap();
    assert_eq!(
        resolve(&path, &offline(home.path()), &mut ()).unwrap(),
        place
    );
}

#[test]
fn no_network_means_the_cache_or_the_same_advice() {
    let home = tempfile::tempdir().unwrap();
    let mut settings = offline(home.path());
    settings.offline = false;
    // A port that was free a moment ago.
    settings.endpoint = HubServer::start().endpoint();
    settings.backoff = std::time::Duration::from_millis(1);
    let path = in_repo(&format!("/{WEIGHTS}"));
    let message = resolve(&path, &settings, &mut ()).unwrap_err().to_string();
    assert!(
        message.contains("cannot be reached") && message.contains("by hand and put it at"),
        "{message}"
    );
    let message = resolve(&in_repo(""), &settings, &mut ())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("list of files") && message.contains("by hand"),
        "{message}"
    );

    let snapshot = python_cache(home.path(), &[(WEIGHTS, "bb", b"weights")]);
    assert_eq!(
        resolve(&path, &settings, &mut ()).unwrap(),
        snapshot.join(WEIGHTS)
    );
    assert_eq!(resolve(&in_repo(""), &settings, &mut ()).unwrap(), snapshot);
}

#[test]
fn a_hub_that_fails_leaves_the_cache() {
    let (world, _) = World::with_model();
    let path = in_repo(&format!("/{WEIGHTS}"));
    let local = resolve(&path, &world.settings(), &mut ()).unwrap();
    world.server.fail("", Fault::Status(503), 99);
    assert_eq!(resolve(&path, &world.settings(), &mut ()).unwrap(), local);
    assert!(
        resolve(
            &in_repo("/transformer/config.json"),
            &world.settings(),
            &mut ()
        )
        .is_err()
    );
}

#[test]
fn a_file_put_there_by_hand_is_compared() {
    let (world, commit) = World::with_model();
    let place = world.repo().join("snapshots").join(commit).join(WEIGHTS);
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    let path = in_repo(&format!("/{WEIGHTS}"));
    fs::write(&place, weights()).unwrap();
    assert_eq!(resolve(&path, &world.settings(), &mut ()).unwrap(), place);
    assert!(world.downloads().is_empty());

    let mut wrong = weights();
    wrong[5] ^= 4;
    fs::write(&place, wrong).unwrap();
    assert_eq!(resolve(&path, &world.settings(), &mut ()).unwrap(), place);
    assert_eq!(fs::read(place).unwrap(), weights());
    assert!(!world.downloads().is_empty());
}

#[test]
fn a_ref_that_leads_elsewhere_is_not_followed() {
    let home = tempfile::tempdir().unwrap();
    let snapshot = python_cache(home.path(), &[(WEIGHTS, "bb", b"weights")]);
    fs::write(snapshot.join("../../refs/main"), "../../..").unwrap();
    assert!(resolve(&in_repo("/secret"), &offline(home.path()), &mut ()).is_err());
}

#[cfg(unix)]
#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let (world, _) = World::with_model();
    let mut settings = world.settings();
    let file = world.home.path().join("file");
    fs::write(&file, b"").unwrap();
    settings.cache = file.join("hub");
    let error = resolve(&in_repo(&format!("/{WEIGHTS}")), &settings, &mut ()).unwrap_err();
    assert!(
        matches!(error, Error::File { .. }) && error.to_string().contains("HF_HOME"),
        "{error}"
    );
}

/// `/dev/full` takes no byte, as a full disk does.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_says_how_much_is_missing() {
    let (world, _) = World::with_model();
    let path = in_repo(&format!("/{WEIGHTS}"));
    resolve(&path, &world.settings(), &mut ()).unwrap();
    let blob = fs::read_dir(world.repo().join("blobs"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    fs::remove_file(&blob).unwrap();
    let part = format!("{}.incomplete", blob.display());
    std::os::unix::fs::symlink("/dev/full", part).unwrap();
    let error = resolve(&path, &world.settings(), &mut ()).unwrap_err();
    let message = error.to_string();
    assert!(
        matches!(error, Error::File { .. }) && message.contains(".incomplete"),
        "{message}"
    );
    assert!(
        message.contains("free at least 700000 bytes") && message.contains("HF_HOME"),
        "{message}"
    );
    assert!(!blob.exists());
}

#[test]
fn files_of_a_listing_that_lead_out_are_ignored() {
    let world = World::new();
    let files = [
        ("../../evil.json", b"x".as_slice(), Storage::Git),
        ("/abs.json", b"x", Storage::Git),
        ("a.pt", b"x", Storage::Git),
    ];
    world.server.commit(REPO, "main", &files);
    let folder = Hub::new(world.settings())
        .folder(&in_repo(""), &Selection::model(), &mut ())
        .unwrap();
    assert_eq!(folder.files, ["a.pt"]);
}
