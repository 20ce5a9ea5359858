//! Anthropic's messages as those of a chat.
//!
//! One of its messages may become several: results of tools are messages of their own in a chat, in the order in which
//! they stand. A last message of the assistant is continued.

use serde_json::{Map, Value, json};

use crate::dialect::texts;
use crate::error::ApiError;
use crate::fields::Fields;

/// Fields of a text block that change nothing of a prompt.
pub(super) const NO_EFFECT: &[&str] = &["cache_control", "citations"];

/// Messages of a chat.
pub(super) struct Messages {
    pub messages: Vec<Value>,
    /// The last one is to be continued.
    pub continues: bool,
}

/// Reads `messages`, behind the system prompt.
pub(super) fn read(fields: &mut Fields, system: Option<Vec<String>>) -> Result<Messages, ApiError> {
    let given = fields.array("messages")?;
    let given = fields.required("messages", given)?;
    let mut messages = Vec::with_capacity(given.len() + 1);
    if let Some(system) = system {
        messages.push(text_message("system", &system));
    }
    let mut continues = false;
    if given.is_empty() {
        return Err(ApiError::out_of_range("messages", "an array of at least one message"));
    }
    for (i, message) in given.into_iter().enumerate() {
        let mut message = fields.item(format!("messages[{i}]"), message)?;
        let role = message.string("role")?;
        let path = message.path("content");
        let content = message.take("content");
        let content = message.required("content", content)?;
        match message.required("role", role)?.as_str() {
            "user" => user(&message, content, &mut messages)?,
            "assistant" => messages.push(assistant(&message, content)?),
            "system" => messages.push(text_message("system", &texts(&message, &path, content, &["text"], NO_EFFECT)?)),
            _ => return Err(ApiError::out_of_range(&message.path("role"), "user, assistant or system")),
        }
        message.finish()?;
        let last = messages.last();
        continues = last.is_some_and(|last| last["role"] == "assistant" && last.get("tool_calls").is_none());
    }
    Ok(Messages { messages, continues })
}

/// Its parts are left to the chat to join.
fn text_message(role: &str, texts: &[String]) -> Value {
    let parts: Vec<_> = texts.iter().map(|text| json!({"type": "text", "text": text})).collect();
    json!({"role": role, "content": parts})
}

/// The blocks of a message's content; a text is one block.
fn blocks(message: &Fields, content: Value) -> Result<Vec<Value>, ApiError> {
    match content {
        Value::String(text) => Ok(vec![json!({"type": "text", "text": text})]),
        Value::Array(blocks) => Ok(blocks),
        _ => Err(ApiError::wrong_type(&message.path("content"), "a string or an array of blocks")),
    }
}

/// A block's type and its other fields.
fn block(message: &Fields, i: usize, block: Value) -> Result<(String, Fields), ApiError> {
    let mut block = message.item(format!("{}[{i}]", message.path("content")), block)?;
    block.take("cache_control");
    let kind = block.string("type")?;
    Ok((block.required("type", kind)?, block))
}

fn text_of(block: &mut Fields) -> Result<String, ApiError> {
    block.take("citations");
    let text = block.string("text")?;
    block.required("text", text)
}

fn user(message: &Fields, content: Value, out: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut text = Vec::new();
    for (i, value) in blocks(message, content)?.into_iter().enumerate() {
        let (kind, mut block) = block(message, i, value)?;
        match kind.as_str() {
            "text" => text.push(text_of(&mut block)?),
            "tool_result" => {
                if !text.is_empty() {
                    out.push(text_message("user", &std::mem::take(&mut text)));
                }
                out.push(tool_result(&mut block)?);
            }
            _ => return Err(ApiError::unsupported(&block.path("type"))),
        }
        block.finish()?;
    }
    // A message of results alone is complete; one of nothing at all is still a turn.
    if !text.is_empty() || out.last().is_none_or(|last| last["role"] != "tool") {
        out.push(text_message("user", &text));
    }
    Ok(())
}

fn tool_result(block: &mut Fields) -> Result<Value, ApiError> {
    let id = block.string("tool_use_id")?;
    let id = block.required("tool_use_id", id)?;
    // What went wrong is said by the content: chat templates have no place for the flag.
    block.bool("is_error")?;
    let path = block.path("content");
    let content = block.take("content");
    let content = content.map(|content| texts(block, &path, content, &["text"], NO_EFFECT));
    let Value::Object(mut message) = text_message("tool", &content.transpose()?.unwrap_or_default()) else {
        unreachable!("made as an object")
    };
    message.insert("tool_call_id".into(), id.into());
    Ok(message.into())
}

fn assistant(message: &Fields, content: Value) -> Result<Value, ApiError> {
    let (mut text, mut thinking, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for (i, value) in blocks(message, content)?.into_iter().enumerate() {
        let (kind, mut block) = block(message, i, value)?;
        match kind.as_str() {
            "text" => text.push(text_of(&mut block)?),
            "thinking" => {
                // Nothing is signed here.
                block.string("signature")?;
                let thought = block.string("thinking")?;
                thinking.push(block.required("thinking", thought)?);
            }
            "tool_use" => calls.push(tool_use(&mut block)?),
            _ => return Err(ApiError::unsupported(&block.path("type"))),
        }
        block.finish()?;
    }
    let mut out = Map::new();
    out.insert("role".into(), "assistant".into());
    thinking.retain(|thought| !thought.is_empty());
    if !thinking.is_empty() {
        out.insert("reasoning_content".into(), thinking.join("\n").into());
    }
    out.insert(
        "content".into(),
        if text.is_empty() && !calls.is_empty() { Value::Null } else { text.join("\n").into() },
    );
    if !calls.is_empty() {
        out.insert("tool_calls".into(), calls.into());
    }
    Ok(out.into())
}

fn tool_use(block: &mut Fields) -> Result<Value, ApiError> {
    let id = block.string("id")?;
    let id = block.required("id", id)?;
    let name = block.string("name")?;
    let name = block.required("name", name)?;
    let input = block.object("input")?;
    let input = Value::Object(block.required("input", input)?.into_rest()).to_string();
    block.take("caller");
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": input}}))
}
