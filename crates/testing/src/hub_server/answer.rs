//! What the hub and its CDN say.

use serde_json::json;

use super::{Access, Repo, Seen, Shared, State, Storage, TOKEN};

/// An answer before it is written.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
}

impl Answer {
    pub(super) fn bare(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    fn error(status: u16, code: &str, message: &str) -> Self {
        let mut answer = Self::bare(status);
        answer.set("X-Error-Code", code.to_owned());
        answer.set("X-Error-Message", message.to_owned());
        answer.body = json!({ "error": message }).to_string().into_bytes();
        answer
    }

    pub(super) fn set(&mut self, name: &'static str, value: String) {
        self.headers.retain(|(n, _)| *n != name);
        self.headers.push((name, value));
    }

    /// Spoils the body.
    pub(super) fn flip(&mut self) {
        if let Some(byte) = self.body.last_mut() {
            *byte ^= 1;
        }
    }

    pub(super) fn reason(&self) -> &'static str {
        match self.status {
            200..=299 => "OK",
            300..=399 => "Elsewhere",
            _ => "Error",
        }
    }
}

/// The answer to a request; `ranged` says whether ranges are respected.
pub(super) fn to(seen: &Seen, shared: &Shared, ranged: bool) -> Answer {
    let path = seen.path.split('?').next().unwrap_or_default();
    let parts: Vec<String> = path.split('/').skip(1).map(decode).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let range = seen.range.as_deref().filter(|_| ranged);
    let state = shared.state();
    match (seen.cdn, parts.as_slice()) {
        (true, ["cdn", hash]) => cdn(&state, hash, range),
        (false, ["api", "models", owner, name, "revision", revision]) => {
            match find(&state, &format!("{owner}/{name}"), revision, seen) {
                Ok((repo, commit)) => {
                    information(&format!("{owner}/{name}"), repo, &commit, !state.sizeless)
                }
                Err(answer) => *answer,
            }
        }
        (false, ["api", "models", owner, name, "tree", revision]) => {
            match find(&state, &format!("{owner}/{name}"), revision, seen) {
                Ok((repo, commit)) => tree(repo, &commit),
                Err(answer) => *answer,
            }
        }
        (false, [owner, name, "resolve", revision, file @ ..]) => {
            let repo = format!("{owner}/{name}");
            if let Some(new) = state.moved.get(&repo) {
                let mut answer = Answer::bare(307);
                answer.set("Location", path.replacen(&repo, new, 1));
                return answer;
            }
            match find(&state, &repo, revision, seen) {
                Ok((repo, commit)) => resolve(repo, commit, &file.join("/"), range, shared),
                Err(answer) => *answer,
            }
        }
        _ => Answer::bare(404),
    }
}

fn find<'s>(
    state: &'s State,
    repo: &str,
    revision: &str,
    seen: &Seen,
) -> Result<(&'s Repo, String), Box<Answer>> {
    let known = seen.authorization.as_deref() == Some(&format!("Bearer {TOKEN}"));
    let fail = |status, code, message: &str| Err(Box::new(Answer::error(status, code, message)));
    let found = state.repos.get(repo);
    let Some(found) = found.filter(|r| known || r.access != Access::Private) else {
        // To a stranger, what does not exist and what is private look the same.
        return match known {
            true => fail(404, "RepoNotFound", "Repository not found"),
            false => fail(401, "RepoNotFound", "Invalid username or password."),
        };
    };
    if found.access == Access::Gated && !known {
        let status = if seen.authorization.is_some() {
            403
        } else {
            401
        };
        return fail(
            status,
            "GatedRepo",
            "Access to this model is restricted. You must be authenticated to access it.",
        );
    }
    let commit = found.branches.get(revision).cloned();
    match commit.or_else(|| {
        let known = found.commits.contains_key(revision);
        known.then(|| revision.to_owned())
    }) {
        Some(commit) => Ok((found, commit)),
        None => fail(
            404,
            "RevisionNotFound",
            &format!("Invalid rev id: {revision}"),
        ),
    }
}

