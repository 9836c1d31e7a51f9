//! Every refusal says what to do, and nothing half-written is left under a final name.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod support;

use std::cell::Cell;
use std::time::{Duration, Instant};

use support::{REPO, World, in_repo, path, tree};
use tinyfusion_core::Error;
use tinyfusion_hub::{HubPath, Progress, Settings, Token, resolve};
use tinyfusion_testing::hub_server::{Access, Fault, TOKEN};

const WEIGHTS: &str = "/transformer/model.safetensors";

/// The error of resolving `path`; it must name the place.
fn refusal(path: &HubPath, settings: &Settings) -> (Error, String) {
    let error = resolve(path, settings, &mut ()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains(&path.to_string()), "{message}");
    (error, message)
}

fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is missing in: {message}");
    }
}

#[test]
fn a_gated_repository_says_which_licence() {
    let (world, _) = World::with_model();
    world.server.restrict(REPO, Access::Gated);
    let mut settings = world.settings();
    let page = format!("accept the licence at {}/{REPO}", settings.endpoint);
    for place in [in_repo(WEIGHTS), in_repo("")] {
        let (error, message) = refusal(&place, &settings);
        assert!(matches!(error, Error::Usage(_)));
        says(
            &message,
            &["is gated", &page, "set HF_TOKEN", "/settings/tokens"],
        );
        let cache = settings.cache.display().to_string();
        says(&message, &["by hand", &cache, "HF_HUB_OFFLINE=1"]);
    }
    settings.token = Some(Token::new("hf_other").unwrap());
    let (_, message) = refusal(&in_repo(WEIGHTS), &settings);
    says(
        &message,
        &[&page, "with the account of the token that was sent"],
    );
    assert!(!message.contains("hf_other"));
    settings.token = Some(Token::new(TOKEN).unwrap());
    resolve(&in_repo(WEIGHTS), &settings, &mut ()).unwrap();
}

#[test]
fn a_private_or_unknown_repository() {
    let (world, _) = World::with_model();
    let mut settings = world.settings();
    let (error, message) = refusal(&path("hub://no/such/f"), &settings);
    assert!(matches!(error, Error::Usage(_)));
    says(
        &message,
        &[
            "no model repository no/such, or it is private",
            "no token was sent: set HF_TOKEN",
        ],
    );
    settings.token = Some(Token::new(TOKEN).unwrap());
    let (_, message) = refusal(&path("hub://no/such/f"), &settings);
    says(
        &message,
        &["no model repository no/such", "the token that was sent"],
    );
    world.server.restrict(REPO, Access::Private);
    resolve(&in_repo(WEIGHTS), &settings, &mut ()).unwrap();
}

#[test]
fn a_missing_revision_and_a_missing_file_differ() {
    let (world, _) = World::with_model();
    let (error, message) = refusal(&in_repo("@v9/README.md"), &world.settings());
    assert!(matches!(error, Error::Usage(_)));
    says(&message, &["has no revision \"v9\"", "/tree/main"]);

    let (error, message) = refusal(&in_repo("/transformer/model.bin"), &world.settings());
    assert!(matches!(error, Error::Usage(_)));
    says(
        &message,
        &[
            "no file or folder \"transformer/model.bin\" at revision main",
            "there is README.md, empty.txt, transformer/config.json, transformer/model.safetensors",
        ],
    );
    assert!(tree(&world.repo()).is_empty(), "nothing was left behind");
}

#[test]
fn other_refusals_are_passed_on() {
    let (world, _) = World::with_model();
    for (code, part) in [
        (401, "who asks"),
        (403, "may not be read"),
        (404, "is not at"),
        (451, "answered 451"),
    ] {
        world.server.fail("HEAD", Fault::Status(code), 1);
        let (_, message) = refusal(&in_repo(WEIGHTS), &world.settings());
        says(&message, &[part]);
        assert_eq!(message.contains("by hand and put it at"), code < 450);
    }
    assert_eq!(world.server.seen().len(), 4, "a refusal is not repeated");
}

