//! The items of a response as they come into being, and the events that tell of it.
//!
//! An item is open from its first text to that of the next, or to the end: what the events say of it, joined, is what
//! the finished item says. Ids depend on the response and the item's place alone.

use baton_text::Segment;
use serde_json::{Value, json};

use crate::generate::Score;
use crate::openai::shared::Envelope;
use crate::openai::tokens::TokenStyle;
use crate::sse::Events;

/// See the head of the file.
pub(super) struct Assembly {
    pub envelope: Envelope,
    style: TokenStyle,
    /// Scores are shown.
    logprobs: bool,
    /// Reasoning is shown as its own summary.
    summary: bool,
    items: Vec<Value>,
    open: Option<Open>,
    /// Of the next event.
    sequence: u64,
}

/// The item that grows.
struct Open {
    id: String,
    kind: Kind,
    text: String,
    logprobs: Vec<Value>,
}

#[derive(Clone, PartialEq, Eq)]
enum Kind {
    Reasoning,
    /// Reasoning in the place of its summary.
    Summary,
    Message,
    Call {
        call_id: String,
        name: String,
    },
}

/// Where events go: nowhere if the reply is whole.
pub(super) type Out<'a> = Option<&'a mut Events>;

impl Assembly {
    /// No items yet.
    pub fn new(envelope: Envelope, style: TokenStyle, logprobs: bool, summary: bool) -> Self {
        Self { envelope, style, logprobs, summary, items: Vec::new(), open: None, sequence: 0 }
    }

    /// The items so far; the one that is open as incomplete.
    pub fn items(&self) -> Vec<Value> {
        let open = self.open.as_ref().map(|open| open.item("incomplete"));
        self.items.iter().cloned().chain(open).collect()
    }

    /// Sends an event: `fields` with its type and number.
    pub fn event(&mut self, out: &mut Out, kind: &'static str, fields: Value) {
        let Some(out) = out else { return };
        out.named(kind, &with(json!({"type": kind, "sequence_number": self.sequence}), fields));
        self.sequence += 1;
    }

    /// More of the output.
    pub fn segment(&mut self, out: &mut Out, segment: &Segment, scores: &[Score]) {
        match segment {
            Segment::Reasoning(text) => {
                let (kind, delta, index) = match self.summary {
                    true => (Kind::Summary, "response.reasoning_summary_text.delta", "summary_index"),
                    false => (Kind::Reasoning, "response.reasoning_text.delta", "content_index"),
                };
                self.begin(out, kind);
                self.grow(out, delta, text, json!({index: 0}));
            }
            Segment::Content(text) => {
                let scores = if self.begin(out, Kind::Message) { self.last(text, scores) } else { scores };
                let scores = self.scores(scores);
                let fields = json!({"content_index": 0, "logprobs": scores});
                self.grow(out, "response.output_text.delta", text, fields);
                self.open.iter_mut().for_each(|open| open.logprobs.extend(scores.iter().cloned()));
            }
            Segment::Call { index, name } => {
                self.begin(out, Kind::Call { call_id: self.envelope.call_id(0, *index), name: name.clone() });
            }
            Segment::Arguments { text, .. } => {
                self.grow(out, "response.function_call_arguments.delta", text, json!({}));
            }
        }
    }

    /// The output is complete, or cut off. `scores`: of tokens that showed no text.
    pub fn end(&mut self, out: &mut Out, complete: bool, scores: &[Score]) {
        let scores = self.scores(scores);
        if let Some(open) = self.open.as_mut().filter(|open| open.kind == Kind::Message) {
            open.logprobs.extend(scores);
        }
        self.close(out, complete);
    }

    /// Opens an item of this kind, unless it is what is open; true if it was not.
    fn begin(&mut self, out: &mut Out, kind: Kind) -> bool {
        if self.open.as_ref().is_some_and(|open| open.kind == kind) {
            return false;
        }
        self.close(out, true);
        let (prefix, part) = match kind {
            Kind::Reasoning => ("rs", Some(("response.content_part.added", "content_index"))),
            Kind::Summary => ("rs", Some(("response.reasoning_summary_part.added", "summary_index"))),
            Kind::Message => ("msg", Some(("response.content_part.added", "content_index"))),
            Kind::Call { .. } => ("fc", None),
        };
        let index = self.items.len();
        let id = format!("{prefix}_{}{index:04x}", unique(&self.envelope));
        let open = Open { id, kind, text: String::new(), logprobs: Vec::new() };
        let fields = json!({"output_index": index, "item": open.item("in_progress")});
        self.event(out, "response.output_item.added", fields);
        if let Some((name, place)) = part {
            let fields = json!({"item_id": open.id, "output_index": index, place: 0, "part": open.part()});
            self.event(out, name, fields);
        }
        self.open = Some(open);
        true
    }

