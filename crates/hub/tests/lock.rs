//! The lock file: what was used is used again, or it is an error.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod support;

use std::fs;

use support::{CONFIG, REPO, World, in_repo, weights};
use tinyfusion_core::Error;
use tinyfusion_hub::{Hub, Lock};
use tinyfusion_testing::hub_server::Storage;

const WEIGHTS: &str = "/transformer/model.safetensors";

fn locked(world: &World, lock: Lock) -> Hub {
    Hub::new(world.settings()).with_lock(lock)
}

/// The lock after the model was resolved once.
fn first_lock(world: &World) -> Lock {
    let mut hub = locked(world, Lock::default());
    hub.resolve(&in_repo(""), &mut ()).unwrap();
    hub.lock().unwrap().clone()
}

/// Another head of `main`, whose weights have the same size.
fn move_on(world: &World) -> String {
    let other = vec![7; weights().len()];
    world.server.commit(
        REPO,
        "main",
        &[
            ("transformer/config.json", CONFIG, Storage::Git),
            ("transformer/model.safetensors", &other, Storage::Lfs),
        ],
    )
}

#[test]
fn a_lock_holds_what_was_used() {
    let (world, commit) = World::with_model();
    let lock = first_lock(&world);
    let files: Vec<_> = lock.files().collect();
    assert_eq!(files.len(), 2);
    for pinned in &files {
        assert_eq!(
            (pinned.repo.as_str(), pinned.revision.as_str()),
            (REPO, "main")
        );
        assert_eq!(pinned.commit, commit);
    }
    assert_eq!(
        (files[0].file.as_str(), files[0].size),
        ("transformer/config.json", CONFIG.len() as u64)
    );
    // What `sha256sum` says.
    assert_eq!(
        files[0].sha256,
        "8174d86e25cfab1473f3674500f5048940da0a85ed3b43aaa43d822ee22e5123"
    );

    let path = world.home.path().join("hub.lock");
    lock.write(&path).unwrap();
    assert_eq!(Lock::read(&path).unwrap(), lock);
    let text = fs::read_to_string(&path).unwrap();
    assert!(
        text.contains("version = 1\n\n[[file]]\nrepo = \"facebook/tiny-dit\"\n"),
        "{text}"
    );
    // What was in the cache already is pinned alike.
    assert_eq!(first_lock(&world), lock);
}

#[test]
fn a_locked_branch_stays_where_it_was() {
    let (world, _) = World::with_model();
    let lock = first_lock(&world);
    move_on(&world);
    fs::remove_dir_all(world.cache()).unwrap();
    for frozen in [false, true] {
        let mut hub = locked(&world, lock.clone());
        if frozen {
            hub = hub.frozen();
        }
        let local = hub.resolve(&in_repo(WEIGHTS), &mut ()).unwrap();
        assert_eq!(fs::read(local).unwrap(), weights());
        let root = hub.resolve(&in_repo("/transformer"), &mut ()).unwrap();
        assert_eq!(fs::read(root.join("config.json")).unwrap(), CONFIG);
        assert_eq!(hub.lock(), Some(&lock));
    }
    // A file that is added later is taken from the same commit.
    let mut hub = locked(&world, lock.clone());
    hub.resolve(&in_repo("/README.md"), &mut ()).unwrap();
    let commits: Vec<_> = hub.lock().unwrap().files().map(|p| &p.commit).collect();
    assert!(commits.len() == 3 && commits.windows(2).all(|p| p[0] == p[1]));
}

#[test]
fn a_frozen_lock_needs_neither_hub_nor_new_files() {
    let (world, _) = World::with_model();
    let lock = first_lock(&world);
    world.server.seen();
    let mut hub = locked(&world, lock).frozen();
    hub.resolve(&in_repo(""), &mut ()).unwrap();
    hub.resolve(&in_repo("/transformer"), &mut ()).unwrap();
    assert!(world.server.seen().is_empty());
    let error = hub.resolve(&in_repo("/README.md"), &mut ()).unwrap_err();
    assert!(matches!(error, Error::Usage(_)));
    assert!(
        error
            .to_string()
            .contains("the lock does not pin README.md"),
        "{error}"
    );
    assert!(hub.resolve(&in_repo("@dev"), &mut ()).is_err());
}

