//! The request of `/v1/messages`, as a chat.

use serde_json::{Map, Value, json};

use crate::anthropic::messages;
use crate::dialect::{Known, Translation, texts, word};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::openai::chat_request::ChatRequest;
use crate::service::ServiceConfig;

/// A checked request, and what its reply needs to know.
pub(crate) struct MessageRequest {
    pub chat: ChatRequest,
    /// Thinking is not shown, only that there was some.
    pub omit_thinking: bool,
}

const KNOWN: Known = Known {
    no_effect: &["cache_control", "diagnostics", "inference_geo", "metadata", "service_tier"],
    unsupported: &["container", "context_management", "mcp_servers", "user_profile_id"],
};

impl MessageRequest {
    /// Reads the body. `budget`: as for chat. `counts`: nothing is generated, so that `max_tokens` may be absent.
    pub fn read(
        body: Map<String, Value>,
        config: &ServiceConfig,
        budget: &mut usize,
        counts: bool,
    ) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body);
        let mut chat = Translation::default();
        for same in ["model", "stream", "temperature", "top_p", "top_k"] {
            chat.pass(&mut fields, same, same);
        }
        let max_tokens = fields.count("max_tokens", 1)?;
        if !counts {
            chat.set("max_tokens", fields.required("max_tokens", max_tokens)?);
        }
        if let Some(stops) = fields.array("stop_sequences")? {
            chat.set("stop", stops);
        }
        if word(&mut fields, "speed", &["standard", "fast"])? == Some("fast") {
            return Err(ApiError::unsupported("speed"));
        }

        let system = fields.take("system").map(|system| texts("system", system, &["text"], messages::NO_EFFECT));
        let read = messages::read(&mut fields, system.transpose()?)?;
        chat.set("messages", read.messages);
        if read.continues {
            chat.set("continue_final_message", true);
        }
        let omit_thinking = thinking(&mut fields, &mut chat)?;
        output_config(&mut fields, &mut chat)?;
        tools(&mut fields, &mut chat)?;
        let chat = chat.read(fields, &KNOWN, their_name, config, budget)?;
        Ok(Self { chat, omit_thinking })
    }
}

/// A chat field's path in the words of this dialect.
fn their_name(param: &str) -> String {
    if let Some(rest) = param.strip_prefix("tools[") {
        return format!("tools[{rest}").replace(".function.parameters", ".input_schema").replace(".function", "");
    }
    let names = [
        ("stop", "stop_sequences"),
        ("thinking_token_budget", "thinking.budget_tokens"),
        ("reasoning_effort", "output_config.effort"),
        ("response_format", "output_config.format"),
        ("parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
    ];
    names.iter().find(|(ours, _)| *ours == param).map_or(param, |(_, theirs)| theirs).to_owned()
}

/// Sets whether the model thinks and for how long; as with Anthropic, it does not unless it is asked to. True if its
/// thinking is not to be shown.
fn thinking(fields: &mut Fields, chat: &mut Translation) -> Result<bool, ApiError> {
    let Some(mut thinking) = fields.object("thinking")? else {
        chat.set("thinking", json!({"type": "disabled"}));
        return Ok(false);
    };
    let kind = word(&mut thinking, "type", &["enabled", "adaptive", "disabled"])?;
    let kind = thinking.required("type", kind)?;
    if kind == "enabled" {
        let budget = thinking.count("budget_tokens", 1)?;
        chat.set("thinking_token_budget", thinking.required("budget_tokens", budget)?);
    }
    let on = kind != "disabled";
    chat.set("thinking", json!({"type": if on { "enabled" } else { "disabled" }}));
    // The thinking itself stands for a summary of it.
    let display = if on { word(&mut thinking, "display", &["summarized", "omitted"])? } else { None };
    thinking.finish()?;
    Ok(display == Some("omitted"))
}

/// `output_config`, and the older place of its format.
fn output_config(fields: &mut Fields, chat: &mut Translation) -> Result<(), ApiError> {
    let older = fields.object("output_format")?;
    let mut format = older;
    if let Some(mut config) = fields.object("output_config")? {
        chat.pass(&mut config, "effort", "reasoning_effort");
        format = config.object("format")?.or(format);
        config.finish()?;
    }
    let Some(mut format) = format else { return Ok(()) };
    let kind = word(&mut format, "type", &["json_schema"])?;
    format.required("type", kind)?;
    let schema = format.take("schema");
    let schema = format.required("schema", schema)?;
    format.finish()?;
    let schema = json!({"name": "output", "schema": schema, "strict": true});
    chat.set("response_format", json!({"type": "json_schema", "json_schema": schema}));
    Ok(())
}

fn tools(fields: &mut Fields, chat: &mut Translation) -> Result<(), ApiError> {
    if let Some(tools) = fields.array("tools")? {
        let tools = tools.into_iter().enumerate().map(|(i, tool)| self::tool(Fields::of(format!("tools[{i}]"), tool)?));
        chat.set("tools", tools.collect::<Result<Vec<_>, _>>()?);
    }
    let Some(mut choice) = fields.object("tool_choice")? else { return Ok(()) };
    let kind = word(&mut choice, "type", &["auto", "any", "tool", "none"])?;
    let value = match choice.required("type", kind)? {
        "tool" => {
            let name = choice.string("name")?;
            json!({"type": "function", "function": {"name": choice.required("name", name)?}})
        }
        "any" => "required".into(),
        kind => kind.into(),
    };
    if kind != Some("none")
        && let Some(single) = choice.bool("disable_parallel_tool_use")?
    {
        chat.set("parallel_tool_calls", !single);
    }
    choice.finish()?;
    chat.set("tool_choice", value);
    Ok(())
}

/// A tool of the client's own; those that Anthropic runs are refused by their type.
fn tool(mut tool: Fields) -> Result<Value, ApiError> {
    if tool.string("type")?.is_some_and(|kind| kind != "custom") {
        return Err(ApiError::unsupported(&tool.path("type")));
    }
    let name = tool.string("name")?;
    let mut function = Map::new();
    function.insert("name".into(), tool.required("name", name)?.into());
    if let Some(description) = tool.string("description")? {
        function.insert("description".into(), description.into());
    }
    let schema = tool.take("input_schema");
    function.insert("parameters".into(), tool.required("input_schema", schema)?);
    if let Some(strict) = tool.bool("strict")? {
        function.insert("strict".into(), strict.into());
    }
    for name in ["cache_control", "eager_input_streaming"] {
        tool.take(name);
    }
    for name in ["allowed_callers", "defer_loading", "input_examples"] {
        if tool.take(name).is_some_and(|value| value != false) {
            return Err(ApiError::unsupported(&tool.path(name)));
        }
    }
    tool.finish()?;
    Ok(json!({"type": "function", "function": function}))
}
