//! Earlier calls as one chat template wants them.
//!
//! Chats come with the arguments of calls as objects, which is what transformers tells templates to expect. Some
//! templates join them to text instead, and Mistral's refuse ids other than their own.

use chrono::NaiveDateTime;
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, Serializer};
use serde_json::{Value, json};

use crate::TextError;
use crate::template::ChatInput;

/// What a template needs to write calls of tools, found by trying.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct History {
    /// The template tells the model of the tools that a chat has.
    pub(crate) shows_tools: bool,
    /// Arguments must be text.
    arguments_as_text: bool,
    /// Ids must have nine letters and digits.
    short_ids: bool,
}

const PROBE: &str = "baton_probe";
const PROBE_KEY: &str = "baton_probe_key";
const PROBE_ID: &str = "Probe0123";

impl History {
    /// Tries a template. `render`: what it makes of a chat.
    pub(crate) fn probe(render: impl Fn(&ChatInput, NaiveDateTime) -> Result<String, TextError>) -> Self {
        let shows = |messages: Value, text: &str| {
            let parameters = json!({"type": "object", "properties": {}});
            let function = json!({"name": PROBE, "description": "Tries.", "parameters": parameters});
            let tools = Some(json!([{"type": "function", "function": function}]));
            let chat = ChatInput { messages, tools, add_generation_prompt: true, ..ChatInput::default() };
            render(&chat, NaiveDateTime::default()).is_ok_and(|prompt| prompt.contains(text))
        };
        let user = json!({"role": "user", "content": "Try."});
        let answered = |id: &str, arguments: Value| {
            let call = json!({"id": id, "type": "function", "function": {"name": "try", "arguments": arguments}});
            let called = json!({"role": "assistant", "content": null, "tool_calls": [call]});
            json!([user, called, {"role": "tool", "tool_call_id": id, "content": "Tried."}])
        };
        let (object, text) = (json!({PROBE_KEY: 1}), json!({PROBE_KEY: 1}).to_string());
        let key = format!("\"{PROBE_KEY}\"");
        let takes = |id: &str, arguments: Value| shows(answered(id, arguments), &key);
        let arguments_as_text = !takes(PROBE_ID, object.clone()) && takes(PROBE_ID, text.clone().into());
        let arguments = if arguments_as_text { text.into() } else { object };
        let long = format!("call_{PROBE_ID}");
        Self {
            shows_tools: shows(json!([user]), PROBE),
            arguments_as_text,
            short_ids: takes(PROBE_ID, arguments.clone()) && !takes(&long, arguments),
        }
    }

    /// Writes the calls in an array of messages so.
    pub(crate) fn adapt(self, messages: &mut Value) {
        if !self.arguments_as_text && !self.short_ids {
            return;
        }
        for message in messages.as_array_mut().into_iter().flatten() {
            if self.short_ids
                && let Some(id) = message.get_mut("tool_call_id")
            {
                shorten(id);
            }
            for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
                if self.short_ids
                    && let Some(id) = call.get_mut("id")
                {
                    shorten(id);
                }
                if self.arguments_as_text
                    && let Some(arguments) = call.pointer_mut("/function/arguments").filter(|a| !a.is_string())
                {
                    *arguments = spaced(arguments).into();
                }
            }
        }
    }
}

/// Length of a short id.
const SHORT_ID: usize = 9;

/// Makes an id a short one, the same for the same id.
fn shorten(id: &mut Value) {
    let Some(text) = id.as_str() else { return };
    if text.len() == SHORT_ID && text.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return;
    }
    // FNV-1a: it must only tell the ids of one chat apart.
    let mut hash =
        text.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let digits = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let digit = |_| {
        let digit = digits[(hash % 62) as usize];
        hash /= 62;
        char::from(digit)
    };
    *id = (0..SHORT_ID).map(digit).collect::<String>().into();
}

/// JSON as Python writes it and models have learnt it, with a space behind commas and colons.
fn spaced(value: &Value) -> String {
    struct Spaced;

    impl Formatter for Spaced {
        fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
            if first { Ok(()) } else { out.write_all(b", ") }
        }

        fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
            if first { Ok(()) } else { out.write_all(b", ") }
        }

        fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
            CompactFormatter.begin_object_value(out)?;
            out.write_all(b" ")
        }
    }

    let mut out = Vec::new();
    // Writing to memory, and a value's keys are text.
    value.serialize(&mut Serializer::with_formatter(&mut out, Spaced)).expect("a JSON value");
    String::from_utf8(out).expect("JSON is UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_become_text_as_python_writes_it() {
        let history = History { arguments_as_text: true, ..History::default() };
        let mut messages = json!([
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [
                {"id": "a", "function": {"name": "f", "arguments": {"a": [1, "é,:"], "b": {}}}},
                {"id": "b", "function": {"name": "f", "arguments": "as it is"}},
            ]},
        ]);
        history.adapt(&mut messages);
        let calls = &messages[1]["tool_calls"];
        assert_eq!(calls[0]["function"]["arguments"], r#"{"a": [1, "é,:"], "b": {}}"#);
        assert_eq!(calls[1]["function"]["arguments"], "as it is");
        assert_eq!(calls[0]["id"], "a");
    }

    #[test]
    fn short_ids_stay_and_others_become_short_alike() {
        let history = History { short_ids: true, ..History::default() };
        let mut messages = json!([
            {"role": "assistant", "tool_calls": [{"id": "call_0123"}, {"id": "aB3dE6gH9"}, {"id": ""}]},
            {"role": "tool", "tool_call_id": "call_0123"},
        ]);
        history.adapt(&mut messages);
        let ids: Vec<&str> = (0..3).map(|i| messages[0]["tool_calls"][i]["id"].as_str().unwrap()).collect();
        assert!(ids.iter().all(|id| id.len() == 9 && id.bytes().all(|b| b.is_ascii_alphanumeric())), "{ids:?}");
        assert_eq!(ids[1], "aB3dE6gH9");
        assert_eq!(messages[1]["tool_call_id"], ids[0]);
        assert_ne!(ids[0], ids[2]);
    }
}
