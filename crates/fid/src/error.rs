use std::path::{Path, PathBuf};

/// What can be wrong with features, statistics or settings. Every message says what was expected,
/// what was found and what to do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The slice does not hold rows × columns values.
    #[error(
        "expected {rows} rows x {columns} columns of values, found {found} values; pass the matrix row by row"
    )]
    Length {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        columns: usize,
        /// Values in the slice.
        found: usize,
    },
    /// A matrix without rows or without columns.
    #[error(
        "a feature matrix needs at least one row and one column, found {rows} x {columns}; check that any image was read"
    )]
    Empty {
        /// Rows given.
        rows: usize,
        /// Columns given.
        columns: usize,
    },
    /// NaN or infinity among the values.
    #[error(
        "row {row}, column {column} is {value}, expected a finite number; find the image or network that produced it, a metric over it means nothing"
    )]
    NotFinite {
        /// Row, counted from 0.
        row: usize,
        /// Column, counted from 0.
        column: usize,
        /// The value found.
        value: f64,
    },
    /// Fewer rows than the metric is defined for.
    #[error("{what} needs at least {expected} rows, found {found}; {advice}")]
    TooFewRows {
        /// What was to be computed.
        what: &'static str,
        /// The least number of rows.
        expected: usize,
        /// Rows given.
        found: usize,
        /// What to do.
        advice: &'static str,
    },
    /// Two inputs that do not belong together.
    #[error(
        "{what}: {first} and {second} must be equal; both sides must come from the same network and images"
    )]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// Size on the first side (the reference, where there is one).
        first: usize,
        /// Size on the second side.
        second: usize,
    },
    /// A mean and covariance that no set of features can have.
    #[error("invalid statistics: {0}")]
    Statistics(String),
    /// A file or folder is missing, malformed or does not fit; the message says what was expected and found.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it and what to do.
        message: String,
    },
    /// A comparison that would mean nothing; the message says what was expected, what was found and what to do.
    #[error("{0}")]
    Refused(String),
    /// Fewer images than a number is worth; the message says how many are needed, and that it can be forced.
    #[error("{0}")]
    TooFewImages(String),
    /// A metric that was asked for by name and cannot be computed of what is there.
    #[error("{0}; leave it out, or give what it needs")]
    Impossible(String),
    /// A setting that does not make sense.
    #[error("invalid setting: {0}")]
    Config(String),
    /// A decomposition did not converge or the result exceeds the range of f64.
    #[error("numerical failure: {0}")]
    Numerics(String),
}

impl Error {
    /// A problem with a file.
    pub(crate) fn file(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::File {
            path: path.as_ref().to_path_buf(),
            message: message.into(),
        }
    }
}

/// `Result` with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
