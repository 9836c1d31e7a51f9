//! How a place on the hub is written.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use proptest::prelude::*;
use tinyfusion_hub::HubPath;

fn parts(text: &str) -> (String, String, Option<String>) {
    let path: HubPath = text.parse().unwrap();
    (
        path.repo().into(),
        path.revision().into(),
        path.file().map(Into::into),
    )
}

#[test]
fn the_parts_are_told_apart() {
    let file = |f: &str| Some(f.to_owned());
    for (text, repo, revision, at) in [
        ("hub://o/r", "o/r", "main", None),
        ("hub://o/r/", "o/r", "main", None),
        ("hub://o/r@v1.0", "o/r", "v1.0", None),
        ("hub://o/r/a.pt", "o/r", "main", file("a.pt")),
        (
            "hub://o/r@dev/a/b c/@x.pt",
            "o/r",
            "dev",
            file("a/b c/@x.pt"),
        ),
        ("hub://o/r/folder/", "o/r", "main", file("folder")),
        ("hub://o/r@refs%2Fpr%2F1/a", "o/r", "refs/pr/1", file("a")),
        ("hub://O.x/r_1-a@a%25b", "O.x/r_1-a", "a%b", None),
    ] {
        assert_eq!(parts(text), (repo.into(), revision.into(), at), "{text}");
    }
}

#[test]
fn what_is_no_place_says_why() {
    for (text, why) in [
        ("o/r", "does not begin with hub://"),
        ("hub://", "no repository"),
        ("hub://gpt2", "no repository"),
        ("hub:///r", "the owner \"\" is missing"),
        ("hub://o/", "the repository \"\" is missing"),
        ("hub://o/@main", "the repository \"\" is missing"),
        ("hub://o/r@", "is empty"),
        ("hub://o/r@a..b", "no name of a branch"),
        ("hub://o/r@..%2F..%2Fx", "no name of a branch"),
        ("hub://o/r@%2Fetc", "has an empty part"),
        ("hub://o/r@50%", "%25"),
        ("hub://o/r@%ff", "not UTF-8"),
        ("hub://o/r/../x", "has an empty part, '.' or '..'"),
        ("hub://o/r//x", "has an empty part"),
        ("hub://o/r/a\\b", "no file of the hub"),
        ("hub://o/r/a\nb", "no file of the hub"),
        ("hub://o--p/r", "'--'"),
        ("hub://o/..", "may not"),
        ("hub://o/r.git", "'.git'"),
        ("hub://o/-r", "begin or end"),
        ("hub://ö/r", "letters"),
        ("hub://datasets/o/r", "only models are read"),
    ] {
        let message = text.parse::<HubPath>().unwrap_err().to_string();
        assert!(message.contains(why), "{text}: {message}");
        assert!(message.contains("hub://owner/repo[@revision][/file]"));
    }
    let long = format!("hub://o/{}", "x".repeat(97));
    assert!(long.parse::<HubPath>().is_err());
}

#[test]
fn only_the_scheme_makes_a_place_on_the_hub() {
    assert!(HubPath::is_hub("hub://o/r") && HubPath::is_hub("hub://"));
    assert!(!HubPath::is_hub("hub:/o/r") && !HubPath::is_hub("./hub://x"));
}

#[test]
fn another_file_of_the_same_repository() {
    let path: HubPath = "hub://o/r@v1/a".parse().unwrap();
    assert_eq!(
        path.with_file("b/c").unwrap().to_string(),
        "hub://o/r@v1/b/c"
    );
    assert!(path.with_file("../b").is_err());
}

proptest! {
    #[test]
    fn what_is_written_reads_the_same(
        revision in proptest::option::of("[a-zA-Z0-9%@#ü/_-]{1,12}"),
        file in proptest::option::of("[a-zA-Z0-9 %@#?ü/._-]{1,20}"),
    ) {
        let mut text = "hub://own.er/re_po".to_owned();
        if let Some(revision) = revision {
            let bytes: String = revision.bytes().map(|b| format!("%{b:02X}")).collect();
            text += &format!("@{bytes}");
        }
        if let Some(file) = file {
            text += &format!("/{file}");
        }
        if let Ok(path) = text.parse::<HubPath>() {
            prop_assert_eq!(path.to_string().parse::<HubPath>().unwrap(), path);
        }
    }

    #[test]
    fn nothing_makes_it_panic(text in "\\PC*") {
        let _ = text.parse::<HubPath>();
        let _ = format!("hub://{text}").parse::<HubPath>();
        let _ = format!("hub://o/r@{text}").parse::<HubPath>();
    }
}
