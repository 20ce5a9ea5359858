//! What the replies of chat and completions have in common, and the seam between choices and their wire form.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};

use crate::error::ApiError;
use crate::generate::{Output, Tokens, Told};
use crate::generation::Target;
use crate::openai::tokens::PromptParts;
use crate::sse::Events;

/// How an endpoint writes choices as events. Both forms are made of the same pieces, so that joined chunks equal the
/// whole.
pub(crate) trait Format: Send + Unpin + 'static {
    /// Writes the events that a piece makes, perhaps none. `usage`: the tokens up to here.
    fn events(&mut self, out: &mut Events, piece: &Piece, usage: &Usage);
}

/// How an endpoint writes choices as one object.
pub(crate) trait Whole {
    /// The whole reply.
    fn whole(&mut self, outputs: &[Output], usage: &Usage) -> Vec<u8>;
}

/// A piece of a streamed reply, in the order in which they come: all `Open`, then `Text` and one `Finish` per choice,
/// then `End`; or `Error` instead of what is missing.
pub(crate) enum Piece<'a> {
    /// A choice exists, for this prompt, of which nothing but its tokens needs to be known yet.
    Open { index: usize, prompt: &'a Told },
    /// Text of a choice, and the tokens that belong to it.
    Text { index: usize, segment: &'a baton_text::Segment, tokens: &'a Tokens },
    /// A choice is complete; which stop string ended it, and tokens that showed no text.
    Finish { index: usize, reason: Finish, matched: Option<usize>, tokens: &'a Tokens },
    /// All choices are complete.
    End(&'a Usage),
    /// The reply ends here, incomplete.
    Error(&'a ApiError),
}

/// Why a choice is complete.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Finish {
    /// The model ended it, or a stop string or token did.
    Stop,
    /// It has as many tokens as it may.
    #[default]
    Length,
    /// It ended well and calls tools.
    ToolCalls,
}

/// The time, as replies say it.
pub(crate) fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// What all chunks of a reply repeat.
#[derive(Debug, Clone)]
pub(crate) struct Envelope {
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
    /// Streams: end with usage, and say `usage: null` until then.
    pub include_usage: bool,
    /// Streams with `include_usage`: instead of null, the tokens so far.
    pub continuous_usage: bool,
}

impl Envelope {
    /// A new reply of a model. `kind` begins its id.
    pub fn new(kind: &str, target: &Target, include_usage: bool) -> Self {
        Self {
            id: format!("{kind}-{:032x}", rand::random::<u128>()),
            created: seconds_since_1970(),
            model: target.name.clone(),
            system_fingerprint: target.system_fingerprint.clone(),
            include_usage,
            continuous_usage: false,
        }
    }

    /// Tells in every chunk, where usage is told at all, the tokens so far.
    pub fn continuous_usage(self, continuous_usage: bool) -> Self {
        Self { continuous_usage, ..self }
    }

    /// Ends a stream that went well. `C` is the type of its choices.
    pub fn end<C: Serialize>(&self, out: &mut Events, object: &'static str, usage: &Usage) {
        if self.include_usage {
            out.data(&Reply::<C>::new(self, object, &[], Some(Some(usage))));
        }
        out.text(b"[DONE]");
    }

    /// The id of a choice's call, the same however the reply is sent.
    pub fn call_id(&self, choice: usize, call: usize) -> String {
        let unique = self.id.rsplit('-').next().unwrap_or_default();
        format!("call_{unique}{choice:02x}{call:02x}")
    }

    /// The `usage` of a chunk before the last: absent, null or there.
    pub fn usage<'a>(&self, so_far: &'a Usage) -> Option<Option<&'a Usage>> {
        self.include_usage.then_some(self.continuous_usage.then_some(so_far))
    }
}

/// The outer object of every reply and chunk.
#[derive(Serialize)]
pub(crate) struct Reply<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<&'a Usage>>,
    #[serde(flatten)]
    prompt: PromptParts<'a>,
}

impl<'a, C: Serialize> Reply<'a, C> {
    /// A reply or chunk.
    pub fn new(
        envelope: &'a Envelope,
        object: &'static str,
        choices: &'a [C],
        usage: Option<Option<&'a Usage>>,
    ) -> Self {
        let Envelope { id, created, model, system_fingerprint, .. } = envelope;
        let prompt = PromptParts::default();
        Self { id, object, created: *created, model, system_fingerprint, choices, usage, prompt }
    }

    /// Tells of the prompt as well.
    pub fn of_prompt(self, prompt: PromptParts<'a>) -> Self {
        Self { prompt, ..self }
    }
}

/// Tokens of a reply, all choices together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Each prompt once, however many choices it has.
    pub prompt_tokens: usize,
    /// Those that were found in the prefix cache.
    pub cached_tokens: usize,
    pub completion_tokens: usize,
    /// Those spent on reasoning.
    pub reasoning_tokens: usize,
}

impl Serialize for Usage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Prompt {
            cached_tokens: usize,
        }
        #[derive(Serialize)]
        struct Completion {
            reasoning_tokens: usize,
        }
        #[derive(Serialize)]
        struct Wire {
            prompt_tokens: usize,
            completion_tokens: usize,
            total_tokens: usize,
            prompt_tokens_details: Prompt,
            completion_tokens_details: Completion,
        }
        let wire = Wire {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details: Prompt { cached_tokens: self.cached_tokens },
            completion_tokens_details: Completion { reasoning_tokens: self.reasoning_tokens },
        };
        wire.serialize(serializer)
    }
}

/// A log-probability as it is sent: JSON has no infinity.
pub(crate) fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}
