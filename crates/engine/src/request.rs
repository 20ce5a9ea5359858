//! What goes into the engine and what comes out of it, as plain values.
//!
//! Every accepted request yields the [`OutputEvent::PromptScores`] that it asked for, any number of
//! [`OutputEvent::Token`] and then exactly one [`OutputEvent::Finished`], nothing after it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_fairness::{Share, Tenant};
use baton_model::{Adapter, ConstraintError, Grammar, RunError, SamplingParams, SequenceFailure};

/// The engine's own number for a request; strings that clients send are never keys. Ids grow in the order of
/// acceptance, and those of background requests are above all others: of one tenant and priority, a smaller id goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

impl RequestId {
    /// The smallest id of the background.
    pub(crate) const BACKGROUND: Self = Self(1 << 63);

    /// The `n`-th of its class.
    pub(crate) fn nth(n: u64, background: bool) -> Self {
        Self(if background { Self::BACKGROUND.0 + n } else { n })
    }

    /// Whether it is of a background request.
    pub fn is_background(self) -> bool {
        self >= Self::BACKGROUND
    }
}

/// Whose cached blocks a request may share: equal scopes share, others never do. Both parts enter the hash of the first
/// block, and through it every later one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheScope {
    /// Whose the blocks are: nobody loses any to somebody who keeps more.
    pub tenant: Tenant,
    /// What else separates prefixes.
    pub salt: Vec<u8>,
}

/// One sequence to generate. Immutable once submitted.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids, at least one, each below [`baton_model::RunSpec::vocab_size`].
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub params: SamplingParams,
    /// Tokens to generate at most, at least one; the stop token counts.
    pub max_tokens: u32,
    /// Tokens that end the generation: the end tokens of the model (left out to ignore them) and the
    /// client's own.
    pub stop_token_ids: Vec<u32>,
    /// How long the request may wait for its first step; past that it ends with
    /// [`EngineFailure::QueueTimeout`]. Once started it is no longer looked at.
    pub deadline: Option<Duration>,
    /// How long the request may take from its submission to its last token; past that it ends before the next step with
    /// [`EngineFailure::DeadlineExceeded`], started or not.
    pub time_limit: Option<Duration>,
    /// Changes the model for this request, which keeps it to its end.
    pub adapter: Option<Adapter>,
    /// Whose cached blocks the request may share: those computed with the same adapter.
    pub cache_scope: CacheScope,
    /// What to tell of the prompt's own tokens.
    pub prompt_scores: Option<PromptScores>,
    /// What the output must be.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// Between tenants whoever was served less goes first.
    pub share: Share,
    /// Who goes first of the same tenant, and stays longest: the lower value, then who came first. To other tenants it
    /// means nothing.
    pub priority: i32,
    /// Nobody waits for it: it comes behind all that are not of a batch, whosever they are.
    pub batch: bool,
    /// Advances only in steps in which nothing else is to be done, gives its blocks to whoever needs them, and leaves
    /// none in the prefix cache.
    pub background: bool,
}

/// What to tell of the distribution behind each token of a prompt, under the model alone. All of the prompt is computed
/// for it: what is cached is not looked up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PromptScores {
    /// How many of the most likely ids are told at each position, at most.
    pub top: u32,
    /// Ids whose log-probabilities are told besides, by the position of the token they would follow.
    pub targets: BTreeMap<usize, Vec<u32>>,
    /// What to tell instead: hidden states, and no log-probability.
    pub hidden: Option<HiddenStates>,
}

/// Of which tokens of a prompt hidden states are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HiddenStates {
    /// Of the last.
    Last,
    /// Of all.
    All,
}

impl Request {
    /// A request without stop tokens, deadlines, adapter, scores and grammar, in the common cache scope and of the common
    /// tenant.
    pub fn new(prompt: Vec<u32>, params: SamplingParams, max_tokens: u32) -> Self {
        Self {
            prompt,
            params,
            max_tokens,
            stop_token_ids: Vec::new(),
            deadline: None,
            time_limit: None,
            adapter: None,
            cache_scope: CacheScope::default(),
            prompt_scores: None,
            grammar: None,
            share: Share::default(),
            priority: 0,
            batch: false,
            background: false,
        }
    }
}

