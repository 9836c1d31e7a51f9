use std::path::{Path, PathBuf};

/// Everything that can go wrong in the libraries, sorted by who can mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value given by the user does not make sense (a program exits with 2).
    #[error("{0}")]
    Usage(String),
    /// A file is missing, malformed or does not fit; the message says what was expected and found.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it and what to do.
        message: String,
    },
    /// The run itself failed (for example too many non-finite losses).
    #[error("{0}")]
    Run(String),
    /// The run was asked to stop and has written a checkpoint.
    #[error("interrupted after step {step}; the same command resumes it")]
    Interrupted {
        /// Steps completed, all of them in the last checkpoint.
        step: u64,
    },
    /// The command was asked to stop, without a checkpoint; what is kept the program says.
    #[error("interrupted")]
    Stopped,
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// For code that candle calls back, such as a custom operation.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Tensor(error) => error,
            other => Self::wrap(other),
        }
    }
}

/// `Result` with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A mistake in what the user asked for.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    /// A failure of the run.
    pub fn run(message: impl Into<String>) -> Self {
        Self::Run(message.into())
    }

    /// A problem with a file: names it, keeps the cause.
    #[allow(clippy::needless_pass_by_value)] // callers hand over errors and strings alike, without `&`
    pub fn file(path: impl AsRef<Path>, message: impl ToString) -> Self {
        Self::File {
            path: path.as_ref().to_path_buf(),
            message: message.to_string(),
        }
    }
}
