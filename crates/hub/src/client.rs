//! Requests to the hub: redirects, tokens, time limits and patience.

use std::thread::sleep;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body, Timeout};

use crate::failure::Failure;
use crate::path::{HubPath, check_file, escape, is_commit};
use crate::progress::Progress;
use crate::settings::Settings;

/// More redirects than this are a circle.
const MOST_REDIRECTS: usize = 8;
/// Longest wait between two attempts of our own.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Longest wait that a server may ask for: the hub counts requests over five minutes.
const LONGEST_REQUESTED_WAIT: Duration = Duration::from_secs(300);
/// The largest description of a repository that is read; 100 000 files are about 20 MB.
const LARGEST_LISTING: u64 = 64 << 20;

/// What the hub says of a file before it is downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// The commit that the revision means now.
    pub(crate) commit: String,
    /// SHA-256 of a large file, git's hash of a small one; the blob's name in the cache.
    pub(crate) etag: String,
    pub(crate) size: u64,
}

/// The files of a repository at a commit.
#[derive(Debug, Clone)]
pub(crate) struct Contents {
    pub(crate) commit: String,
    /// Whether all sizes are known; 0 stands for one that is not.
    pub(crate) sized: bool,
    /// Paths and sizes, sorted by path.
    pub(crate) files: Vec<(String, u64)>,
}

/// Speaks to one hub.
pub(crate) struct Client {
    agent: Agent,
    pub(crate) settings: Settings,
}

impl Client {
    pub(crate) fn new(settings: Settings) -> Self {
        let proxy = settings
            .proxy_from_env
            .then(ureq::Proxy::try_from_env)
            .flatten();
        let config = Agent::config_builder()
            // Statuses and redirects are judged here: their headers say what is wrong, and to whom the token may go.
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(proxy)
            .user_agent(concat!("tinyfusion/", env!("CARGO_PKG_VERSION")))
            // Sizes and ranges count bytes of the file, not of a compressed form.
            .accept_encoding("identity")
            .timeout_resolve(Some(settings.connect_timeout))
            .timeout_connect(Some(settings.connect_timeout))
            .timeout_recv_response(Some(settings.read_timeout))
            .timeout_per_read(Some(settings.read_timeout))
            .build();
        Self {
            agent: config.new_agent(),
            settings,
        }
    }

    /// What the hub says of `file` at `revision`.
    pub(crate) fn metadata(
        &self,
        path: &HubPath,
        revision: &str,
        file: &str,
        progress: &dyn Progress,
    ) -> Result<Metadata, Failure> {
        let url = file_url(&self.settings, path, revision, file);
        self.patiently(progress, || {
            let mut url = url.clone();
            for _ in 0..MOST_REDIRECTS {
                let response = self.once("HEAD", &url, None)?;
                // A redirect that describes the file leads to where it is stored, which would describe it worse;
                // any other leads to the hub's new name for the repository.
                if let Some(metadata) = describe(&response)? {
                    return Ok(metadata);
                }
                match target(&url, &response)? {
                    Some(next) => url = next,
                    None => return Err(nonsense("a file without X-Repo-Commit and ETag")),
                }
            }
            Err(nonsense("a circle of redirects"))
        })
    }

    /// The files at `revision`, with their sizes.
    pub(crate) fn contents(
        &self,
        path: &HubPath,
        revision: &str,
        progress: &dyn Progress,
    ) -> Result<Contents, Failure> {
        let repo = repository(path, escape(revision));
        let url = format!(
            "{}/api/{}?blobs=true",
            self.settings.endpoint,
            repo.api_url()
        );
        self.patiently(progress, || {
            let mut response = self.follow("GET", &url, None)?;
            let text = response
                .body_mut()
                .with_config()
                .limit(LARGEST_LISTING)
                .read_to_string()
                .map_err(|e| classify(&e))?;
            listing(&text)
        })
    }

    /// The content of `file` at `commit` from byte `start` on.
    pub(crate) fn body(
        &self,
        path: &HubPath,
        commit: &str,
        file: &str,
        start: u64,
    ) -> Result<Response<Body>, Failure> {
        let url = file_url(&self.settings, path, commit, file);
        self.follow("GET", &url, (start > 0).then_some(start))
    }

    /// Repeats what may pass, with growing waits. No connection at all is not waited for: the cache may do.
    fn patiently<T>(
        &self,
        progress: &dyn Progress,
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut failed = 0;
        loop {
            if progress.stop() {
                return Err(Failure::Stopped);
            }
            match attempt() {
                Err(failure @ (Failure::Status { .. } | Failure::Broken(_)))
                    if failure.passes() && failed < self.settings.retries =>
                {
                    self.wait(failed, &failure, progress)?;
                    failed += 1;
                }
                result => return result,
            }
        }
    }