    /// Of scores that come with a text, those of the text's own tokens: markers and space before it come with it too.
    fn last<'a>(&self, text: &str, scores: &'a [Score]) -> &'a [Score] {
        let mut left = text.len();
        let before = scores.iter().rposition(|score| {
            let before = left == 0;
            left = left.saturating_sub(self.style.bytes(score.token).len());
            before
        });
        &scores[before.map_or(0, |at| at + 1)..]
    }

    fn grow(&mut self, out: &mut Out, kind: &'static str, delta: &str, fields: Value) {
        let Some(open) = &mut self.open else { return };
        open.text.push_str(delta);
        let place = json!({"item_id": open.id, "output_index": self.items.len(), "delta": delta});
        self.event(out, kind, with(place, fields));
    }

    fn close(&mut self, out: &mut Out, complete: bool) {
        let Some(open) = self.open.take() else { return };
        let index = self.items.len();
        let place = json!({"item_id": open.id, "output_index": index});
        let (text, part) = (&open.text, open.part());
        let done = match &open.kind {
            Kind::Reasoning => [
                ("response.reasoning_text.done", json!({"content_index": 0, "text": text})),
                ("response.content_part.done", json!({"content_index": 0, "part": part})),
            ]
            .to_vec(),
            Kind::Summary => [
                ("response.reasoning_summary_text.done", json!({"summary_index": 0, "text": text})),
                ("response.reasoning_summary_part.done", json!({"summary_index": 0, "part": part})),
            ]
            .to_vec(),
            Kind::Message => [
                ("response.output_text.done", json!({"content_index": 0, "text": text, "logprobs": open.logprobs})),
                ("response.content_part.done", json!({"content_index": 0, "part": part})),
            ]
            .to_vec(),
            Kind::Call { name, .. } => {
                [("response.function_call_arguments.done", json!({"name": name, "arguments": text}))].to_vec()
            }
        };
        for (kind, fields) in done {
            self.event(out, kind, with(place.clone(), fields));
        }
        let item = open.item(if complete { "completed" } else { "incomplete" });
        self.event(out, "response.output_item.done", json!({"output_index": index, "item": item}));
        self.items.push(item);
    }

    fn scores(&self, scores: &[Score]) -> Vec<Value> {
        if !self.logprobs {
            return Vec::new();
        }
        scores.iter().map(|score| json!(self.style.scored(score))).collect()
    }
}

impl Open {
    /// The one part that an item other than a call has.
    fn part(&self) -> Value {
        match self.kind {
            Kind::Reasoning => json!({"type": "reasoning_text", "text": self.text}),
            Kind::Summary => json!({"type": "summary_text", "text": self.text}),
            _ => json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}),
        }
    }

    /// The item as it stands.
    fn item(&self, status: &str) -> Value {
        let (id, text) = (&self.id, &self.text);
        // Until there is text the part has not been announced.
        let parts = if text.is_empty() { Vec::new() } else { vec![self.part()] };
        match &self.kind {
            Kind::Reasoning => {
                json!({"type": "reasoning", "id": id, "summary": [], "content": parts, "status": status})
            }
            Kind::Summary => json!({"type": "reasoning", "id": id, "summary": parts, "content": [], "status": status}),
            Kind::Message => {
                json!({"type": "message", "id": id, "role": "assistant", "status": status, "content": parts})
            }
            Kind::Call { call_id, name } => json!({"type": "function_call", "id": id, "call_id": call_id, "name": name,
                "arguments": text, "status": status}),
        }
    }
}

/// The part of a reply's id that no other reply has.
pub(super) fn unique(envelope: &Envelope) -> &str {
    envelope.id.rsplit('-').next().unwrap_or_default()
}

/// An object with further fields.
fn with(mut object: Value, fields: Value) -> Value {
    if let (Value::Object(object), Value::Object(fields)) = (&mut object, fields) {
        object.extend(fields);
    }
    object
}