/// Every file, as Python asks for a folder in one page.
fn tree(repo: &Repo, commit: &str) -> Answer {
    let files: Vec<_> = repo.commits[commit]
        .iter()
        .map(|(name, entry)| {
            let size = entry.content.len();
            let mut file =
                json!({ "type": "file", "path": name, "size": size, "oid": entry.git_oid() });
            if entry.storage == Storage::Lfs {
                file["lfs"] = json!({ "oid": entry.sha256(), "size": size, "pointerSize": 134 });
            }
            file
        })
        .collect();
    let mut answer = Answer::bare(200);
    answer.set("Content-Type", "application/json".into());
    answer.body = json!(files).to_string().into_bytes();
    answer
}

fn information(id: &str, repo: &Repo, commit: &str, sized: bool) -> Answer {
    let siblings: Vec<_> = repo.commits[commit]
        .iter()
        .map(|(name, entry)| {
            let size = entry.content.len();
            let mut file = json!({ "rfilename": name, "size": size, "blobId": entry.git_oid() });
            if !sized {
                return json!({ "rfilename": name });
            }
            if entry.storage == Storage::Lfs {
                file["lfs"] = json!({ "sha256": entry.sha256(), "size": size, "pointerSize": 134 });
            }
            file
        })
        .collect();
    let mut answer = Answer::bare(200);
    answer.set("Content-Type", "application/json".into());
    answer.body = json!({ "id": id, "sha": commit, "siblings": siblings })
        .to_string()
        .into_bytes();
    answer
}

fn resolve(
    repo: &Repo,
    commit: String,
    file: &str,
    range: Option<&str>,
    shared: &Shared,
) -> Answer {
    let Some(entry) = repo.commits[&commit].get(file) else {
        let mut answer = Answer::error(404, "EntryNotFound", "Entry not found");
        answer.set("X-Repo-Commit", commit);
        return answer;
    };
    let mut answer = match entry.storage {
        Storage::Git => body(&entry.content, range),
        Storage::Lfs => {
            let mut answer = Answer::bare(302);
            let location = format!("http://{}/cdn/{}?signed=yes", shared.cdn, entry.sha256());
            answer.set("Location", location);
            answer.set("X-Linked-Etag", format!("\"{}\"", entry.etag()));
            answer.set("X-Linked-Size", entry.content.len().to_string());
            answer
        }
    };
    answer.set("X-Repo-Commit", commit);
    answer.set("ETag", format!("\"{}\"", entry.etag()));
    answer
}

fn cdn(state: &State, hash: &str, range: Option<&str>) -> Answer {
    let mut entries = state.repos.values().flat_map(|r| r.commits.values());
    let found = entries.find_map(|files| {
        files
            .values()
            .find(|e| e.storage == Storage::Lfs && e.sha256() == hash)
    });
    match found {
        Some(entry) => {
            let mut answer = body(&entry.content, range);
            // A CDN has an ETag of its own, which is no hash of the content.
            answer.set("ETag", "\"cdn-1\"".into());
            answer
        }
        None => Answer::bare(404),
    }
}

/// The whole content, or what `range` (`bytes=START-` or `bytes=START-END`) asks for.
fn body(content: &[u8], range: Option<&str>) -> Answer {
    let mut answer = Answer::bare(200);
    let size = content.len();
    match range {
        None => answer.body = content.to_vec(),
        Some(range) => {
            let (start, end) = range
                .strip_prefix("bytes=")
                .and_then(|r| r.split_once('-'))
                .unwrap_or_default();
            let start: usize = start.parse().unwrap_or(usize::MAX);
            let end = end.parse().map_or(size, |end: usize| (end + 1).min(size));
            if start >= end {
                answer.status = 416;
                answer.set("Content-Range", format!("bytes */{size}"));
            } else {
                answer.status = 206;
                answer.set("Content-Range", format!("bytes {start}-{}/{size}", end - 1));
                answer.body = content[start..end].to_vec();
            }
        }
    }
    answer.set("Accept-Ranges", "bytes".into());
    answer
}

/// Undoes percent-encoding.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail
            .get(..2)
            .filter(|_| first == b'%')
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| u8::from_str_radix(d, 16).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
