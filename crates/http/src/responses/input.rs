//! Items of a conversation: read from a request, kept in one form, and turned into a chat's messages.
//!
//! A turn of the assistant is one message of a chat but several items (reasoning, text, calls): items that follow each
//! other and can be of one turn are. What comes out of here as items can be read in again.

use serde_json::{Map, Value, json};

use crate::dialect::texts;
use crate::error::ApiError;
use crate::fields::Fields;

/// Most items of a request.
const MAX_ITEMS: usize = 4096;

/// Fields of a text part that change nothing of a prompt.
const PART_NO_EFFECT: &[&str] = &["annotations", "logprobs", "prompt_cache_breakpoint"];

/// Reads `input`: a text, or items.
pub(super) fn read(fields: &Fields, input: Value) -> Result<Vec<Value>, ApiError> {
    let items = match input {
        Value::String(text) => vec![json!({"role": "user", "content": text})],
        Value::Array(items) => items,
        _ => return Err(ApiError::wrong_type("input", "a string or an array of items")),
    };
    if items.len() > MAX_ITEMS {
        return Err(ApiError::out_of_range("input", format!("an array of at most {MAX_ITEMS} items")));
    }
    items.into_iter().enumerate().map(|(i, value)| item(fields.item(format!("input[{i}]"), value)?)).collect()
}

fn item(mut item: Fields) -> Result<Value, ApiError> {
    let kind = item.string("type")?;
    let id = item.string("id")?;
    item.take("status");
    let value = match kind.as_deref().unwrap_or("message") {
        "message" => message(&mut item, id)?,
        "function_call" => {
            let call_id = item.string("call_id")?;
            let call_id = item.required("call_id", call_id)?;
            let name = item.string("name")?;
            let name = item.required("name", name)?;
            let arguments = item.string("arguments")?;
            let arguments = item.required("arguments", arguments)?;
            for name in ["caller", "namespace", "async", "parsed_arguments"] {
                item.take(name);
            }
            let id = id.unwrap_or_else(|| new_id("fc"));
            json!({"type": "function_call", "id": id, "call_id": call_id, "name": name, "arguments": arguments,
                "status": "completed"})
        }
        "function_call_output" => {
            let call_id = item.string("call_id")?;
            let call_id = item.required("call_id", call_id)?;
            let (path, output) = (item.path("output"), item.take("output"));
            let output = texts(&item, &path, item.required("output", output)?, &["input_text"], PART_NO_EFFECT)?;
            item.take("caller");
            let id = id.unwrap_or_else(|| new_id("fco"));
            json!({"type": "function_call_output", "id": id, "call_id": call_id, "output": output.join("\n"),
                "status": "completed"})
        }
        "reasoning" => reasoning(&mut item, id)?,
        _ => return Err(ApiError::unsupported(&item.path("type"))),
    };
    item.finish()?;
    Ok(value)
}

fn message(item: &mut Fields, id: Option<String>) -> Result<Value, ApiError> {
    let role = item.string("role")?;
    let role = item.required("role", role)?;
    if !["user", "assistant", "system", "developer"].contains(&role.as_str()) {
        return Err(ApiError::out_of_range(&item.path("role"), "user, assistant, system or developer"));
    }
    item.take("phase");
    let (path, content) = (item.path("content"), item.take("content"));
    let content =
        texts(item, &path, item.required("content", content)?, &["input_text", "output_text"], PART_NO_EFFECT)?;
    let part = |text: String| match role.as_str() {
        "assistant" => json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []}),
        _ => json!({"type": "input_text", "text": text}),
    };
    let content: Vec<_> = content.into_iter().map(part).collect();
    let id = id.unwrap_or_else(|| new_id("msg"));
    Ok(json!({"type": "message", "id": id, "role": role, "status": "completed", "content": content}))
}

