//! The reply of `/v1/chat/completions`.

use baton_text::Segment;
use serde::Serialize;

use crate::generate::{Call, Output, Score, Tokens};
use crate::json;
use crate::openai::shared::{Envelope, Finish, Format, Piece, Reply, Usage, Whole};
use crate::openai::tokens::{PromptParts, TokenLogprob, TokenStyle};
use crate::sse::Events;

const CHUNK: &str = "chat.completion.chunk";

/// Writes chat completions.
pub(crate) struct ChatFormat {
    pub envelope: Envelope,
    pub style: TokenStyle,
    /// Whether scores were asked for.
    pub logprobs: bool,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    message: Message<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Finish,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    /// `None` where only tools are called.
    content: Option<&'a str>,
    refusal: Option<()>,
    #[serde(flatten)]
    reasoning: Option<Reasoning<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall<'a>>,
}

/// A call, or a part of one.
#[derive(Serialize)]
struct ToolCall<'a> {
    /// Of a part: which call it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: Function<'a>,
}

#[derive(Serialize)]
struct Function<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(flatten)]
    reasoning: Option<Reasoning<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[ToolCall<'a>; 1]>,
}

/// Every generated token's score, reasoning and markers included, except those of a stop token or string.
#[derive(Serialize)]
struct Logprobs {
    content: Vec<TokenLogprob>,
    refusal: Option<()>,
}

impl ChatFormat {
    fn logprobs(&self, scores: &[Score]) -> Logprobs {
        Logprobs { content: scores.iter().map(|score| self.style.scored(score)).collect(), refusal: None }
    }

    fn chunk_choice<'a>(&self, index: usize, delta: Delta<'a>, tokens: &'a Tokens) -> ChunkChoice<'a> {
        let logprobs = (!tokens.scores.is_empty()).then(|| self.logprobs(&tokens.scores));
        ChunkChoice { index, delta, logprobs, finish_reason: None, token_ids: self.style.ids(&tokens.ids) }
    }
}

/// A call, whole or its beginning: ids do not depend on how a reply is sent.
fn tool_call<'a>(id: String, name: &'a str, arguments: &'a str) -> ToolCall<'a> {
    let function = Function { name: Some(name), arguments };
    ToolCall { index: None, id: Some(id), r#type: Some("function"), function }
}

impl Format for ChatFormat {
    fn events(&mut self, out: &mut Events, piece: &Piece, usage: &Usage) {
        let mut of_prompt = PromptParts::default();
        let choice = match *piece {
            Piece::Open { index, prompt } => {
                if index == 0 {
                    of_prompt = self.style.opened(prompt);
                }
                let delta = Delta { role: Some("assistant"), content: Some(""), ..Delta::default() };
                ChunkChoice { index, delta, logprobs: None, finish_reason: None, token_ids: None }
            }
            Piece::Text { index, segment, tokens } => {
                let delta = match segment {
                    Segment::Content(text) => Delta { content: Some(text), ..Delta::default() },
                    Segment::Reasoning(text) => {
                        let reasoning = Reasoning { reasoning_content: text, reasoning: text };
                        Delta { reasoning: Some(reasoning), ..Delta::default() }
                    }
                    Segment::Call { index: call, name } => {
                        let begun = tool_call(self.envelope.call_id(index, *call), name, "");
                        Delta { tool_calls: Some([ToolCall { index: Some(*call), ..begun }]), ..Delta::default() }
                    }
                    Segment::Arguments { index, text } => {
                        let function = Function { name: None, arguments: text };
                        let part = ToolCall { index: Some(*index), id: None, r#type: None, function };
                        Delta { tool_calls: Some([part]), ..Delta::default() }
                    }
                };
                self.chunk_choice(index, delta, tokens)
            }
            Piece::Finish { index, reason, tokens, .. } => {
                let choice = self.chunk_choice(index, Delta::default(), tokens);
                ChunkChoice { finish_reason: Some(reason), ..choice }
            }
            Piece::End(usage) => return self.envelope.end::<ChunkChoice>(out, CHUNK, usage),
            Piece::Error(error) => return out.data(&error.object()),
        };
        let choices = [choice];
        let chunk = Reply::new(&self.envelope, CHUNK, &choices, self.envelope.usage(usage));
        out.data(&chunk.of_prompt(of_prompt));
    }
}

impl Whole for ChatFormat {
    fn whole(&mut self, outputs: &[Output], usage: &Usage) -> Vec<u8> {
        let choices = outputs.iter().enumerate().map(|(index, output)| {
            let Output { reasoning, content, calls, tokens, reason, .. } = output;
            let reasoning = (!reasoning.is_empty()).then_some(Reasoning { reasoning_content: reasoning, reasoning });
            let content = (calls.is_empty() || !content.is_empty()).then_some(content.as_str());
            let calls = calls.iter().enumerate();
            let tool_calls = calls
                .map(|(call, Call { name, arguments })| tool_call(self.envelope.call_id(index, call), name, arguments));
            let tool_calls = tool_calls.collect();
            Choice {
                index,
                message: Message { role: "assistant", content, refusal: None, reasoning, tool_calls },
                logprobs: self.logprobs.then(|| self.logprobs(&tokens.scores)),
                finish_reason: *reason,
                token_ids: self.style.ids(&tokens.ids),
            }
        });
        let choices: Vec<_> = choices.collect();
        let reply = Reply::new(&self.envelope, "chat.completion", &choices, Some(Some(usage)));
        json::write(&reply.of_prompt(self.style.complete(&outputs[0].prompt)))
    }
}
