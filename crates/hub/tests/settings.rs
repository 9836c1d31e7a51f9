//! Settings as the Python tools read them, from a map instead of the environment.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use std::path::Path;
use std::time::Duration;

use tinyfusion_core::{Error, Result};
use tinyfusion_hub::{Settings, Token};

fn from(vars: &[(&str, &str)]) -> Result<Settings> {
    Settings::from_vars(|name| {
        let found = vars.iter().find(|(n, _)| *n == name);
        found.map(|(_, value)| (*value).to_owned())
    })
}

#[test]
fn the_cache_is_where_python_has_it() {
    for (vars, cache) in [
        (vec![("HOME", "/u")], "/u/.cache/huggingface/hub"),
        (
            vec![("HOME", "/u"), ("XDG_CACHE_HOME", "/x")],
            "/x/huggingface/hub",
        ),
        (vec![("HOME", "/u"), ("HF_HOME", "/h")], "/h/hub"),
        (vec![("HOME", "/u"), ("HF_HOME", "~/h")], "/u/h/hub"),
        (
            vec![("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")],
            "/old",
        ),
        (
            vec![
                ("HF_HOME", "/h"),
                ("HF_HUB_CACHE", "/c"),
                ("HUGGINGFACE_HUB_CACHE", "/old"),
            ],
            "/c",
        ),
        (
            vec![("HOME", "/u"), ("HF_HOME", "")],
            "/u/.cache/huggingface/hub",
        ),
    ] {
        assert_eq!(from(&vars).unwrap().cache, Path::new(cache), "{vars:?}");
    }
    let message = from(&[]).unwrap_err().to_string();
    assert!(message.contains("set HF_HOME"), "{message}");
}

#[test]
fn the_public_hub_unless_told_otherwise() {
    let settings = from(&[("HF_HOME", "/h")]).unwrap();
    assert!(
        settings.endpoint.starts_with("https://"),
        "{}",
        settings.endpoint
    );
    assert!(!settings.endpoint.ends_with('/'));
    assert!(!settings.offline && settings.token.is_none());
    let mirror = from(&[
        ("HF_HOME", "/h"),
        ("HF_ENDPOINT", "http://127.0.0.1:8080/hub/"),
    ]);
    assert_eq!(mirror.unwrap().endpoint, "http://127.0.0.1:8080/hub");
    for bad in ["mirror", "ftp://x", "https://", "https://x?y"] {
        let error = from(&[("HF_HOME", "/h"), ("HF_ENDPOINT", bad)]).unwrap_err();
        assert!(matches!(error, Error::Usage(_)) && error.to_string().contains("HF_ENDPOINT"));
    }
}

#[test]
fn a_token_comes_from_a_variable_or_a_file_and_stays_secret() {
    let home = tempfile::tempdir().unwrap();
    let h = home.path().to_str().unwrap();
    assert_eq!(from(&[("HF_HOME", h)]).unwrap().token, None);
    std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
    let other = home.path().join("other");
    std::fs::write(&other, "hf_other").unwrap();
    let token = |vars: &[(&str, &str)]| from(vars).unwrap().token;
    let is = |text: &str| Some(Token::new(text).unwrap());
    assert_eq!(token(&[("HF_HOME", h)]), is("hf_file"));
    assert_eq!(
        token(&[("HF_HOME", h), ("HF_TOKEN", "hf_var")]),
        is("hf_var")
    );
    let path = ("HF_TOKEN_PATH", other.to_str().unwrap());
    assert_eq!(token(&[("HF_HOME", h), path]), is("hf_other"));
    let no = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
    assert_eq!(token(&[("HF_HOME", h), ("HF_TOKEN", "hf_var"), no]), None);

    let settings = from(&[("HF_HOME", h), ("HF_TOKEN", "hf_var")]).unwrap();
    assert!(!format!("{settings:?}").contains("hf_var"));
    let error = from(&[("HF_HOME", h), ("HF_TOKEN", "a\r\nX-Evil: b")]).unwrap_err();
    assert!(!error.to_string().contains("Evil"), "{error}");
}

#[test]
fn offline_and_patience() {
    for (value, offline) in [
        ("1", true),
        ("ON", true),
        ("true", true),
        ("0", false),
        ("", false),
    ] {
        let settings = from(&[("HF_HOME", "/h"), ("HF_HUB_OFFLINE", value)]).unwrap();
        assert_eq!(settings.offline, offline, "{value:?}");
    }
    let with = |text| from(&[("HF_HOME", "/h"), ("HF_HUB_DOWNLOAD_TIMEOUT", text)]);
    assert_eq!(
        with("2.5").unwrap().read_timeout,
        Duration::from_millis(2500)
    );
    for bad in ["soon", "0", "-1", "inf", "NaN"] {
        assert!(with(bad).is_err(), "{bad}");
    }
}
