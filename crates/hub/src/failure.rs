//! What can go wrong between here and the hub, before it is put into words.

use std::time::Duration;

/// One failed request, or one failed transfer.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    /// The server answered, but not with what was asked for.
    Status {
        code: u16,
        error_code: Option<String>,
        message: Option<String>,
        /// What the server asks to wait.
        retry_after: Option<Duration>,
    },
    /// No connection came about.
    Unreachable(String),
    /// The connection broke, or fell silent.
    Broken(String),
    /// The answer makes no sense.
    Nonsense(String),
    /// The watcher said stop.
    Stopped,
}

impl Failure {
    /// Whether the same request may well succeed a little later.
    pub(crate) fn passes(&self) -> bool {
        match self {
            Self::Status { code, .. } => matches!(code, 408 | 429 | 500 | 502 | 503 | 504),
            Self::Broken(_) | Self::Unreachable(_) => true,
            Self::Nonsense(_) | Self::Stopped => false,
        }
    }

    /// Whether the server says that the repository has no such file.
    pub(crate) fn no_such_file(&self) -> bool {
        matches!(self, Self::Status { code: 404, error_code: Some(code), .. } if code == "EntryNotFound")
    }

    /// The same failure in the middle of a body, where there was a connection.
    pub(crate) fn broken(self) -> Self {
        match self {
            Self::Unreachable(cause) | Self::Nonsense(cause) => Self::Broken(cause),
            other => other,
        }
    }

    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// In a few words, for a note or the end of a message.
    pub(crate) fn brief(&self) -> String {
        match self {
            Self::Status { code, message, .. } => match message {
                Some(message) => format!("the server answered {code}: {message}"),
                None => format!("the server answered {code}"),
            },
            Self::Unreachable(cause) => format!("no connection: {cause}"),
            Self::Broken(cause) => format!("the connection broke: {cause}"),
            Self::Nonsense(what) => what.clone(),
            Self::Stopped => "stopped".into(),
        }
    }
}
