//! The reply of `/v1/messages`: one message, whole or as a stream of its blocks.

use baton_text::Segment;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::anthropic::errors;
use crate::error::ApiError;
use crate::generate::{Call, Output};
use crate::json;
use crate::openai::shared::{Envelope, Finish, Format, Piece, Usage, Whole};
use crate::sse::Events;

/// In place of a signature: clients take a thinking block without one for incomplete.
const UNSIGNED: &str = "unsigned";

/// Writes messages.
pub(crate) struct MessageFormat {
    envelope: Envelope,
    /// Tokens of the prompt.
    input_tokens: usize,
    stops: Vec<String>,
    omit_thinking: bool,
    /// The block that is being sent, and how many have been.
    open: Option<Kind>,
    blocks: usize,
    /// Why the message is complete, until it can be said together with its usage.
    ended: Option<(Finish, Option<usize>)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    /// The call of this number.
    Call(usize),
}

#[derive(Serialize)]
struct Message<'a> {
    id: String,
    r#type: &'static str,
    role: &'static str,
    model: &'a str,
    content: Vec<Block<'a>>,
    stop_reason: Option<&'static str>,
    stop_sequence: Option<&'a str>,
    usage: MessageUsage,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Block<'a> {
    Thinking { thinking: &'a str, signature: &'a str },
    Text { text: &'a str },
    ToolUse { id: String, name: &'a str, input: Map<String, Value> },
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(clippy::enum_variant_names)] // as they are named on the wire
enum Delta<'a> {
    ThinkingDelta { thinking: &'a str },
    SignatureDelta { signature: &'a str },
    TextDelta { text: &'a str },
    InputJsonDelta { partial_json: &'a str },
}

/// The cache works by itself and costs nothing, so that all of the prompt counts as input.
#[derive(Serialize)]
struct MessageUsage {
    input_tokens: usize,
    cache_creation_input_tokens: usize,
    cache_read_input_tokens: usize,
    output_tokens: usize,
}

impl MessageFormat {
    /// `input_tokens`: of the prompt; `stops`: the stop strings of the request.
    pub fn new(envelope: Envelope, input_tokens: usize, stops: Vec<String>, omit_thinking: bool) -> Self {
        Self { envelope, input_tokens, stops, omit_thinking, open: None, blocks: 0, ended: None }
    }

    fn usage(&self, output_tokens: usize) -> MessageUsage {
        let (cache_creation_input_tokens, cache_read_input_tokens) = (0, 0);
        let input_tokens = self.input_tokens;
        MessageUsage { input_tokens, cache_creation_input_tokens, cache_read_input_tokens, output_tokens }
    }

    fn message<'a>(&'a self, content: Vec<Block<'a>>, output_tokens: usize) -> Message<'a> {
        Message {
            id: self.envelope.id.replace('-', "_"),
            r#type: "message",
            role: "assistant",
            model: &self.envelope.model,
            content,
            stop_reason: None,
            stop_sequence: None,
            usage: self.usage(output_tokens),
        }
    }

    fn stop(&self, reason: Finish, matched: Option<usize>) -> (&'static str, Option<&str>) {
        let matched = matched.and_then(|index| self.stops.get(index));
        match reason {
            Finish::Length => ("max_tokens", None),
            Finish::ToolCalls => ("tool_use", None),
            Finish::Stop if matched.is_some() => ("stop_sequence", matched.map(String::as_str)),
            Finish::Stop => ("end_turn", None),
        }
    }

    /// Begins a block of this kind, unless it is what is being sent.
    fn begin(&mut self, out: &mut Events, kind: Kind, block: Block) {
        if self.open == Some(kind) {
            return;
        }
        self.close(out);
        let event = json!({"type": "content_block_start", "index": self.blocks, "content_block": block});
        out.named("content_block_start", &event);
        self.open = Some(kind);
    }

    fn delta(&self, out: &mut Events, delta: Delta) {
        out.named("content_block_delta", &json!({"type": "content_block_delta", "index": self.blocks, "delta": delta}));
    }

    fn close(&mut self, out: &mut Events) {
        let Some(kind) = self.open.take() else { return };
        if kind == Kind::Thinking {
            self.delta(out, Delta::SignatureDelta { signature: UNSIGNED });
        }
        out.named("content_block_stop", &json!({"type": "content_block_stop", "index": self.blocks}));
        self.blocks += 1;
    }

    fn segment(&mut self, out: &mut Events, segment: &Segment) {
        match segment {
            Segment::Reasoning(text) => {
                self.begin(out, Kind::Thinking, Block::Thinking { thinking: "", signature: "" });
                if !self.omit_thinking {
                    self.delta(out, Delta::ThinkingDelta { thinking: text });
                }
            }
            Segment::Content(text) => {
                self.begin(out, Kind::Text, Block::Text { text: "" });
                self.delta(out, Delta::TextDelta { text });
            }
            Segment::Call { index, name } => {
                let id = self.envelope.call_id(0, *index);
                self.begin(out, Kind::Call(*index), Block::ToolUse { id, name, input: Map::new() });
            }
            Segment::Arguments { text, .. } => self.delta(out, Delta::InputJsonDelta { partial_json: text }),
        }
    }

    fn end(&mut self, out: &mut Events, usage: &Usage) {
        self.close(out);
        let (reason, matched) = self.ended.unwrap_or((Finish::Stop, None));
        let (stop_reason, stop_sequence) = self.stop(reason, matched);
        let event = json!({
            "type": "message_delta",
            "delta": {"stop_reason": stop_reason, "stop_sequence": stop_sequence},
            "usage": self.usage(usage.completion_tokens),
        });
        out.named("message_delta", &event);
        out.named("message_stop", &json!({"type": "message_stop"}));
    }
}

impl Format for MessageFormat {
    fn events(&mut self, out: &mut Events, piece: &Piece, _: &Usage) {
        match *piece {
            Piece::Open { .. } => {
                let message = self.message(Vec::new(), 0);
                out.named("message_start", &json!({"type": "message_start", "message": message}));
            }
            Piece::Text { segment, .. } => self.segment(out, segment),
            Piece::Finish { reason, matched, .. } => self.ended = Some((reason, matched)),
            Piece::End(usage) => self.end(out, usage),
            Piece::Error(error) => out.named("error", &errors::object(error)),
        }
    }
}

impl Whole for MessageFormat {
    fn whole(&mut self, outputs: &[Output], usage: &Usage) -> Vec<u8> {
        let [Output { reasoning, content, calls, reason, matched, .. }] = outputs else {
            unreachable!("a message has one choice")
        };
        let mut blocks = Vec::new();
        if !reasoning.is_empty() {
            let thinking = if self.omit_thinking { "" } else { reasoning };
            blocks.push(Block::Thinking { thinking, signature: UNSIGNED });
        }
        if !content.is_empty() {
            blocks.push(Block::Text { text: content });
        }
        for (i, Call { name, arguments }) in calls.iter().enumerate() {
            blocks.push(Block::ToolUse { id: self.envelope.call_id(0, i), name, input: input(arguments) });
        }
        let (stop_reason, stop_sequence) = self.stop(*reason, *matched);
        let message = self.message(blocks, usage.completion_tokens);
        json::write(&Message { stop_reason: Some(stop_reason), stop_sequence, ..message })
    }
}

/// Arguments as the object that they are the text of. Text that is none, because it was cut off or the model wrote
/// nonsense, has no other place here than under a name of its own.
fn input(arguments: &str) -> Map<String, Value> {
    if arguments.trim_ascii().is_empty() {
        return Map::new();
    }
    let mut budget = json::MAX_VALUES;
    let parsed: Result<_, ApiError> = json::parse_object(arguments.as_bytes(), &mut budget);
    parsed.unwrap_or_else(|_| Map::from_iter([("raw_arguments".to_owned(), arguments.into())]))
}
