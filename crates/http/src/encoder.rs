//! The seam to a model that reads texts and answers with numbers, and how the service holds one.
//!
//! Such a model is served alone: there is no generation beside it, no rollout and no hand-off. Whoever gives it computes
//! on threads of its own; a request whose client leaves drops its receiver, which the other side sees.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_engine::Share;
use baton_text::{EncoderInput, TextModel};
use tokio::sync::oneshot;

use crate::access::AccessRecord;
use crate::error::{ApiError, Refusal};
use crate::generation::ModelCard;
use crate::limits::Ask;
use crate::service::Service;

/// When there may be room again: batches of encoders are short.
const A_MOMENT: Duration = Duration::from_secs(1);

/// What an encoder computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncoderTask {
    /// An embedding of each text.
    Embed,
    /// The score of each pair of texts.
    Score,
}

/// What an encoder takes and gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderSpec {
    /// What it computes.
    pub task: EncoderTask,
    /// Components of an embedding.
    pub width: usize,
    /// Whether embeddings have the length 1.
    pub normalized: bool,
    /// Token ids are below it.
    pub vocab_size: usize,
    /// Tokens of the longest text or pair.
    pub max_model_len: usize,
}

/// Counts of an encoder, so far and at this moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncoderStats {
    /// Requests without a result yet.
    pub requests: usize,
    /// Tokens of inputs that wait.
    pub waiting_tokens: usize,
    /// Inputs that were computed.
    pub inputs: u64,
    /// Tokens of these.
    pub tokens: u64,
    /// Batches that they were computed in.
    pub batches: u64,
    /// Requests that failed in the computation.
    pub failed: u64,
    /// Whether requests are taken up.
    pub alive: bool,
}

/// Why an encoder does not take a request up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncoderRefusal {
    /// As much waits as may.
    QueueFull,
    /// It computes no more.
    Stopped,
    /// An input without tokens.
    Empty {
        /// Which one.
        index: usize,
    },
    /// An input longer than the context.
    TooLong {
        /// Which one.
        index: usize,
        /// Its length.
        tokens: usize,
    },
    /// A token id outside the vocabulary.
    TokenOutOfRange {
        /// Which input has it.
        index: usize,
    },
}

/// Why a request that was taken up has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncoderFailure {
    /// It waited for its beginning longer than it may.
    Expired,
    /// What was computed is NaN or infinite: the same request would fail again.
    NonFinite,
    /// The computation failed.
    Failed,
    /// It computes no more.
    Stopped,
}

/// Takes the result of a request: one vector per input, in their order; a score is a vector of one.
pub struct EncoderReply(oneshot::Sender<Result<Vec<Vec<f32>>, EncoderFailure>>);

impl EncoderReply {
    /// Whether the client still waits.
    pub fn wanted(&self) -> bool {
        !self.0.is_closed()
    }

    /// Hands the result over.
    pub fn send(self, result: Result<Vec<Vec<f32>>, EncoderFailure>) {
        // Nobody waits for what its client has left.
        let _ = self.0.send(result);
    }
}

/// Computes. Neither method may wait for a computation.
pub trait EncoderEngine: Send + Sync {
    /// Takes inputs up, at least one, for when it is this share's turn. `deadline`: when the first of them must have begun.
    ///
    /// # Errors
    /// Why not; nothing of it is computed then.
    fn submit(
        &self,
        inputs: Vec<EncoderInput>,
        share: Share,
        deadline: Option<Instant>,
        reply: EncoderReply,
    ) -> Result<(), EncoderRefusal>;

    /// Its counts.
    fn stats(&self) -> EncoderStats;
}

/// An encoder that is to be served.
pub struct NewEncoder {
    /// Computes.
    pub engine: Arc<dyn EncoderEngine>,
    /// Its tokenizer.
    pub text: Arc<TextModel>,
    /// How it presents itself. Its defaults mean nothing.
    pub card: ModelCard,
    /// What it takes and gives.
    pub spec: EncoderSpec,
}

/// An encoder that is served.
pub(crate) struct Encoder {
    pub engine: Arc<dyn EncoderEngine>,
    pub text: Arc<TextModel>,
    pub card: ModelCard,
    pub spec: EncoderSpec,
}

impl Encoder {
    /// # Panics
    /// If the card has no name or no digest.
    pub fn new(new: NewEncoder) -> Self {
        let NewEncoder { engine, text, card, spec } = new;
        card.assert_complete();
        Self { engine, text, card, spec }
    }

    /// The name to answer under, if it is served under the one asked for.
    pub fn named<'a>(&'a self, asked: Option<&'a str>) -> Result<&'a str, ApiError> {
        match self.card.has_name(asked) {
            true => Ok(asked.unwrap_or(&self.card.names[0])),
            false => Err(ApiError::model_not_found()),
        }
    }

    /// Whether requests would be answered.
    pub fn ready(&self) -> Result<(), ApiError> {
        if self.engine.stats().alive { Ok(()) } else { Err(ApiError::engine_down()) }
    }

    /// The refusal of a route that needs a model of another kind.
    pub fn does_not_generate(&self) -> ApiError {
        ApiError::not_for_this_model(match self.spec.task {
            EncoderTask::Embed => {
                "the model served here reads texts and generates none: POST /v1/embeddings, /v1/rerank or /score"
            }
            EncoderTask::Score => "the model served here scores pairs of texts, no more: POST /v1/rerank or /score",
        })
    }

    /// Has inputs computed, and waits. `field` is what an input is called in a refusal.
    pub async fn compute(
        &self,
        service: &Service,
        record: &AccessRecord,
        inputs: Vec<EncoderInput>,
        field: impl Fn(usize) -> String,
    ) -> Result<Vec<Vec<f32>>, ApiError> {
        record.generation(&self.card.generation, &self.card.names[0]);
        let tokens = inputs.iter().map(|input| input.ids.len()).sum();
        record.prompt_tokens(tokens);
        let mut taken = service.charge(record, Ask { choices: 1, tokens })?;
        let (sender, receiver) = oneshot::channel();
        let deadline = service.config().queue_timeout.map(|timeout| Instant::now() + timeout);
        let refused = |refusal| match refusal {
            EncoderRefusal::QueueFull => ApiError::overloaded(Refusal::QueueFull, A_MOMENT),
            EncoderRefusal::Stopped => ApiError::engine_down(),
            EncoderRefusal::Empty { index } => ApiError::out_of_range(&field(index), "at least one token long"),
            EncoderRefusal::TooLong { index, tokens } => {
                ApiError::input_too_long(&field(index), tokens, self.spec.max_model_len)
            }
            EncoderRefusal::TokenOutOfRange { index } => {
                ApiError::out_of_range(&field(index), format!("token ids below {}", self.spec.vocab_size))
            }
        };
        let given = record.elapsed();
        self.engine.submit(inputs, service.share(record), deadline, EncoderReply(sender)).map_err(refused)?;
        taken.used(tokens);
        record.submitted(given, None);
        let result = tokio::select! {
            result = receiver => result.unwrap_or(Err(EncoderFailure::Failed)),
            () = service.kill_switch().cancelled_owned() => return Err(ApiError::draining()),
        };
        result.map_err(|failure| match failure {
            EncoderFailure::Expired => ApiError::overloaded(Refusal::Deadline, A_MOMENT),
            EncoderFailure::NonFinite => ApiError::engine_always("the model computed values that are not finite"),
            EncoderFailure::Failed => ApiError::engine("the computation failed"),
            EncoderFailure::Stopped => ApiError::engine_down(),
        })
    }
}