    /// The pause after the attempt number `failed` (from 0).
    pub(crate) fn wait(
        &self,
        failed: u32,
        failure: &Failure,
        progress: &dyn Progress,
    ) -> Result<(), Failure> {
        let growing = self
            .settings
            .backoff
            .saturating_mul(1 << failed.min(16))
            .min(LONGEST_WAIT);
        let mut left = match failure.retry_after() {
            Some(asked) => asked.clamp(growing, LONGEST_REQUESTED_WAIT),
            None => growing,
        };
        if left > LONGEST_WAIT {
            tracing::warn!(
                "{}: the hub asks for a pause of {} seconds",
                failure.brief(),
                left.as_secs()
            );
        } else {
            tracing::info!(wait = ?left, "{}; trying again", failure.brief());
        }
        let slice = Duration::from_millis(50);
        while !left.is_zero() {
            if progress.stop() {
                return Err(Failure::Stopped);
            }
            let now = left.min(slice);
            sleep(now);
            left -= now;
        }
        Ok(())
    }

    /// A request that goes where it is redirected to.
    fn follow(
        &self,
        method: &str,
        url: &str,
        start: Option<u64>,
    ) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..MOST_REDIRECTS {
            let response = self.once(method, &url, start)?;
            match target(&url, &response)? {
                Some(next) => url = next,
                None => return Ok(response),
            }
        }
        Err(nonsense("a circle of redirects"))
    }

    /// One request; statuses from 400 on are failures.
    fn once(&self, method: &str, url: &str, start: Option<u64>) -> Result<Response<Body>, Failure> {
        let mut request = match method {
            "HEAD" => self.agent.head(url),
            _ => self.agent.get(url),
        };
        if let Some(start) = start {
            request = request.header("Range", format!("bytes={start}-"));
        }
        if let Some(token) = &self.settings.token
            && same_origin(url, &self.settings.endpoint)
        {
            request = request.header("Authorization", format!("Bearer {}", token.reveal()));
        }
        let response = request.call().map_err(|e| classify(&e))?;
        let code = response.status().as_u16();
        if code < 400 {
            return Ok(response);
        }
        let headers = response.headers();
        Err(Failure::Status {
            code,
            error_code: header(headers, "x-error-code"),
            message: header(headers, "x-error-message"),
            retry_after: header(headers, "retry-after")
                .and_then(|s| s.parse().ok())
                .map(Duration::from_secs),
        })
    }
}

/// hf-hub's idea of the repository: its folder in the cache and its part of an address.
pub(crate) fn repository(path: &HubPath, revision: String) -> hf_hub::Repo {
    hf_hub::Repo::with_revision(path.repo().to_owned(), hf_hub::RepoType::Model, revision)
}

/// The address of a file, which a browser understands too.
pub(crate) fn file_url(settings: &Settings, path: &HubPath, revision: &str, file: &str) -> String {
    let repo = repository(path, escape(revision));
    let file: Vec<String> = file.split('/').map(escape).collect();
    let (endpoint, file) = (&settings.endpoint, file.join("/"));
    format!(
        "{endpoint}/{}/resolve/{}/{file}",
        repo.url(),
        repo.url_revision()
    )
}

/// Reads the headers that describe a file, if it is described.
fn describe(response: &Response<Body>) -> Result<Option<Metadata>, Failure> {
    let headers = response.headers();
    let etag = header(headers, "x-linked-etag").or_else(|| header(headers, "etag"));
    let (Some(commit), Some(etag)) = (header(headers, "x-repo-commit"), etag) else {
        return Ok(None);
    };
    let own_length = || match response.status().is_success() {
        true => header(headers, "content-length"),
        false => None,
    };
    let size = header(headers, "x-linked-size")
        .or_else(own_length)
        .and_then(|s| s.parse().ok())
        .ok_or_else(|| nonsense("a file without its size"))?;
    // Both become names of files in the cache, so that they must not be paths.
    let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if etag.is_empty() || etag.len() > 128 || !etag.chars().all(plain) {
        return Err(nonsense(&format!("the ETag {etag:?}, which is no hash")));
    }
    if !is_commit(&commit) {
        return Err(nonsense(&format!("{commit:?} for a commit")));
    }
    Ok(Some(Metadata { commit, etag, size }))
}

