//! The seam to whoever can run the model: sequences in, what the device computed out.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

/// How tasks are run. On a device whose rows do not depend on each other, no way changes a bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// One after another.
    Alone,
    /// All at once, as far as they fit in a batch.
    Batched,
    /// Each in pieces of a few tokens.
    Chunked,
    /// Each a second time, its beginning taken from the prefix cache.
    Cached,
    /// Several in a cache too small for them, so that they lose their place and are computed again.
    Preempted,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Alone => "alone",
            Self::Batched => "batched",
            Self::Chunked => "chunked",
            Self::Cached => "cached",
            Self::Preempted => "preempted",
        })
    }
}

/// A sequence to run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Task {
    /// Token ids, at least one.
    pub ids: Vec<u32>,
    /// Score every position of `ids`; without it, `scores` stays empty.
    pub score: bool,
    /// Log-probabilities wanted besides, by position: that of the last id seen.
    pub targets: BTreeMap<u32, Vec<u32>>,
    /// Tokens to generate greedily behind `ids`; an end token ends them as it ends the model's replies.
    pub generate: u32,
}

/// What the device computed at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// The most likely next id.
    pub best: u32,
    /// Its log-probability.
    pub best_logprob: f32,
    /// Log-probability of the id that follows; `None` behind the last.
    pub next: Option<f32>,
    /// Log-probabilities of the ids asked for here, in their order.
    pub targets: Vec<f32>,
}

/// What became of a task.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Replayed {
    /// One per id, if they were wanted. In [`Way::Cached`] ids that the cache saved may have none: the scores are then
    /// those of the last ids.
    pub scores: Vec<Score>,
    /// Generated ids, the end token included.
    pub tokens: Vec<u32>,
    /// Their log-probabilities.
    pub logprobs: Vec<f32>,
    /// Ids whose computation the prefix cache saved.
    pub cached_ids: usize,
}

/// Why tasks could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The model computed NaN or infinity.
    #[error("the model computed logits that are not finite")]
    NonFinite,
    /// A task does not fit the model.
    #[error("{0}")]
    Unfit(String),
    /// The device or the engine failed.
    #[error("the device failed: {0}")]
    Failed(String),
}

/// Runs tasks on the device that is judged.
pub trait Replay {
    /// Runs all tasks in one way. The results are in their order.
    ///
    /// # Errors
    /// The first task that failed; none is half done.
    fn replay(&mut self, tasks: &[Task], way: Way) -> Result<Vec<Replayed>, ReplayError>;

    /// Why the last replay did not really go its way, if that can be told: too few sequences to push each other out, say.
    fn not_exercised(&self) -> Option<&'static str> {
        None
    }
}
