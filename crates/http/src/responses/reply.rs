//! A response: the object that is sent, streamed and kept.
//!
//! However it is sent, it is made of the same pieces in the same way; so a stream's last event holds the object that a
//! whole reply would have been.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::files::now;
use crate::generate::Choices;
use crate::generation::Generation;
use crate::openai::shared::{Envelope, Finish, Format, Piece, Usage};
use crate::openai::tokens::{TokenStyle, TokensTold};
use crate::responses::assembly::{Assembly, Out, unique};
use crate::responses::request::{Keeping, Shown};
use crate::responses::store::PREFIX;
use crate::sse::Events;

/// Takes a response's final object, once.
pub(crate) type Keep = Box<dyn FnOnce(&Value) + Send + Sync>;

/// Makes responses.
pub(crate) struct ResponseFormat {
    /// All fields, as they are before there is output.
    object: Map<String, Value>,
    assembly: Assembly,
    /// The output was cut at its length.
    cut: bool,
    keep: Option<Keep>,
}

impl ResponseFormat {
    /// The response to a request, which the envelope's model answers.
    pub fn new(envelope: Envelope, generation: Arc<Generation>, shown: Shown, keeping: &Keeping) -> Self {
        let params = &shown.params;
        let defaults = &generation.card.defaults;
        let mut object = Map::new();
        let mut set = |name: &str, value: Value| object.insert(name.into(), value);
        set("id", format!("{PREFIX}{}", unique(&envelope)).into());
        set("object", "response".into());
        set("created_at", envelope.created.into());
        set("completed_at", Value::Null);
        set("status", "in_progress".into());
        set("background", keeping.background.into());
        set("error", Value::Null);
        set("incomplete_details", Value::Null);
        set("model", envelope.model.as_str().into());
        set("output", json!([]));
        set("previous_response_id", keeping.previous.as_deref().into());
        set("store", keeping.store.into());
        set("temperature", number(params.temperature.unwrap_or_else(|| defaults.temperature())));
        set("top_p", number(params.top_p.or(defaults.top_p).unwrap_or(1.0)));
        set("presence_penalty", number(params.presence_penalty));
        set("frequency_penalty", number(params.frequency_penalty));
        set("usage", Value::Null);
        object.extend(shown.echo);
        let style = TokenStyle::new(generation, TokensTold::new(params));
        let assembly = Assembly::new(envelope, style, params.logprobs.is_some(), shown.summary);
        Self { object, assembly, cut: false, keep: None }
    }

    /// The response's id.
    pub fn id(&self) -> &str {
        self.object["id"].as_str().unwrap_or_default()
    }

    /// Gives the final object to this, before it is sent.
    pub fn keep(self, keep: Keep) -> Self {
        Self { keep: Some(keep), ..self }
    }

    /// The object before it has output, in this state.
    pub fn in_state(&self, status: &str) -> Value {
        let mut object = self.object.clone();
        object.insert("status".into(), status.into());
        object.into()
    }

    /// Runs to the end, telling nobody of what happens in between, and gives the final object.
    pub async fn complete(&mut self, choices: &mut Choices) -> Result<Value, ApiError> {
        while let Some(event) = choices.next().await {
            self.piece(&event?.piece());
        }
        Ok(self.done(&choices.usage()))
    }

    /// Takes in a piece of the output, telling nobody.
    pub fn piece(&mut self, piece: &Piece) {
        self.take(&mut None, piece);
    }

    fn take(&mut self, out: &mut Out, piece: &Piece) {
        match *piece {
            Piece::Open { .. } => {
                for kind in ["response.created", "response.in_progress"] {
                    let object = self.in_state("in_progress");
                    self.assembly.event(out, kind, json!({"response": object}));
                }
            }
            Piece::Text { segment, tokens, .. } => self.assembly.segment(out, segment, &tokens.scores),
            Piece::Finish { reason, tokens, .. } => {
                self.cut = reason == Finish::Length;
                self.assembly.end(out, !self.cut, &tokens.scores);
            }
            Piece::End(usage) => {
                let kind = if self.cut { "response.incomplete" } else { "response.completed" };
                let object = self.done(usage);
                self.assembly.event(out, kind, json!({"response": object}));
            }
            Piece::Error(error) => {
                let fields = json!({"code": error.code(), "message": error.message(), "param": error.param()});
                self.assembly.event(out, "error", fields);
                let object = self.failed(error);
                self.assembly.event(out, "response.failed", json!({"response": object}));
            }
        }
    }

    /// The final object of a response that went well.
    pub fn done(&mut self, usage: &Usage) -> Value {
        let mut object = self.object.clone();
        let status = if self.cut { "incomplete" } else { "completed" };
        object.insert("status".into(), status.into());
        if self.cut {
            object.insert("incomplete_details".into(), json!({"reason": "max_output_tokens"}));
        } else {
            object.insert("completed_at".into(), now().into());
        }
        let usage = json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        });
        object.insert("usage".into(), usage);
        self.finish(object)
    }

    /// The final object of a response that failed.
    pub fn failed(&mut self, error: &ApiError) -> Value {
        let mut object = self.object.clone();
        object.insert("status".into(), "failed".into());
        object.insert("error".into(), failure(error.message()));
        self.finish(object)
    }

    /// The final object of a response that was called off.
    pub fn cancelled(&mut self) -> Value {
        let mut object = self.object.clone();
        object.insert("status".into(), "cancelled".into());
        self.finish(object)
    }

    fn finish(&mut self, mut object: Map<String, Value>) -> Value {
        object.insert("output".into(), self.assembly.items().into());
        let object = Value::from(object);
        if let Some(keep) = self.keep.take() {
            keep(&object);
        }
        object
    }
}

/// The `error` of a response that has failed.
pub(super) fn failure(message: &str) -> Value {
    json!({"code": "server_error", "message": message})
}

/// A number as the client wrote it, not as the nearest `f32` would look in `f64`.
fn number(number: f32) -> Value {
    number.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

impl Format for ResponseFormat {
    fn events(&mut self, out: &mut Events, piece: &Piece, _: &Usage) {
        self.take(&mut Some(out), piece);
    }
}
