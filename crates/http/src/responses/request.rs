//! The request of `/v1/responses`, as a chat, and what its reply repeats of it.

use serde_json::{Map, Value, json};

use crate::dialect::{Known, Translation, word};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::openai::chat_request::ChatRequest;
use crate::openai::metadata;
use crate::openai::params::{MAX_TOP_LOGPROBS, Params};
use crate::responses::input;
use crate::service::ServiceConfig;

/// Whether a response is kept, and what it goes on from.
#[derive(Debug, Clone)]
pub(crate) struct Keeping {
    pub store: bool,
    pub background: bool,
    pub previous: Option<String>,
}

impl Keeping {
    /// Reads what has to be known before anything else. `can_store`: there is a place to keep responses in.
    pub fn read(fields: &mut Fields, can_store: bool) -> Result<Self, ApiError> {
        let store = fields.bool("store")?;
        let background = fields.bool("background")?.unwrap_or(false);
        let previous = fields.string("previous_response_id")?;
        let wanted =
            [("store", store == Some(true)), ("background", background), ("previous_response_id", previous.is_some())];
        if let Some((name, _)) = wanted.iter().find(|(_, wanted)| *wanted && !can_store) {
            return Err(ApiError::needs_state_dir(name));
        }
        if background && store == Some(false) {
            return Err(ApiError::invalid("background", "background needs store: true"));
        }
        Ok(Self { store: store.unwrap_or(can_store), background, previous })
    }
}

/// A checked request, and what its reply needs to know.
pub(crate) struct ResponseRequest {
    pub chat: ChatRequest,
    /// The request's own items.
    pub input: Vec<Value>,
    pub shown: Shown,
}

/// What a response says of its request, besides [`Keeping`].
pub(crate) struct Shown {
    /// Fields of the response object.
    pub echo: Map<String, Value>,
    pub params: Params,
    /// Reasoning is shown as its own summary.
    pub summary: bool,
}

const KNOWN: Known = Known {
    no_effect: &["prompt_cache_options", "prompt_cache_retention"],
    unsupported: &[
        "access_programs",
        "background_options",
        "context_management",
        "conversation",
        "image",
        "moderation",
        "prompt",
        "stop",
    ],
};

impl ResponseRequest {
    /// Reads the fields. `history`: items of the conversation before those of the request; `budget`: as for chat.
    pub fn read(
        mut fields: Fields,
        history: &[Value],
        background: bool,
        config: &ServiceConfig,
        budget: &mut usize,
    ) -> Result<Self, ApiError> {
        let (mut chat, mut echo) = (Translation::default(), Map::new());
        chat.pass(&mut fields, "model", "model");
        let instructions = fields.string("instructions")?;
        let given = fields.take("input");
        let input = input::read(&fields, fields.required("input", given)?)?;
        let mut messages = input::messages(&[history, &input].concat());
        if messages.is_empty() {
            return Err(ApiError::out_of_range("input", "at least one item"));
        }
        if let Some(instructions) = &instructions {
            messages.insert(0, json!({"role": "system", "content": instructions}));
        }
        chat.set("messages", messages);

        let stream = fields.bool("stream")?.unwrap_or(false);
        if stream && background {
            return Err(ApiError::invalid("stream", "stream cannot be combined with background; ask for the response"));
        }
        chat.set("stream", stream);
        if let Some(mut options) = fields.object("stream_options")? {
            if !stream {
                return Err(ApiError::invalid("stream_options", "stream_options is only allowed with stream: true"));
            }
            // Padding against traffic analysis: accepted, not done.
            options.bool("include_obfuscation")?;
            options.finish()?;
        }
        chat.pass(&mut fields, "temperature", "temperature");
        chat.pass(&mut fields, "top_p", "top_p");
        chat.pass(&mut fields, "top_k", "top_k");
        let max_output_tokens = fields.count("max_output_tokens", 1)?;
        if let Some(tokens) = max_output_tokens {
            chat.set("max_tokens", tokens);
        }
        if word(&mut fields, "truncation", &["disabled", "auto"])? == Some("auto") {
            return Err(ApiError::unsupported("truncation"));
        }
        let (logprobs, top_logprobs) = logprobs(&mut fields)?;
        if logprobs {
            chat.set("logprobs", true);
            chat.set("top_logprobs", top_logprobs);
        }

        echo.insert("instructions".into(), instructions.into());
        echo.insert("max_output_tokens".into(), max_output_tokens.into());
        // Only tools that the server runs count, and there are none.
        echo.insert("max_tool_calls".into(), fields.count("max_tool_calls", 1)?.into());
        echo.insert("metadata".into(), metadata::read(&mut fields)?.unwrap_or_default().into());
        echo.insert("parallel_tool_calls".into(), parallel(&mut fields, &mut chat)?.into());
        let (reasoning, summary) = reasoning(&mut fields, &mut chat)?;
        echo.insert("reasoning".into(), reasoning);
        word(&mut fields, "service_tier", &["auto", "default", "flex", "scale", "priority"])?;
        echo.insert("service_tier".into(), "default".into());
        echo.insert("text".into(), text(&mut fields, &mut chat)?);
        echo.insert("tool_choice".into(), tool_choice(&mut fields, &mut chat)?);
        echo.insert("tools".into(), tools(&mut fields, &mut chat)?);
        echo.insert("top_logprobs".into(), top_logprobs.into());
        echo.insert("truncation".into(), "disabled".into());
        for name in ["prompt_cache_key", "safety_identifier", "user"] {
            echo.insert(name.into(), fields.string(name)?.into());
        }
        let mut chat = chat.read(fields, &KNOWN, their_name, config, budget)?;
        chat.field = "input";
        let shown = Shown { echo, params: chat.params.clone(), summary };
        Ok(Self { chat, input, shown })
    }
}