/// Its text, or its summary where there is no text.
fn reasoning(item: &mut Fields, id: Option<String>) -> Result<Value, ApiError> {
    let mut parts = |name: &str, kind: &str| {
        let (path, parts) = (item.path(name), item.take(name));
        let texts = parts.map(|parts| texts(item, &path, parts, &[kind], &[])).transpose()?.unwrap_or_default();
        Ok(texts.into_iter().map(|text| json!({"type": kind, "text": text})).collect::<Vec<_>>())
    };
    let (summary, content) = (parts("summary", "summary_text")?, parts("content", "reasoning_text")?);
    // Ours is never encrypted, and nobody else's can be read.
    if item.take("encrypted_content").is_some() {
        return Err(ApiError::unsupported(&item.path("encrypted_content")));
    }
    let id = id.unwrap_or_else(|| new_id("rs"));
    Ok(json!({"type": "reasoning", "id": id, "summary": summary, "content": content, "status": "completed"}))
}

fn new_id(kind: &str) -> String {
    format!("{kind}_{:032x}", rand::random::<u128>())
}

/// The messages of a chat that these items are.
pub(super) fn messages(items: &[Value]) -> Vec<Value> {
    let (mut messages, mut turn) = (Vec::new(), Turn::default());
    for item in items {
        match (item["type"].as_str().unwrap_or_default(), item["role"].as_str()) {
            ("reasoning", _) => {
                turn.end_unless(turn.content.is_none() && turn.calls.is_empty(), &mut messages);
                let parts = if joined(&item["content"]).is_empty() { &item["summary"] } else { &item["content"] };
                turn.reasoning.push(joined(parts));
            }
            ("message", Some("assistant")) => {
                turn.end_unless(turn.content.is_none() && turn.calls.is_empty(), &mut messages);
                turn.content = Some(joined(&item["content"]));
            }
            ("function_call", _) => {
                let function = json!({"name": item["name"], "arguments": item["arguments"]});
                turn.calls.push(json!({"id": item["call_id"], "type": "function", "function": function}));
            }
            (kind, role) => {
                turn.end_unless(false, &mut messages);
                messages.push(match kind {
                    "function_call_output" => {
                        json!({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
                    }
                    _ => json!({"role": role, "content": joined(&item["content"])}),
                });
            }
        }
    }
    turn.end_unless(false, &mut messages);
    messages
}

/// A turn of the assistant, as far as its items have been seen.
#[derive(Default)]
struct Turn {
    reasoning: Vec<String>,
    content: Option<String>,
    calls: Vec<Value>,
}

impl Turn {
    fn end_unless(&mut self, fits: bool, messages: &mut Vec<Value>) {
        if fits {
            return;
        }
        let Self { reasoning, content, calls } = std::mem::take(self);
        if reasoning.is_empty() && content.is_none() && calls.is_empty() {
            return;
        }
        let mut message = Map::new();
        message.insert("role".into(), "assistant".into());
        if !reasoning.is_empty() {
            message.insert("reasoning_content".into(), reasoning.join("\n").into());
        }
        let empty = if calls.is_empty() { Value::from("") } else { Value::Null };
        message.insert("content".into(), content.map_or(empty, Value::from));
        if !calls.is_empty() {
            message.insert("tool_calls".into(), calls.into());
        }
        messages.push(message.into());
    }
}

/// The texts of parts, as a chat joins them.
fn joined(parts: &Value) -> String {
    let texts = parts.as_array().into_iter().flatten().filter_map(|part| part["text"].as_str());
    texts.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_of_one_turn_are_one_message() {
        let items = json!([
            {"role": "user", "content": "add"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "use the tool"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I add."}]},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "2"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "3"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "done"}]},
            {"role": "assistant", "content": "2 and 3"},
            {"role": "assistant", "content": "really"},
            {"role": "developer", "content": "stop"},
        ]);
        let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "add", "arguments": "{}"}});
        let expected = json!([
            {"role": "user", "content": "add"},
            {"role": "assistant", "reasoning_content": "use the tool", "content": "I add.",
                "tool_calls": [call("c1"), call("c2")]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
            {"role": "tool", "tool_call_id": "c2", "content": "3"},
            {"role": "assistant", "reasoning_content": "done", "content": "2 and 3"},
            {"role": "assistant", "content": "really"},
            {"role": "developer", "content": "stop"},
        ]);
        let fields = Fields::new(Map::new());
        let read = read(&fields, items).unwrap();
        assert_eq!(Value::from(messages(&read)), expected);
        // What is kept can be read in again and means the same.
        let again = super::read(&fields, read.clone().into()).unwrap();
        assert_eq!(again, read);
    }
}