fn listing(text: &str) -> Result<Contents, Failure> {
    #[derive(Deserialize)]
    struct Info {
        sha: String,
        #[serde(default)]
        siblings: Vec<Sibling>,
    }
    #[derive(Deserialize)]
    struct Sibling {
        rfilename: String,
        #[serde(default)]
        size: Option<u64>,
    }
    let info: Info = serde_json::from_str(text).map_err(|e| {
        nonsense(&format!(
            "a description of the repository that is none: {e}"
        ))
    })?;
    if !is_commit(&info.sha) {
        return Err(nonsense(&format!("{:?} for a commit", info.sha)));
    }
    let sized = info.siblings.iter().all(|s| s.size.is_some());
    let mut files: Vec<(String, u64)> = info
        .siblings
        .into_iter()
        .filter(|s| check_file(&s.rfilename).is_ok())
        .map(|s| (s.rfilename, s.size.unwrap_or(0)))
        .collect();
    files.sort();
    Ok(Contents {
        commit: info.sha,
        sized,
        files,
    })
}

/// Where a redirect leads.
fn target(url: &str, response: &Response<Body>) -> Result<Option<String>, Failure> {
    if !response.status().is_redirection() {
        return Ok(None);
    }
    let location = header(response.headers(), "location")
        .ok_or_else(|| nonsense("a redirect that leads nowhere"))?;
    let from: Uri = url.parse().map_err(|_| nonsense("an odd address"))?;
    let scheme = from.scheme_str().unwrap_or("https");
    let authority = from.authority().map_or("", |a| a.as_str());
    let to = if location.contains("://") {
        location
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        return Err(nonsense(&format!("a redirect to {location:?}")));
    };
    if scheme == "https" && !to.starts_with("https://") {
        return Err(nonsense("a redirect away from https"));
    }
    Ok(Some(to))
}

fn same_origin(a: &str, b: &str) -> bool {
    let origin = |url: &str| {
        let uri: Uri = url.parse().ok()?;
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let port = uri
            .port_u16()
            .unwrap_or(if scheme == "https" { 443 } else { 80 });
        Some((scheme, uri.host()?.to_ascii_lowercase(), port))
    };
    origin(a).is_some_and(|a| Some(a) == origin(b))
}

pub(crate) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.trim().to_owned())
}

pub(crate) fn nonsense(what: &str) -> Failure {
    Failure::Nonsense(format!("the server sent {what}"))
}

/// Sorts ureq's errors: was there a connection at all?
pub(crate) fn classify(error: &ureq::Error) -> Failure {
    use std::io::ErrorKind as Kind;
    let cause = error.to_string();
    match error {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::ConnectProxyFailed(_)
        | ureq::Error::InvalidProxyUrl
        | ureq::Error::Tls(_)
        | ureq::Error::Rustls(_)
        | ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => Failure::Unreachable(cause),
        ureq::Error::Io(io) => match io.kind() {
            Kind::ConnectionRefused
            | Kind::NetworkUnreachable
            | Kind::HostUnreachable
            | Kind::NetworkDown
            | Kind::AddrNotAvailable => Failure::Unreachable(cause),
            // The resolver's errors have no kind of their own, only these words of the standard library.
            _ if cause.contains("failed to lookup address") => Failure::Unreachable(cause),
            _ => Failure::Broken(cause),
        },
        ureq::Error::Timeout(_) => Failure::Broken("the server fell silent".into()),
        _ => Failure::Nonsense(format!("the request failed: {cause}")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Failure, classify, same_origin};

    #[test]
    #[cfg(unix)] // elsewhere the words are others
    fn a_host_without_an_address_cannot_be_reached() {
        use std::net::ToSocketAddrs;
        let error = ("no-such-host.invalid", 443).to_socket_addrs().err();
        let error = error.expect("the top-level domain `invalid` has no hosts");
        let found = classify(&ureq::Error::Io(error));
        assert!(
            matches!(found, Failure::Unreachable(_)),
            "{}",
            found.brief()
        );
    }

    #[test]
    fn the_token_stays_with_its_origin() {
        let hub = "https://hub.example";
        assert!(same_origin("https://hub.example/o/r", hub));
        assert!(same_origin("https://HUB.example:443/o/r", hub));
        for other in [
            "http://hub.example/o/r",
            "https://cdn.hub.example/o/r",
            "https://hub.example:8443/o/r",
            "https://hub.example.evil/o/r",
            "https://hub.example@evil/o/r",
        ] {
            assert!(!same_origin(other, hub), "{other}");
        }
    }
}
