//! What can go wrong, at load and later.

/// Reasons listed in one message, at most.
const MAX_REASONS: usize = 20;

/// Why an encoder was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be had or read.
    #[error("{file}: {reason}")]
    File {
        /// Its name.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A config asks for what is not built, or makes no sense.
    #[error("{file} is refused: {}", reasons.join("; "))]
    Config {
        /// Its name.
        file: String,
        /// Every reason.
        reasons: Vec<String>,
    },
    /// The tensors are not those of the config.
    #[error("the weights do not fit config.json: {}", reasons.join("; "))]
    Tensors {
        /// Every tensor that is missing, unexpected, or of the wrong shape or type.
        reasons: Vec<String>,
    },
    /// A weight is NaN or infinite.
    #[error("tensor {tensor} holds a value that is not finite; weights must be finite")]
    NotFinite {
        /// The tensor.
        tensor: String,
    },
    /// The options do not suit the model.
    #[error("this model cannot run as asked: {reason}")]
    Unsupported {
        /// Why.
        reason: String,
    },
    /// The library that computes has refused.
    #[error("candle: {0}")]
    Library(#[from] candle_core::Error),
}

impl LoadError {
    /// A file is refused for one reason.
    pub(crate) fn config(file: &str, reason: impl Into<String>) -> Self {
        Self::Config { file: file.into(), reasons: vec![reason.into()] }
    }

    /// `Ok` if there are no reasons against the weights.
    pub(crate) fn tensors(mut reasons: Vec<String>) -> Result<(), Self> {
        if reasons.is_empty() {
            return Ok(());
        }
        let more = reasons.len().saturating_sub(MAX_REASONS);
        reasons.truncate(MAX_REASONS);
        if more > 0 {
            reasons.push(format!("and {more} more"));
        }
        Err(Self::Tensors { reasons })
    }
}

/// Why a request has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// It waited for its turn longer than it may.
    #[error("the request waited too long")]
    Expired,
    /// What was computed is NaN or infinite.
    #[error("the model computed values that are not finite")]
    NonFinite,
    /// The library that computes has failed.
    #[error("the computation failed")]
    Failed,
    /// The worker has ended.
    #[error("the encoder has stopped")]
    Stopped,
}

/// Why a request is not taken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As much waits as may.
    #[error("the queue is full")]
    QueueFull,
    /// The worker has ended.
    #[error("the encoder has stopped")]
    Stopped,
    /// An input without tokens.
    #[error("input {index} is empty")]
    Empty {
        /// Which one.
        index: usize,
    },
    /// An input longer than the context.
    #[error("input {index} has {tokens} tokens, the context holds {context}")]
    TooLong {
        /// Which one.
        index: usize,
        /// Its length.
        tokens: usize,
        /// The longest that is taken.
        context: usize,
    },
    /// A token or type outside the vocabulary.
    #[error("input {index} has an id that is not below {vocab}")]
    TokenOutOfRange {
        /// Which one.
        index: usize,
        /// The size of the vocabulary.
        vocab: usize,
    },
}
