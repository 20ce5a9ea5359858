//! Everything that can stop a pull, each with what would have been accepted.

use std::{fmt, io, path::PathBuf, time::Duration};

/// The cause of an error that is not ours.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a checkpoint could not be had. URLs are shown without their query, which may hold a signature.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// What was asked for is neither a hub id nor a URL.
    #[error(
        "{target:?} cannot be fetched: {reason}; accepted are ORG/NAME, ORG/NAME@REVISION and http(s)://HOST/FOLDER/"
    )]
    Target {
        /// As given.
        target: String,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// A setting that cannot be used.
    #[error("{name}: {reason}")]
    Setting {
        /// The environment variable.
        name: &'static str,
        /// What is wrong with it, and what is accepted.
        reason: String,
    },
    /// Offline, and the cache lacks something.
    #[error("{target} is not complete in the cache ({missing}) and HF_HUB_OFFLINE forbids fetching it")]
    Offline {
        /// What was asked for.
        target: String,
        /// What the cache lacks.
        missing: String,
    },
    /// 404: no such model, revision or file.
    #[error("{url} does not exist; check the id, the revision or the address")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// 401 or 403.
    #[error(
        "{url}: access denied ({status}); the model does not exist, is private, or has terms to accept first: set HF_TOKEN to a token that may read it"
    )]
    Denied {
        /// What was asked for.
        url: String,
        /// 401 or 403.
        status: u16,
    },
    /// Any other answer than success.
    #[error("{url}: the server answered {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
        /// How long the server asked to wait.
        retry_after: Option<Duration>,
    },
    /// No connection, a broken one, or an answer that is not HTTP.
    #[error("{url}: {cause}")]
    Connection {
        /// What was asked for.
        url: String,
        /// From the HTTP library.
        cause: BoxError,
    },
    /// No trust in the server, or no common TLS.
    #[error("{url}: {cause}; SSL_CERT_FILE names a PEM file of the certificates to trust")]
    Tls {
        /// What was asked for.
        url: String,
        /// From the TLS library.
        cause: BoxError,
    },
    /// The server went silent.
    #[error("{url}: nothing came for {} s", after.as_secs_f32())]
    Stalled {
        /// What was asked for.
        url: String,
        /// The limit.
        after: Duration,
    },
    /// The connection ended before the file did.
    #[error("{file}: cut off after {got} of {size} bytes")]
    CutOff {
        /// The file.
        file: String,
        /// Bytes here so far.
        got: u64,
        /// Bytes it has.
        size: u64,
    },
    /// A transient error that stayed.
    #[error("{last} (tried {tries} times)")]
    GaveUp {
        /// How many requests failed in a row.
        tries: u32,
        /// The last failure.
        last: Box<HubError>,
    },
    /// A redirect that leads nowhere, in circles, or from https to http.
    #[error("{url}: {reason}")]
    Redirect {
        /// Where the redirect was met.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An answer about the model (not a file of it) that makes no sense.
    #[error("{url}: {reason}")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// A file name that must not become a path.
    #[error("file name {name:?} is refused: {reason}")]
    Name {
        /// As the server gave it, shortened.
        name: String,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// No weights in a format that is fetched.
    #[error(
        "{target} has no weights that are fetched: {found}; accepted are model.safetensors, or model.safetensors.index.json and its shards"
    )]
    NoWeights {
        /// What was asked for.
        target: String,
        /// What there is instead.
        found: String,
    },
    /// Files that must be there and are not.
    #[error("{target} lacks {}", files.join(", "))]
    Missing {
        /// What was asked for.
        target: String,
        /// The files' names.
        files: Vec<String>,
    },
    /// A file without bytes.
    #[error("{file} is empty on the server: its upload probably failed")]
    Empty {
        /// The file.
        file: String,
    },
    /// A length other than the announced one.
    #[error("{file}: announced with {expected} bytes, but the server sends {}", actual.map_or("more".into(), |n| n.to_string()))]
    Size {
        /// The file.
        file: String,
        /// From the listing, or from the bundle's `handoff.json`.
        expected: u64,
        /// From the answer; `None` if it ran on beyond the expected size.
        actual: Option<u64>,
    },
    /// The bytes are not those that were published.
    #[error("{file} is corrupt: its digest is {actual}, published is {expected}; nothing of it was kept")]
    Digest {
        /// The file.
        file: String,
        /// From the hub, or from the bundle's `handoff.json`.
        expected: String,
        /// Of the bytes that came, or of the file that the hub lists.
        actual: String,
    },
    /// The file on the server is no longer the one that was listed.
    #[error("{file} changed on the server while it was fetched; run the pull again")]
    Changed {
        /// The file.
        file: String,
    },
    /// Not enough room.
    #[error("{} bytes are needed and {} are free in {}", needed, free, path.display())]
    Space {
        /// Bytes still to come.
        needed: u64,
        /// Bytes that the file system has.
        free: u64,
        /// The cache.
        path: PathBuf,
    },
    /// The file system refused something.
    #[error("{}: {cause}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// From the operating system.
        cause: io::Error,
    },
    /// Another file's failure ended this pull first.
    #[error("stopped")]
    Stopped,
}

impl HubError {
    /// Whether the same request may succeed later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            HubError::Connection { .. } | HubError::Stalled { .. } | HubError::CutOff { .. } => true,
            HubError::Status { status, .. } => matches!(status, 408 | 425 | 429 | 500..),
            _ => false,
        }
    }

    /// How long the server asked to wait.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            HubError::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// Puts the path beside an I/O error.
pub(crate) fn at<T>(path: impl Into<PathBuf>, result: io::Result<T>) -> Result<T, HubError> {
    result.map_err(|cause| HubError::Io { path: path.into(), cause })
}

/// A URL without its query.
pub(crate) fn shown(url: impl fmt::Display) -> String {
    let url = url.to_string();
    url.split(['?', '#']).next().unwrap_or_default().to_owned()
}
