//! Chat messages as a chat template wants them.
//!
//! What templates do not agree on is settled here: text parts are joined by line breaks, `developer` becomes
//! `system`, arguments of tool calls become objects, and reasoning goes by both its names.

use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::json;

/// Reads `messages`: an array of at least one message.
pub(crate) fn read(fields: &mut Fields, budget: &mut usize) -> Result<Vec<Value>, ApiError> {
    let messages = fields.array("messages")?;
    let messages = fields.required("messages", messages)?;
    if messages.is_empty() {
        return Err(ApiError::out_of_range("messages", "an array of at least one message"));
    }
    let last = messages.len() - 1;
    let read = |(i, value)| message(fields.item(format!("messages[{i}]"), value)?, i == last, budget);
    messages.into_iter().enumerate().map(read).collect()
}

/// Whether the last message is to be continued, in DeepSeek's word for it.
pub(crate) fn end_in_prefix(messages: &[Value]) -> bool {
    messages.last().is_some_and(|message| message.get(PREFIX).is_some())
}

const PREFIX: &str = "prefix";

const ROLES: &str = "system, developer, user, assistant or tool";

fn message(mut fields: Fields, is_last: bool, budget: &mut usize) -> Result<Value, ApiError> {
    let role = fields.string("role")?;
    let role = match fields.required("role", role)?.as_str() {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" => "tool",
        _ => return Err(ApiError::out_of_range(&fields.path("role"), ROLES)),
    };
    let mut out = Map::new();
    out.insert("role".into(), role.into());
    let mut content = content(&mut fields)?;
    let name = fields.string("name")?;

    let mut may_be_empty = false;
    if role == "assistant" {
        let reasoning = fields.string("reasoning_content")?;
        let reasoning = reasoning.or(fields.string("reasoning")?);
        let calls = tool_calls(&mut fields, budget)?;
        may_be_empty = calls.is_some();
        // Some templates write the calls only of a message without content, and clients send the empty one for it.
        content = content.filter(|content| !(may_be_empty && content.is_empty()));
        // What clients send back of our replies and others', without meaning for the template.
        for echoed in ["refusal", "annotations"] {
            fields.take(echoed);
        }
        if let Some(reasoning) = reasoning {
            out.insert("reasoning_content".into(), reasoning.as_str().into());
            out.insert("reasoning".into(), reasoning.into());
        }
        if let Some(calls) = calls {
            out.insert("tool_calls".into(), calls);
        }
    }
    if fields.bool(PREFIX)?.unwrap_or(false) {
        if role != "assistant" || !is_last {
            let message = "prefix is for the last message, if that is the assistant's";
            return Err(ApiError::invalid(&fields.path(PREFIX), message));
        }
        out.insert(PREFIX.into(), true.into());
    }
    if role == "tool" {
        let id = fields.string("tool_call_id")?;
        out.insert("tool_call_id".into(), fields.required("tool_call_id", id)?.into());
    }
    if content.is_none() && !may_be_empty {
        return Err(ApiError::missing(&fields.path("content")));
    }
    out.insert("content".into(), content.into());
    if let Some(name) = name {
        out.insert("name".into(), name.into());
    }
    fields.finish()?;
    Ok(Value::Object(out))
}

/// A string, or parts that are all text.
fn content(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let path = fields.path("content");
    let parts = match fields.take("content") {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(parts)) => parts,
        Some(_) => return Err(ApiError::wrong_type(&path, "a string or an array of parts")),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.into_iter().enumerate() {
        let mut part = fields.item(format!("{path}[{i}]"), part)?;
        let kind = part.string("type")?;
        match part.required("type", kind)?.as_str() {
            "text" => {}
            _ => return Err(ApiError::unsupported(&part.path("type"))),
        }
        let text = part.string("text")?;
        texts.push(part.required("text", text)?);
        part.finish()?;
    }
    Ok(Some(texts.join("\n")))
}

fn tool_calls(fields: &mut Fields, budget: &mut usize) -> Result<Option<Value>, ApiError> {
    let Some(calls) = fields.array("tool_calls")?.filter(|calls| !calls.is_empty()) else { return Ok(None) };
    let path = fields.path("tool_calls");
    let call = |(i, call)| {
        let mut call = fields.item(format!("{path}[{i}]"), call)?;
        let id = call.string("id")?;
        let id = call.required("id", id)?;
        match call.string("type")?.as_deref() {
            None | Some("function") => {}
            Some(_) => return Err(ApiError::unsupported(&call.path("type"))),
        }
        // Only streamed calls carry an index; some clients leave it in.
        call.take("index");
        let function = call.object("function")?;
        let mut function = call.required("function", function)?;
        call.finish()?;
        let name = function.string("name")?;
        let name = function.required("name", name)?;
        let arguments = arguments(&mut function, budget)?;
        function.finish()?;
        Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
    };
    calls.into_iter().enumerate().map(call).collect::<Result<Vec<_>, ApiError>>().map(|calls| Some(calls.into()))
}

/// Arguments as the object that they are the text of; text that is none stays text, the model wrote it.
fn arguments(function: &mut Fields, budget: &mut usize) -> Result<Value, ApiError> {
    let text = function.string("arguments")?;
    let text = function.required("arguments", text)?;
    Ok(json::parse_object(text.as_bytes(), budget).map_or(Value::String(text), Value::Object))
}
