//! Files come whole, once, verified, into Python's layout.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod support;

use std::fs;
use std::path::Path;

use support::{CONFIG, REPO, Watch, World, in_repo, path, tree, weights};
use tinyfusion_core::Error;
use tinyfusion_hub::{Hub, resolve};
use tinyfusion_testing::hub_server::{Fault, Storage};

const WEIGHTS: &str = "/transformer/model.safetensors";

#[test]
fn a_file_lands_where_python_looks() {
    let (world, commit) = World::with_model();
    let mut watch = Watch::default();
    let local = resolve(&in_repo(WEIGHTS), &world.settings(), &mut watch).unwrap();
    assert_eq!(fs::read(&local).unwrap(), weights());
    let snapshot = format!("snapshots/{commit}/transformer/model.safetensors");
    assert_eq!(local, world.repo().join(&snapshot));

    let files = tree(&world.repo());
    assert_eq!(files.len(), 3, "{files:?}");
    assert!(files[0].starts_with("blobs/") && files[0].len() == "blobs/".len() + 64);
    assert_eq!(files[1..], ["refs/main".to_owned(), snapshot]);
    assert_eq!(
        fs::read_to_string(world.repo().join("refs/main")).unwrap(),
        commit
    );
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(&local).unwrap(),
        Path::new("../../..").join(&files[0])
    );

    let size = weights().len() as u64;
    assert_eq!(
        watch.files,
        [("transformer/model.safetensors".to_owned(), size)]
    );
    assert_eq!((watch.at.first(), watch.at.last()), (Some(&0), Some(&size)));
    assert!(watch.at.is_sorted() && watch.done == 1);
}

#[test]
fn a_cached_file_is_not_loaded_again() {
    let (world, commit) = World::with_model();
    let first = resolve(&in_repo(WEIGHTS), &world.settings(), &mut ()).unwrap();
    assert!(!world.downloads().is_empty());
    let mut watch = Watch::default();
    assert_eq!(
        resolve(&in_repo(WEIGHTS), &world.settings(), &mut watch).unwrap(),
        first
    );
    assert!(world.downloads().is_empty() && watch.files.is_empty());
    // A commit never changes: the hub is not even asked.
    let pinned = in_repo(&format!("@{commit}{WEIGHTS}"));
    assert_eq!(resolve(&pinned, &world.settings(), &mut ()).unwrap(), first);
    assert!(world.server.seen().is_empty());
}

#[test]
fn small_empty_and_oddly_named_files_come_too() {
    let world = World::new();
    let odd = "a folder/#1 100% ü?.json";
    let files = [
        ("e", b"".as_slice(), Storage::Git),
        (odd, CONFIG, Storage::Git),
        ("big", b"", Storage::Lfs),
    ];
    world.server.commit(REPO, "main", &files);
    for (name, content, _) in files {
        let local = resolve(&in_repo(&format!("/{name}")), &world.settings(), &mut ()).unwrap();
        assert_eq!(fs::read(local).unwrap(), content, "{name}");
    }
}

#[test]
fn a_branch_that_moves_is_followed_and_shares_what_is_the_same() {
    let (world, old) = World::with_model();
    let before = resolve(&in_repo(WEIGHTS), &world.settings(), &mut ()).unwrap();
    let files = [
        ("transformer/config.json", b"{}".as_slice(), Storage::Git),
        ("transformer/model.safetensors", &weights(), Storage::Lfs),
    ];
    let new = world.server.commit(REPO, "main", &files);
    world.downloads();
    let after = resolve(&in_repo(WEIGHTS), &world.settings(), &mut ()).unwrap();
    assert!(after != before && after.to_str().unwrap().contains(&new));
    assert!(world.downloads().is_empty(), "the blob is the same");
    let config = resolve(
        &in_repo("/transformer/config.json"),
        &world.settings(),
        &mut (),
    )
    .unwrap();
    assert_eq!(fs::read(config).unwrap(), b"{}");
    let old = in_repo(&format!("@{old}/transformer/config.json"));
    assert_eq!(
        fs::read(resolve(&old, &world.settings(), &mut ()).unwrap()).unwrap(),
        CONFIG
    );
}

#[test]
fn a_revision_with_slashes_and_a_renamed_repository() {
    let world = World::new();
    world
        .server
        .commit(REPO, "refs/pr/1", &[("f", b"pr", Storage::Git)]);
    let local = resolve(&in_repo("@refs%2Fpr%2F1/f"), &world.settings(), &mut ()).unwrap();
    assert_eq!(fs::read(local).unwrap(), b"pr");
    assert!(world.repo().join("refs/refs/pr/1").is_file());

    world.server.rename("old/name", REPO);
    let local = resolve(
        &path("hub://old/name@refs%2Fpr%2F1/f"),
        &world.settings(),
        &mut (),
    )
    .unwrap();
    assert_eq!(fs::read(local).unwrap(), b"pr");
}

#[test]
fn a_broken_connection_is_resumed() {
    let (world, _) = World::with_model();
    world.server.fail("GET /cdn/", Fault::CutAfter(300_000), 1);
    let mut watch = Watch::default();
    let local = resolve(&in_repo(WEIGHTS), &world.settings(), &mut watch).unwrap();
    assert_eq!(fs::read(local).unwrap(), weights());
    let ranges: Vec<_> = world
        .downloads()
        .into_iter()
        .filter(|s| s.cdn)
        .map(|s| s.range)
        .collect();
    assert_eq!(ranges, [None, Some("bytes=300000-".into())]);
    assert!(watch.at.is_sorted(), "nothing was loaded twice");
}