/// Why a request was refused. Nothing of it stays in the engine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Too many accepted requests of this class have not started yet; the choices of a group count each.
    #[error("the queue is full: {queued} requests wait, at most {max_queued} may")]
    QueueFull {
        /// Requests that wait for their first step.
        queued: usize,
        /// Choices that were to be added.
        wanted: usize,
        /// The limit.
        max_queued: usize,
    },
    /// Too many tokens of prompts have not started yet; each choice has its own. A request that waits alone may have more.
    #[error("the queue is full: prompts of {queued} tokens wait, at most {max_queued_tokens} may")]
    QueuedTokens {
        /// Tokens of prompts that wait for their first step.
        queued: usize,
        /// Those that were to be added.
        wanted: usize,
        /// The limit.
        max_queued_tokens: usize,
    },
    /// There is no token to start from.
    #[error("the prompt is empty; at least one token is needed")]
    PromptEmpty,
    /// `max_tokens` is zero.
    #[error("max_tokens is 0; at least one token must be generated")]
    MaxTokensZero,
    /// Prompt and output together exceed the context.
    #[error(
        "the prompt of {prompt} tokens and max_tokens of {max_tokens} exceed the context of {max_model_len} tokens"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// As requested.
        max_tokens: u32,
        /// Tokens of prompt and output together, at most.
        max_model_len: usize,
    },
    /// A token of the prompt, or one whose scores are asked for, is not in the vocabulary.
    #[error("token id {id} is out of range; ids are below {vocab}")]
    TokenOutOfRange {
        /// The first such id.
        id: u32,
        /// The size of the vocabulary.
        vocab: usize,
    },
    /// [`PromptScores::targets`] names a position that is not in the prompt.
    #[error("scores are asked for at position {position} of a prompt of {prompt} tokens")]
    ScoreBeyondPrompt {
        /// The last such position.
        position: usize,
        /// Tokens of the prompt.
        prompt: usize,
    },
    /// Even alone the request could not finish in the cache.
    #[error("the request needs {needed_blocks} cache blocks, there are {total_blocks}")]
    DoesNotFit {
        /// Blocks for the prompt and all of the output.
        needed_blocks: usize,
        /// Blocks of the whole cache.
        total_blocks: usize,
    },
    /// The engine finishes what it has and takes nothing new.
    #[error("the engine is draining and takes no new requests")]
    Draining,
    /// The engine has stopped.
    #[error("the engine is down")]
    EngineDown,
}

/// What a request yields.
#[derive(Debug, Clone, PartialEq)]
pub enum OutputEvent {
    /// More positions of the prompt, in order; before the first token all of them, each once.
    PromptScores(Vec<PositionScore>),
    /// The next token of the output. A stop token is not sent.
    Token {
        /// Its id.
        token: u32,
        /// Its log-probability under the model alone; 0 if not asked for.
        logprob: f32,
        /// The most likely ids with their log-probabilities, best first.
        top: Vec<(u32, f32)>,
    },
    /// The last event.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
        /// How long it took.
        timings: Timings,
    },
}

/// What follows one token of a prompt, and how likely. Log-probabilities are natural.
#[derive(Debug, Clone, PartialEq)]
pub struct PositionScore {
    /// Index of the token in the prompt.
    pub position: usize,
    /// The log-probability of the prompt's next token; `None` behind the last, and where none is told.
    pub next: Option<f32>,
    /// The most likely ids with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
    /// The log-probabilities of the [`PromptScores::targets`] of this position, in their order.
    pub targets: Vec<f32>,
    /// The hidden state behind the last norm, if that is what was asked for.
    pub hidden: Vec<f32>,
}

/// Why a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was generated. It is counted in `completion_tokens` but not sent.
    Stop {
        /// Which one.
        token: u32,
    },
    /// `max_tokens` tokens are out.
    Length,
    /// The client aborted it, or dropped its stream.
    Aborted,
    /// It could not go on.
    Error(EngineFailure),
}

/// Why an accepted request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineFailure {
    /// The model computed NaN or infinity for this request. It would do so again.
    #[error("the model computed logits that are not finite")]
    NonFiniteLogits,
    /// The device failed during a step of this request, or for good.
    #[error(transparent)]
    Device(#[from] RunError),
    /// The device has not done a step within [`crate::EngineConfig::device_timeout`], which is this long.
    #[error("the device has not answered for {} s", .0.as_secs_f32())]
    Hung(Duration),
    /// The device was set up anew, and the request's adapter could not be loaded again.
    #[error("the adapter could not be loaded again after the device was set up anew")]
    AdapterLost,
    /// Our own code panicked during a step of this request.
    #[error("the engine failed internally")]
    Panicked,
    /// The engine was shut down before the request was done.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// The request waited longer than its deadline allows, and never started.
    #[error("the request waited in the queue past its deadline")]
    QueueTimeout,
    /// The request was not done within its [`Request::time_limit`].
    #[error("the request was not done within its time limit")]
    DeadlineExceeded,
    /// The request's grammar cannot be followed any further. What it gave so far obeys it.
    #[error("the grammar of the output failed: {0}")]
    GrammarFailed(String),
}

impl From<SequenceFailure> for EngineFailure {
    fn from(failure: SequenceFailure) -> Self {
        match failure {
            SequenceFailure::NonFiniteLogits => Self::NonFiniteLogits,
            SequenceFailure::Grammar(ConstraintError(why)) => Self::GrammarFailed(why),
        }
    }
}

/// Tokens of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, the stop token included.
    pub completion_tokens: usize,
    /// Tokens of the prompt found in the prefix cache when the request first started.
    pub cached_tokens: usize,
}

/// Where the time of one request went. The three parts add up to the whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// From submission to the first step, or to the end of a request that never started.
    pub queue: Duration,
    /// From the first step to the first token.
    pub prefill: Duration,
    /// From the first token to the end.
    pub decode: Duration,
}
