//! The reply of `/v1/chat/completions`.

use std::sync::Arc;

use baton_text::Segment;
use serde::Serialize;

use crate::generate::{Output, Score};
use crate::generation::Generation;
use crate::openai::shared::{Envelope, Finish, Format, Piece, Reply, Usage, finite};

/// Writes chat completions.
pub(crate) struct ChatFormat {
    pub envelope: Envelope,
    pub generation: Arc<Generation>,
    /// Whether scores were asked for.
    pub logprobs: bool,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    message: Message<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Finish,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
    #[serde(flatten)]
    reasoning: Option<Reasoning<'a>>,
}

/// Reasoning by DeepSeek's name and by the newer one.
#[derive(Serialize)]
struct Reasoning<'a> {
    reasoning_content: &'a str,
    reasoning: &'a str,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<Finish>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(flatten)]
    reasoning: Option<Reasoning<'a>>,
}

/// Every generated token's score, reasoning and markers included, except those of a stop token or string.
#[derive(Serialize)]
struct Logprobs {
    content: Vec<TokenLogprob>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct TokenLogprob {
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

impl ChatFormat {
    fn alternative(&self, token: u32, logprob: f32) -> Alternative {
        let bytes = self.generation.text.token_bytes(token);
        Alternative { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: finite(logprob), bytes }
    }

    fn logprobs(&self, scores: &[Score]) -> Logprobs {
        let token = |score: &Score| TokenLogprob {
            chosen: self.alternative(score.token, score.logprob),
            top_logprobs: score.top.iter().map(|&(token, logprob)| self.alternative(token, logprob)).collect(),
        };
        Logprobs { content: scores.iter().map(token).collect(), refusal: None }
    }

    fn chunk_choice<'a>(&self, index: usize, delta: Delta<'a>, scores: &[Score]) -> ChunkChoice<'a> {
        let logprobs = (!scores.is_empty()).then(|| self.logprobs(scores));
        ChunkChoice { index, delta, logprobs, finish_reason: None }
    }
}

impl Format for ChatFormat {
    fn chunk(&self, out: &mut Vec<u8>, piece: &Piece) {
        let choice = match *piece {
            Piece::Open { index } => {
                let delta = Delta { role: Some("assistant"), content: Some(""), reasoning: None };
                self.chunk_choice(index, delta, &[])
            }
            Piece::Text { index, segment, scores } => {
                let delta = match segment {
                    Segment::Content(text) => Delta { content: Some(text), ..Delta::default() },
                    Segment::Reasoning(text) => {
                        let reasoning = Reasoning { reasoning_content: text, reasoning: text };
                        Delta { reasoning: Some(reasoning), ..Delta::default() }
                    }
                };
                self.chunk_choice(index, delta, scores)
            }
            Piece::Finish { index, reason, scores } => {
                let choice = self.chunk_choice(index, Delta::default(), scores);
                ChunkChoice { finish_reason: Some(reason), ..choice }
            }
            Piece::Usage(usage) => {
                let usage = self.envelope.usage(Some(usage));
                return Reply::<ChunkChoice>::write(out, &self.envelope, "chat.completion.chunk", &[], usage);
            }
        };
        Reply::write(out, &self.envelope, "chat.completion.chunk", &[choice], self.envelope.usage(None));
    }

    fn whole(&self, out: &mut Vec<u8>, outputs: &[Output], usage: &Usage) {
        let choices = outputs.iter().enumerate().map(|(index, output)| {
            let Output { reasoning, content, scores, reason } = output;
            let reasoning = (!reasoning.is_empty()).then_some(Reasoning { reasoning_content: reasoning, reasoning });
            Choice {
                index,
                message: Message { role: "assistant", content, refusal: None, reasoning },
                logprobs: self.logprobs.then(|| self.logprobs(scores)),
                finish_reason: *reason,
            }
        });
        let choices: Vec<_> = choices.collect();
        Reply::write(out, &self.envelope, "chat.completion", &choices, Some(Some(usage)));
    }
}