#[test]
fn content_that_is_not_what_the_lock_pins_is_refused() {
    let (world, _) = World::with_model();
    let lock = first_lock(&world);
    let local = Hub::new(world.settings())
        .resolve(&in_repo(WEIGHTS), &mut ())
        .unwrap();
    let mut spoilt = weights();
    spoilt[0] ^= 1;
    fs::write(fs::canonicalize(&local).unwrap(), spoilt).unwrap();
    let error = locked(&world, lock.clone())
        .resolve(&in_repo(WEIGHTS), &mut ())
        .unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::File { .. }));
    let pinned = lock.get(&in_repo(WEIGHTS), &WEIGHTS[1..]).unwrap();
    assert!(
        message.contains(&format!(
            "expected SHA-256 {} (700000 bytes), found ",
            pinned.sha256
        )),
        "{message}"
    );
    assert!(message.contains(&local.display().to_string()) && message.contains(&pinned.commit));
    // What is to be deleted is the content, not the link to it: then it is downloaded again.
    let blob = fs::canonicalize(&local).unwrap();
    assert!(
        message.contains(&format!("delete {} ", blob.display())),
        "{message}"
    );
    fs::remove_file(blob).unwrap();
    let mended = locked(&world, lock.clone()).resolve(&in_repo(WEIGHTS), &mut ());
    assert_eq!(fs::read(mended.unwrap()).unwrap(), weights());
}

#[test]
fn locks_that_are_none_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hub.lock");
    let hash = "0".repeat(64);
    let commit = "a".repeat(40);
    let entry = |repo: &str, file: &str, commit: &str, sha: &str| {
        format!(
            "[[file]]\nrepo = \"{repo}\"\nrevision = \"main\"\ncommit = \"{commit}\"\nfile = \"{file}\"\nsize = 1\nsha256 = \"{sha}\"\n"
        )
    };
    let good = entry("o/r", "a", &commit, &hash);
    for (text, why) in [
        ("nonsense".to_owned(), "is no lock"),
        ("version = 2\n".into(), "version 2"),
        (
            format!("version = 1\n{}", entry("o/r", "../a", &commit, &hash)),
            "empty part, '.' or '..'",
        ),
        (
            format!("version = 1\n{}", entry("..", "a", &commit, &hash)),
            "hub://",
        ),
        (
            format!("version = 1\n{}", entry("o/r", "a", "main", &hash)),
            "is no commit",
        ),
        (
            format!("version = 1\n{}", entry("o/r", "a", &commit, "00")),
            "is no SHA-256",
        ),
        (format!("version = 1\n{good}{good}"), "pins a of o/r twice"),
        (
            format!(
                "version = 1\n{good}{}",
                entry("o/r", "b", &"b".repeat(40), &hash)
            ),
            "at two commits",
        ),
        (format!("version = 1\nextra = 1\n{good}"), "is no lock"),
    ] {
        fs::write(&path, text).unwrap();
        let error = Lock::read(&path).unwrap_err();
        let message = error.to_string();
        assert!(
            matches!(error, Error::File { .. }) && message.contains("hub.lock"),
            "{message}"
        );
        assert!(message.contains(why), "{why}: {message}");
    }
    fs::write(&path, format!("version = 1\n{good}")).unwrap();
    assert_eq!(Lock::read(&path).unwrap().files().count(), 1);
    assert!(Lock::read(folder.path().join("none")).is_err());
}

/// Two commands begin with the same lock file, and each pins something of its own.
#[test]
fn what_another_command_pins_meanwhile_stays() {
    let (world, _) = World::with_model();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("locks/hub.toml");
    let pins = |file: &str| {
        let mut hub = locked(&world, Lock::default());
        hub.resolve(&in_repo(file), &mut ()).unwrap();
        hub.lock().unwrap().clone()
    };
    let (config, weights) = (pins("/transformer/config.json"), pins(WEIGHTS));
    config.add_to(&path).unwrap();
    weights.add_to(&path).unwrap();
    weights.add_to(&path).unwrap();
    assert_eq!(Lock::read(&path).unwrap().files().count(), 2);
    // The branch moved between the two.
    move_on(&world);
    let error = pins(WEIGHTS).add_to(&path).unwrap_err().to_string();
    assert!(
        error.contains("run it again") && error.contains("hub.toml"),
        "{error}"
    );
    assert_eq!(Lock::read(&path).unwrap().files().count(), 2);
}
