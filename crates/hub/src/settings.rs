use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tinyfusion_core::{Error, Result};

/// Where the hub is, where its files are kept, and how patient to be.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Settings {
    /// The hub's address, without a slash at the end (`HF_ENDPOINT`).
    pub endpoint: String,
    /// The cache that the Python tools share: it holds `models--owner--repo` (`HF_HUB_CACHE`, `HF_HOME/hub`).
    pub cache: PathBuf,
    /// Who asks (`HF_TOKEN`). Sent to the hub and to nobody it redirects to.
    pub token: Option<Token>,
    /// Ask no network: the cache has it, or it is an error (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// How often a failed request is repeated.
    pub retries: u32,
    /// The wait before the first repetition; it doubles each time, up to half a minute.
    pub backoff: Duration,
    /// The longest wait for a connection.
    pub connect_timeout: Duration,
    /// The longest silence of a server (`HF_HUB_DOWNLOAD_TIMEOUT`).
    pub read_timeout: Duration,
    /// Whether `HTTPS_PROXY`, `NO_PROXY` and their like are respected.
    pub proxy_from_env: bool,
}

/// A token, kept out of logs and messages.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Takes a token; an empty one, or one that no header can carry, is an error.
    pub fn new(token: &str) -> Result<Self> {
        let token = token.trim();
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Error::usage(
                "the hub's token (HF_TOKEN or its file) is empty or holds characters that no token has",
            ));
        }
        Ok(Self(token.to_owned()))
    }

    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Settings {
    /// The public hub, no token, and this cache.
    pub fn new(cache: impl Into<PathBuf>) -> Result<Self> {
        let cache = cache.into();
        Ok(Self {
            endpoint: default_endpoint(&cache)?,
            cache,
            token: None,
            offline: false,
            retries: 4,
            backoff: Duration::from_millis(500),
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(30),
            proxy_from_env: false,
        })
    }

    /// As the Python tools are set up: [`Self::from_vars`] with the process's environment, and its proxies.
    pub fn from_env() -> Result<Self> {
        let mut settings = Self::from_vars(|name| std::env::var(name).ok())?;
        settings.proxy_from_env = true;
        Ok(settings)
    }

    /// Reads the variables of the Python tools through `var`:
    ///
    /// | variable | meaning |
    /// |---|---|
    /// | `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE` | the cache |
    /// | `HF_HOME`, else `XDG_CACHE_HOME`/huggingface, else ~/.cache/huggingface | holds `hub` (the cache) and `token` |
    /// | `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, else the file `HF_TOKEN_PATH` | the token |
    /// | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | if true, no token is sent |
    /// | `HF_ENDPOINT` | another hub, or a mirror |
    /// | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | if true, no network |
    /// | `HF_HUB_DOWNLOAD_TIMEOUT` | seconds of silence |
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let get = |name: &str| var(name).filter(|v| !v.trim().is_empty());
        let yes = |name: &str| {
            get(name).is_some_and(|v| {
                ["1", "on", "yes", "true"].contains(&v.trim().to_ascii_lowercase().as_str())
            })
        };
        let user = get("HOME").or_else(|| get("USERPROFILE"));
        let expand = |path: String| match (path.strip_prefix("~/"), &user) {
            (Some(rest), Some(user)) => Path::new(user).join(rest),
            _ => PathBuf::from(path),
        };
        let home = get("HF_HOME")
            .map(&expand)
            .or_else(|| get("XDG_CACHE_HOME").map(|x| expand(x).join("huggingface")))
            .or_else(|| {
                user.as_ref()
                    .map(|u| Path::new(u).join(".cache/huggingface"))
            });
        let cache = get("HF_HUB_CACHE")
            .or_else(|| get("HUGGINGFACE_HUB_CACHE"))
            .map(&expand)
            .or_else(|| home.as_ref().map(|h| h.join("hub")))
            .ok_or_else(|| {
                Error::usage("no home folder is known to keep the hub's files in; set HF_HOME")
            })?;

        let mut settings = Self::new(cache)?;
        settings.offline = yes("HF_HUB_OFFLINE") || yes("TRANSFORMERS_OFFLINE");
        if let Some(endpoint) = get("HF_ENDPOINT") {
            settings.endpoint = check_endpoint(&endpoint)?;
        }
        if let Some(seconds) = get("HF_HUB_DOWNLOAD_TIMEOUT") {
            settings.read_timeout = check_seconds(&seconds)?;
        }
        if !yes("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            let file = get("HF_TOKEN_PATH")
                .map(&expand)
                .or_else(|| home.map(|h| h.join("token")));
            settings.token = match get("HF_TOKEN").or_else(|| get("HUGGING_FACE_HUB_TOKEN")) {
                Some(token) => Some(Token::new(&token)?),
                None => token_file(file.as_deref())?,
            };
        }
        Ok(settings)
    }
}

/// hf-hub keeps the address to itself, but tells the URL of a file.
fn default_endpoint(cache: &Path) -> Result<String> {
    let probe = "o/r/resolve/main/f";
    hf_hub::api::sync::ApiBuilder::from_cache(hf_hub::Cache::new(cache.to_path_buf()))
        .build()
        .ok()
        .and_then(|api| {
            let url = api.model("o/r".into()).url("f");
            Some(url.strip_suffix(probe)?.trim_end_matches('/').to_owned())
        })
        .ok_or_else(|| Error::run("the hub's address is not known; set HF_ENDPOINT"))
}

fn check_endpoint(endpoint: &str) -> Result<String> {
    let trimmed = endpoint.trim().trim_end_matches('/');
    let uri: Option<ureq::http::Uri> = trimmed.parse().ok();
    let scheme = uri.as_ref().and_then(|u| u.scheme_str());
    let known = matches!(scheme, Some("http" | "https"));
    if !known || uri.as_ref().and_then(|u| u.host()).is_none() || trimmed.contains(['?', '#']) {
        return Err(Error::usage(format!(
            "HF_ENDPOINT is {endpoint:?}, which is no address such as https://hub.example"
        )));
    }
    Ok(trimmed.to_owned())
}

fn check_seconds(text: &str) -> Result<Duration> {
    match text.trim().parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 86_400.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(Error::usage(format!(
            "HF_HUB_DOWNLOAD_TIMEOUT is {text:?}; it is a number of seconds above 0"
        ))),
    }
}

fn token_file(path: Option<&Path>) -> Result<Option<Token>> {
    let Some(path) = path else { return Ok(None) };
    match std::fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => Token::new(&text).map(Some),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::file(
            path,
            format!("the hub's token could not be read: {e}"),
        )),
    }
}
