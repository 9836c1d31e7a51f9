//! A hub on a loopback port, for tests of everything that downloads.
//!
//! Speaks what a client of the Hugging Face Hub sees: repository information, `resolve` with its redirect to a CDN for
//! LFS files, ranges, ETags, error codes. It can be told to fail ([`Fault`]) and remembers what it was asked ([`Seen`]).

mod answer;
mod http;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sha1::{Digest, Sha1};
use sha2::Sha256;

/// No test asks more often; a client that never gives up fails instead of running for ever.
const MOST_REQUESTS: usize = 2_000;
/// No test lasts longer.
const LONGEST_LIFE: Duration = Duration::from_secs(300);

/// How the hub keeps a file, which decides its ETag and whether it is redirected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// In the repository itself; the ETag is git's hash of the blob.
    Git,
    /// In large-file storage on the CDN; the ETag is the SHA-256 of the content.
    Lfs,
}

/// Something that goes wrong, for requests whose path contains a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Answers with this status and no error code.
    Status(u16),
    /// Announces the whole body, sends so many bytes of it and closes the connection.
    CutAfter(usize),
    /// Answers a request for a range with the whole file.
    IgnoreRange,
    /// Flips one bit of the body.
    Corrupt,
    /// Closes the connection without an answer.
    Drop,
    /// Waits so long before it answers.
    Stall(Duration),
    /// Sends this header instead of, or beside, its own.
    Header(&'static str, String),
}

/// Who may read a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody.
    Open,
    /// Who accepted the licence: whoever has [`TOKEN`].
    Gated,
    /// Its owner, whoever has [`TOKEN`]; to others it does not exist.
    Private,
}

/// The token that opens gated and private repositories.
pub const TOKEN: &str = "hf_test_token";

/// One request as the server saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    /// `GET`, `HEAD`.
    pub method: String,
    /// The path with its query.
    pub path: String,
    /// The `Range` header.
    pub range: Option<String>,
    /// The `Authorization` header.
    pub authorization: Option<String>,
    /// Whether the CDN was asked, which is another origin than the hub.
    pub cdn: bool,
}

#[derive(Debug, Clone)]
struct Entry {
    content: Arc<Vec<u8>>,
    storage: Storage,
}

impl Entry {
    fn sha256(&self) -> String {
        hex(&Sha256::digest(self.content.as_slice()))
    }

    fn git_oid(&self) -> String {
        let mut hash = Sha1::new();
        hash.update(format!("blob {}\0", self.content.len()));
        hash.update(self.content.as_slice());
        hex(&hash.finalize())
    }

    fn etag(&self) -> String {
        match self.storage {
            Storage::Git => self.git_oid(),
            Storage::Lfs => self.sha256(),
        }
    }
}

struct Repo {
    access: Access,
    branches: BTreeMap<String, String>,
    commits: BTreeMap<String, BTreeMap<String, Entry>>,
}

#[derive(Default)]
struct State {
    repos: BTreeMap<String, Repo>,
    moved: BTreeMap<String, String>,
    faults: Vec<(String, Fault, usize)>,
    seen: Vec<Seen>,
    /// Whether listings lack the files' sizes.
    sizeless: bool,
}

struct Shared {
    state: Mutex<State>,
    hub: SocketAddr,
    cdn: SocketAddr,
    asked: AtomicUsize,
    closing: AtomicBool,
    until: Instant,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A hub with its CDN, each on a port of its own; both stop when this is dropped.
pub struct HubServer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl HubServer {
    /// Starts an empty hub.
    ///
    /// # Panics
    /// When no loopback port can be had.
    pub fn start() -> Self {
        let bind = || TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let (hub, cdn) = (bind(), bind());
        let address = |l: &TcpListener| l.local_addr().expect("the listener's address");
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            hub: address(&hub),
            cdn: address(&cdn),
            asked: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            until: Instant::now() + LONGEST_LIFE,
        });
        let threads = [(hub, false), (cdn, true)]
            .into_iter()
            .map(|(listener, cdn)| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || accept(&listener, &shared, cdn))
            })
            .collect();
        Self { shared, threads }
    }

    /// What `HF_ENDPOINT` is to be set to.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.shared.hub)
    }

    /// Puts a commit with exactly these files at the head of `branch`; returns its hash.
    pub fn commit(&self, repo: &str, branch: &str, files: &[(&str, &[u8], Storage)]) -> String {
        let files: BTreeMap<String, Entry> = files
            .iter()
            .map(|(name, content, storage)| {
                let content = Arc::new(content.to_vec());
                let storage = *storage;
                ((*name).to_owned(), Entry { content, storage })
            })
            .collect();
        let mut state = self.shared.state();
        let repo_entry = state.repos.entry(repo.to_owned()).or_insert_with(|| Repo {
            access: Access::Open,
            branches: BTreeMap::new(),
            commits: BTreeMap::new(),
        });
        let number = repo_entry.commits.len();
        let hash = hex(&Sha1::digest(format!("{repo} {branch} {number}")));
        repo_entry.commits.insert(hash.clone(), files);
        repo_entry.branches.insert(branch.to_owned(), hash.clone());
        hash
    }

    /// Says who may read `repo`, which must have a commit.
    ///
    /// # Panics
    /// When the repository does not exist.
    pub fn restrict(&self, repo: &str, access: Access) {
        let mut state = self.shared.state();
        let repo = state.repos.get_mut(repo).expect("a repository of this hub");
        repo.access = access;
    }

    /// Redirects requests for `old` to `new`, as the hub does for a renamed repository.
    pub fn rename(&self, old: &str, new: &str) {
        let mut state = self.shared.state();
        state.moved.insert(old.to_owned(), new.to_owned());
    }

    /// Makes the next `times` requests whose method and path (`HEAD /o/r/resolve/main/f`) contain `part` fail.
    pub fn fail(&self, part: &str, fault: Fault, times: usize) {
        let mut state = self.shared.state();
        state.faults.push((part.to_owned(), fault, times));
    }

    /// Lists files without their sizes from now on, as some mirrors do.
    pub fn hide_sizes(&self) {
        self.shared.state().sizeless = true;
    }

    /// Everything asked since the start or the last call.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.shared.state().seen)
    }
}

impl Drop for HubServer {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        for address in [self.shared.hub, self.shared.cdn] {
            // Wakes the thread that waits for a connection.
            drop(TcpStream::connect(address));
        }
        for thread in self.threads.drain(..) {
            // A panic in there has failed requests, and with them the test.
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>, cdn: bool) {
    while !shared.closing.load(Ordering::SeqCst) && Instant::now() < shared.until {
        match listener.accept() {
            Ok((stream, _)) => {
                if shared.asked.fetch_add(1, Ordering::SeqCst) >= MOST_REQUESTS {
                    return;
                }
                let shared = Arc::clone(shared);
                // Not joined: a connection ends by itself, after one answer or its time limit.
                std::thread::spawn(move || http::serve(stream, &shared, cdn));
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