/// A chat field's path in the words of this dialect.
pub(crate) fn their_name(param: &str) -> String {
    match param {
        "max_tokens" => return "max_output_tokens".into(),
        "reasoning_effort" => return "reasoning.effort".into(),
        _ => {}
    }
    let rest = |prefix: &str| param.strip_prefix(prefix).filter(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
    if rest("messages").is_some() {
        return "input".into();
    }
    for (ours, theirs) in [("response_format.json_schema", "text.format"), ("response_format", "text.format")] {
        if let Some(rest) = rest(ours) {
            return format!("{theirs}{rest}");
        }
    }
    if rest("tools").is_some() || rest("tool_choice").is_some() {
        return param.replace(".function", "");
    }
    param.to_owned()
}

/// `include` and `top_logprobs`: whether scores are wanted, and how many alternatives.
fn logprobs(fields: &mut Fields) -> Result<(bool, i64), ApiError> {
    let mut wanted = false;
    for item in fields.array("include")?.unwrap_or_default() {
        match item.as_str() {
            Some("message.output_text.logprobs") => wanted = true,
            // Reasoning is sent in clear: nothing needs encryption to come back.
            Some("reasoning.encrypted_content") => {}
            _ => {
                let accepted = "an array of message.output_text.logprobs and reasoning.encrypted_content";
                return Err(ApiError::out_of_range("include", accepted));
            }
        }
    }
    match fields.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?.unwrap_or(0) {
        top if top > 0 && !wanted => {
            let message = "top_logprobs needs message.output_text.logprobs in include";
            Err(ApiError::invalid("top_logprobs", message))
        }
        top => Ok((wanted, top)),
    }
}

fn parallel(fields: &mut Fields, chat: &mut Translation) -> Result<bool, ApiError> {
    let parallel = fields.bool("parallel_tool_calls")?;
    if let Some(parallel) = parallel {
        chat.set("parallel_tool_calls", parallel);
    }
    Ok(parallel.unwrap_or(true))
}

/// `reasoning` as it is repeated, and whether the reasoning is wanted as a summary.
fn reasoning(fields: &mut Fields, chat: &mut Translation) -> Result<(Value, bool), ApiError> {
    let Some(mut reasoning) = fields.object("reasoning")? else {
        return Ok((json!({"effort": null, "summary": null}), false));
    };
    let effort = reasoning.string("effort")?;
    if let Some(effort) = &effort {
        chat.set("reasoning_effort", effort.as_str());
    }
    // Nobody writes summaries here: the reasoning is as detailed as one can be, and anything but concise.
    let older = word(&mut reasoning, "generate_summary", &["auto", "detailed"])?;
    let summary = word(&mut reasoning, "summary", &["auto", "detailed"])?.or(older);
    reasoning.finish()?;
    Ok((json!({"effort": effort, "summary": summary}), summary.is_some()))
}

/// `text` as it is repeated; its format becomes the chat's.
fn text(fields: &mut Fields, chat: &mut Translation) -> Result<Value, ApiError> {
    let plain = json!({"format": {"type": "text"}, "verbosity": "medium"});
    let Some(mut text) = fields.object("text")? else { return Ok(plain) };
    word(&mut text, "verbosity", &["medium"])?;
    let format = text.object("format")?;
    text.finish()?;
    let Some(mut format) = format else { return Ok(plain) };
    let kind = word(&mut format, "type", &["text", "json_object", "json_schema"])?;
    let kind = format.required("type", kind)?;
    let mut shown = json!({"type": kind});
    match kind {
        "text" => {}
        "json_object" => chat.set("response_format", json!({"type": kind})),
        _ => {
            let mut schema = Map::new();
            let name = format.string("name")?;
            schema.insert("name".into(), format.required("name", name)?.into());
            if let Some(description) = format.string("description")? {
                schema.insert("description".into(), description.into());
            }
            let given = format.take("schema");
            schema.insert("schema".into(), format.required("schema", given)?);
            schema.insert("strict".into(), format.bool("strict")?.unwrap_or(false).into());
            shown.as_object_mut().expect("made as one").extend(schema.clone());
            chat.set("response_format", json!({"type": kind, "json_schema": schema}));
        }
    }
    format.finish()?;
    Ok(json!({"format": shown, "verbosity": "medium"}))
}

/// `tool_choice` as it is repeated.
fn tool_choice(fields: &mut Fields, chat: &mut Translation) -> Result<Value, ApiError> {
    let mut choice = match fields.take("tool_choice") {
        None => return Ok("auto".into()),
        Some(Value::String(word)) => {
            if !["none", "auto", "required"].contains(&word.as_str()) {
                return Err(ApiError::out_of_range("tool_choice", "none, auto, required or an object"));
            }
            chat.set("tool_choice", word.as_str());
            return Ok(word.into());
        }
        Some(value) => fields.item("tool_choice".into(), value)?,
    };
    let kind = choice.string("type")?;
    match choice.required("type", kind)?.as_str() {
        "function" => {
            let name = function_name(choice)?;
            chat.set("tool_choice", json!({"type": "function", "function": {"name": name}}));
            Ok(json!({"type": "function", "name": name}))
        }
        "allowed_tools" => {
            let mode = word(&mut choice, "mode", &["auto", "required"])?;
            let mode = choice.required("mode", mode)?;
            let tools = choice.array("tools")?;
            let tools = choice.required("tools", tools)?;
            choice.finish()?;
            let (mut shown, mut allowed) = (Vec::new(), Vec::new());
            for (i, tool) in tools.into_iter().enumerate() {
                let mut tool = choice.item(format!("tool_choice.tools[{i}]"), tool)?;
                let kind = word(&mut tool, "type", &["function"])?;
                tool.required("type", kind)?;
                let name = function_name(tool)?;
                shown.push(json!({"type": "function", "name": name}));
                allowed.push(json!({"type": "function", "function": {"name": name}}));
            }
            let inner = json!({"mode": mode, "tools": allowed});
            chat.set("tool_choice", json!({"type": "allowed_tools", "allowed_tools": inner}));
            Ok(json!({"type": "allowed_tools", "mode": mode, "tools": shown}))
        }
        _ => Err(ApiError::unsupported("tool_choice.type")),
    }
}

/// The name, behind which nothing else may be said.
fn function_name(mut fields: Fields) -> Result<String, ApiError> {
    let name = fields.string("name")?;
    let name = fields.required("name", name)?;
    fields.finish()?;
    Ok(name)
}

/// `tools` as they are repeated: functions of the client. Those that OpenAI runs are refused by their type.
fn tools(fields: &mut Fields, chat: &mut Translation) -> Result<Value, ApiError> {
    let Some(tools) = fields.array("tools")?.filter(|tools| !tools.is_empty()) else { return Ok(json!([])) };
    let (mut shown, mut functions) = (Vec::new(), Vec::new());
    for (i, tool) in tools.into_iter().enumerate() {
        let mut tool = fields.item(format!("tools[{i}]"), tool)?;
        let kind = tool.string("type")?;
        if tool.required("type", kind)? != "function" {
            return Err(ApiError::unsupported(&tool.path("type")));
        }
        let name = tool.string("name")?;
        let name = tool.required("name", name)?;
        let (description, parameters) = (tool.string("description")?, tool.take("parameters"));
        let strict = tool.bool("strict")?.unwrap_or(false);
        for name in ["allowed_callers", "async", "defer_loading", "output_schema"] {
            if tool.take(name).is_some_and(|value| value != false) {
                return Err(ApiError::unsupported(&tool.path(name)));
            }
        }
        tool.finish()?;
        shown.push(json!({"type": "function", "name": name, "description": description, "parameters": parameters,
            "strict": strict}));
        let mut function = json!({"name": name, "strict": strict});
        if let Some(description) = description {
            function["description"] = description.into();
        }
        if let Some(parameters) = parameters {
            function["parameters"] = parameters;
        }
        functions.push(json!({"type": "function", "function": function}));
    }
    chat.set("tools", functions);
    Ok(shown.into())
}