#[test]
fn what_came_before_a_stop_is_kept_for_the_next_run() {
    let (world, _) = World::with_model();
    let mut watch = Watch {
        stop_at: Some(200_000),
        ..Watch::default()
    };
    let error = resolve(&in_repo(WEIGHTS), &world.settings(), &mut watch).unwrap_err();
    assert!(matches!(error, Error::Stopped), "{error}");
    let left = tree(&world.repo());
    assert!(
        left.len() == 1 && left[0].ends_with(".incomplete"),
        "{left:?}"
    );
    let kept = fs::metadata(world.repo().join(&left[0])).unwrap().len();
    assert!(kept >= 200_000);

    world.downloads();
    let mut watch = Watch::default();
    let local = resolve(&in_repo(WEIGHTS), &world.settings(), &mut watch).unwrap();
    assert_eq!(fs::read(local).unwrap(), weights());
    assert_eq!(watch.at[0], kept);
    assert!(
        world
            .downloads()
            .iter()
            .all(|s| s.range == Some(format!("bytes={kept}-")))
    );
    assert!(
        !tree(&world.repo())
            .iter()
            .any(|f| f.ends_with(".incomplete"))
    );
}

#[test]
fn a_server_without_ranges_begins_anew() {
    let (world, _) = World::with_model();
    world.server.fail("GET /cdn/", Fault::CutAfter(300_000), 1);
    world.server.fail("GET /cdn/", Fault::IgnoreRange, 9);
    let mut watch = Watch::default();
    let local = resolve(&in_repo(WEIGHTS), &world.settings(), &mut watch).unwrap();
    assert_eq!(fs::read(local).unwrap(), weights());
    assert!(!watch.at.is_sorted(), "the part was thrown away");
}

#[test]
fn a_spoilt_part_is_thrown_away() {
    let (world, _) = World::with_model();
    let mut watch = Watch {
        stop_at: Some(200_000),
        ..Watch::default()
    };
    resolve(&in_repo(WEIGHTS), &world.settings(), &mut watch).unwrap_err();
    let part = world.repo().join(&tree(&world.repo())[0]);
    let mut bytes = fs::read(&part).unwrap();
    bytes[17] ^= 1;
    for spoilt in [bytes, vec![0; 900_000]] {
        fs::write(&part, spoilt).unwrap();
        let local = resolve(&in_repo(WEIGHTS), &world.settings(), &mut ()).unwrap();
        assert_eq!(fs::read(&local).unwrap(), weights());
        fs::remove_file(local).unwrap();
        fs::remove_file(part.with_extension("")).unwrap();
    }
}

#[test]
fn spoilt_bytes_on_the_way_are_found() {
    let (world, _) = World::with_model();
    // Once: mended by itself. Always: an error, and nothing under the final name.
    world.server.fail("GET /cdn/", Fault::Corrupt, 1);
    let local = resolve(&in_repo(WEIGHTS), &world.settings(), &mut ()).unwrap();
    assert_eq!(fs::read(local).unwrap(), weights());

    world.server.fail("GET", Fault::Corrupt, 99);
    let small = in_repo("/transformer/config.json");
    let message = resolve(&small, &world.settings(), &mut ())
        .unwrap_err()
        .to_string();
    let expected =
        "transformer/config.json was downloaded twice and is not what the hub names: expected ";
    assert!(
        message.contains(expected) && message.contains(", found "),
        "{message}"
    );
    let files = tree(&world.repo());
    assert_eq!(
        files.len(),
        3,
        "the weights, and nothing of the other: {files:?}"
    );
}

#[test]
fn a_truncated_blob_is_mended() {
    let (world, _) = World::with_model();
    let local = resolve(&in_repo(WEIGHTS), &world.settings(), &mut ()).unwrap();
    let blob = fs::canonicalize(&local).unwrap();
    fs::write(&blob, b"short").unwrap();
    resolve(&in_repo(WEIGHTS), &world.settings(), &mut ()).unwrap();
    assert_eq!(fs::read(&local).unwrap(), weights());
}

#[test]
fn two_at_once_load_it_once() {
    let (world, _) = World::with_model();
    let settings = world.settings();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let local = resolve(&in_repo(WEIGHTS), &settings, &mut ()).unwrap();
                assert_eq!(fs::read(local).unwrap(), weights());
            });
        }
    });
    assert_eq!(world.downloads().iter().filter(|s| s.cdn).count(), 1);
}

#[test]
fn the_token_goes_to_the_hub_only() {
    let (world, _) = World::with_model();
    let mut settings = world.settings();
    settings.token = Some(tinyfusion_hub::Token::new("hf_x").unwrap());
    Hub::new(settings)
        .resolve(&in_repo(WEIGHTS), &mut ())
        .unwrap();
    let seen = world.server.seen();
    assert!(seen.iter().any(|s| s.cdn) && seen.iter().any(|s| !s.cdn));
    for request in seen {
        let sent = request.authorization.as_deref();
        assert_eq!(
            sent,
            (!request.cdn).then_some("Bearer hf_x"),
            "{}",
            request.path
        );
    }
}
