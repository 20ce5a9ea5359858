//! Tokens in replies: how each is written, and what replies tell of a prompt and of ids.

use std::collections::HashSet;
use std::sync::Arc;

use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};

use crate::generate::{Score, Told};
use crate::generation::Generation;
use crate::openai::params::Params;
use crate::openai::shared::finite;

/// What a request wants to be told of tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TokensTold {
    /// Instead of their text, `token_id:` and the id.
    as_ids: bool,
    /// The ids of prompt and output.
    ids: bool,
    /// At each token of the prompt, so many most likely ones.
    prompt_logprobs: Option<u32>,
}

impl TokensTold {
    pub fn new(params: &Params) -> Self {
        Self {
            as_ids: params.return_tokens_as_token_ids,
            ids: params.return_token_ids,
            prompt_logprobs: params.prompt_logprobs,
        }
    }
}

/// How a reply writes tokens.
pub(crate) struct TokenStyle {
    generation: Arc<Generation>,
    told: TokensTold,
}

impl TokenStyle {
    /// Tokens of this generation, as the request wants them.
    pub fn new(generation: Arc<Generation>, told: TokensTold) -> Self {
        Self { generation, told }
    }

    /// Whether the ids of prompt and output are told.
    pub fn with_ids(&self) -> bool {
        self.told.ids
    }

    /// The bytes of a token.
    pub fn bytes(&self, id: u32) -> Vec<u8> {
        self.generation.text.token_bytes(id)
    }

    /// A token as text; bytes that are no text become U+FFFD.
    pub fn text(&self, id: u32) -> String {
        match self.told.as_ids {
            true => format!("token_id:{id}"),
            false => String::from_utf8_lossy(&self.bytes(id)).into_owned(),
        }
    }

    /// A token as text that tells it from others: bytes that are no text are written as OpenAI's completions do.
    pub fn distinct_text(&self, id: u32) -> String {
        let bytes = self.bytes(id);
        match std::str::from_utf8(&bytes) {
            Err(_) if !self.told.as_ids => {
                let escaped = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
                format!("bytes:{}", escaped.collect::<String>())
            }
            _ => self.text(id),
        }
    }

    /// A generated token and the most likely ones in its place, as chats and responses have them.
    pub fn scored(&self, score: &Score) -> TokenLogprob {
        let alternative = |token: u32, logprob: f32| {
            let (text, bytes) = (self.text(token), self.bytes(token));
            Alternative { token: text, logprob: finite(logprob), bytes }
        };
        TokenLogprob {
            // Only a prompt's first token has none, and these are of outputs.
            chosen: alternative(score.token, score.logprob.unwrap_or_default()),
            top_logprobs: score.top.iter().map(|&(token, logprob)| alternative(token, logprob)).collect(),
        }
    }

    /// Ids, if they are wanted.
    pub fn ids<'a>(&self, ids: &'a [u32]) -> Option<&'a [u32]> {
        self.told.ids.then_some(ids)
    }

    /// What a stream tells of a prompt, at its beginning.
    pub fn opened<'a>(&'a self, prompt: &'a Told) -> PromptParts<'a> {
        PromptParts { prompt_token_ids: self.ids(&prompt.ids), prompt_logprobs: None }
    }

    /// What a whole reply tells of a prompt.
    pub fn complete<'a>(&'a self, prompt: &'a Told) -> PromptParts<'a> {
        let prompt_logprobs = self.told.prompt_logprobs.map(|top| PromptLogprobs { style: self, prompt, top });
        PromptParts { prompt_logprobs, ..self.opened(prompt) }
    }
}

/// See [`TokenStyle::scored`].
#[derive(Serialize)]
pub(crate) struct TokenLogprob {
    #[serde(flatten)]
    chosen: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Serialize)]
struct Alternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// What is told of a prompt, by vLLM's names: in the reply of a chat, in each choice of completions.
#[derive(Default, Serialize)]
pub(crate) struct PromptParts<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs<'a>>,
}

/// An object for each token of a prompt, by id: the token itself, then the most likely ones; null for the first.
struct PromptLogprobs<'a> {
    style: &'a TokenStyle,
    prompt: &'a Told,
    top: u32,
}

#[derive(Serialize)]
struct RankedToken {
    logprob: f32,
    /// From 1.
    rank: Option<usize>,
    decoded_token: String,
}

impl Serialize for PromptLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.prompt.ids.len()))?;
        for (i, &token) in self.prompt.ids.iter().enumerate() {
            list.serialize_element(&self.prompt.before(i).map(|before| TokenLogprobs { of: self, token, before }))?;
        }
        list.end()
    }
}

struct TokenLogprobs<'a> {
    of: &'a PromptLogprobs<'a>,
    token: u32,
    before: &'a baton_engine::PositionScore,
}

impl Serialize for TokenLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let PromptLogprobs { style, top, .. } = self.of;
        let ranked = |rank, id, logprob| RankedToken { logprob: finite(logprob), rank, decoded_token: style.text(id) };
        let place = self.before.top.iter().position(|&(id, _)| id == self.token);
        let mut map = serializer.serialize_map(None)?;
        let mut told = HashSet::new();
        if let Some(next) = self.before.next {
            told.insert(self.token);
            map.serialize_entry(&self.token.to_string(), &ranked(place.map(|place| place + 1), self.token, next))?;
        }
        for (place, &(id, logprob)) in self.before.top.iter().enumerate().take(*top as usize) {
            if told.insert(id) {
                map.serialize_entry(&id.to_string(), &ranked(Some(place + 1), id, logprob))?;
            }
        }
        map.end()
    }
}