#[test]
fn a_server_in_trouble_is_asked_again_but_not_for_ever() {
    let (world, _) = World::with_model();
    world.server.fail("HEAD", Fault::Status(503), 1);
    world.server.fail("HEAD", Fault::Drop, 1);
    world.server.fail("GET /cdn/", Fault::Status(500), 2);
    resolve(&in_repo(WEIGHTS), &world.settings(), &mut ()).unwrap();

    world.server.seen();
    world.server.fail("", Fault::Status(502), 99);
    let (error, message) = refusal(&in_repo("/README.md"), &world.settings());
    assert!(matches!(error, Error::Run(_)));
    says(
        &message,
        &[
            "README.md",
            "revision main",
            "answered 502, 3 times in a row",
            "by hand",
        ],
    );
    assert_eq!(world.server.seen().len(), 3);
}

#[test]
fn a_connection_that_keeps_breaking_keeps_what_came() {
    let (world, _) = World::with_model();
    world.server.fail("GET /cdn/", Fault::CutAfter(100_000), 99);
    let (error, message) = refusal(&in_repo(WEIGHTS), &world.settings());
    assert!(matches!(error, Error::Run(_)));
    says(
        &message,
        &[
            "the connection broke 3 times in a row",
            "the same command goes on where it ended",
        ],
    );
    let left = tree(&world.repo());
    assert!(
        left.len() == 1 && left[0].ends_with(".incomplete"),
        "{left:?}"
    );
    assert_eq!(
        std::fs::metadata(world.repo().join(&left[0]))
            .unwrap()
            .len(),
        300_000
    );
}

#[test]
fn a_silent_server_is_not_waited_for_for_ever() {
    let (world, _) = World::with_model();
    world
        .server
        .fail("HEAD", Fault::Stall(Duration::from_secs(3)), 9);
    let mut settings = world.settings();
    settings.read_timeout = Duration::from_millis(100);
    let (_, message) = refusal(&in_repo(WEIGHTS), &settings);
    says(&message, &["fell silent", "3 times in a row"]);
}

/// Loses patience when it has been asked so often.
struct Impatient(Cell<u32>);

impl Progress for Impatient {
    fn stop(&self) -> bool {
        self.0.set(self.0.get().saturating_sub(1));
        self.0.get() == 0
    }
}

#[test]
fn a_wait_can_be_stopped() {
    let (world, _) = World::with_model();
    world.server.fail("HEAD", Fault::Status(503), 99);
    let mut settings = world.settings();
    settings.backoff = Duration::from_secs(20);
    let started = Instant::now();
    let mut impatient = Impatient(Cell::new(4));
    let error = resolve(&in_repo(WEIGHTS), &settings, &mut impatient).unwrap_err();
    assert!(matches!(error, Error::Stopped));
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(world.server.seen().len(), 1);
}

#[test]
fn answers_that_are_no_hubs_are_told_from_failures() {
    let (world, _) = World::with_model();
    let commit = |value: &str| Fault::Header("X-Repo-Commit", value.into());
    for (fault, part) in [
        (
            Fault::Header("X-Linked-Etag", "\"../../../etc/passwd\"".into()),
            "which is no hash",
        ),
        (
            Fault::Header("X-Linked-Size", "many".into()),
            "without its size",
        ),
        (commit("../../x"), "for a commit"),
        (Fault::Status(200), "without X-Repo-Commit"),
        (Fault::Status(302), "leads nowhere"),
    ] {
        world.server.fail("HEAD", fault, 1);
        let (error, message) = refusal(&in_repo(WEIGHTS), &world.settings());
        assert!(matches!(error, Error::Run(_)));
        says(&message, &[part, "HF_ENDPOINT"]);
    }
    world
        .server
        .fail("HEAD", Fault::Header("X-Linked-Size", "10".into()), 1);
    let (_, message) = refusal(&in_repo(WEIGHTS), &world.settings());
    says(&message, &["more than the 10 bytes it promised"]);

    world.server.fail("/api/", Fault::Status(200), 1);
    let (_, message) = refusal(&in_repo(""), &world.settings());
    says(&message, &["a description of the repository that is none"]);
    assert!(
        !tree(&world.repo())
            .iter()
            .any(|f| f.starts_with("snapshots"))
    );
}

#[test]
fn a_circle_of_redirects_ends() {
    let world = World::new();
    world.server.rename("a/b", "c/d");
    world.server.rename("c/d", "a/b");
    let (_, message) = refusal(&path("hub://a/b/f"), &world.settings());
    says(&message, &["a circle of redirects"]);
}
