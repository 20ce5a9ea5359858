//! The request of `/v1/chat/completions`.

use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::{Fields, integer};
use crate::openai::messages;
use crate::openai::params::{MAX_TOP_LOGPROBS, Params, refuse_rest};
use crate::openai::structured::Structured;
use crate::openai::thinking::{self, Effort};
use crate::openai::tools::Tools;

/// A chat request within every range that does not depend on the model.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub model: Option<String>,
    /// The field that holds the messages.
    pub field: &'static str,
    /// As the template takes them.
    pub messages: Vec<Value>,
    pub add_generation_prompt: bool,
    pub continue_final_message: bool,
    pub template_kwargs: Map<String, Value>,
    /// How hard to think, in the template's own word, if `template_kwargs` does not say.
    pub effort: Option<Effort>,
    pub tools: Tools,
    pub params: Params,
    /// The form that the answer must have.
    pub structured: Option<Structured>,
    /// Most tokens of reasoning.
    pub thinking_budget: Option<u32>,
    /// Fields that are without effect only because the server is lenient.
    pub ignored: Vec<String>,
}

impl ChatRequest {
    /// Reads the body. `budget`: JSON values that may still be read, for documents inside strings.
    pub fn read(body: Map<String, Value>, max_n: u32, lenient: bool, budget: &mut usize) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body).lenient(lenient);
        let model = fields.string("model")?;
        let messages = messages::read(&mut fields, budget)?;
        let in_prefix = messages::end_in_prefix(&messages);
        let continue_final_message = fields.bool("continue_final_message")?.unwrap_or(in_prefix);
        let add_generation_prompt = fields.bool("add_generation_prompt")?.unwrap_or(!continue_final_message);
        if continue_final_message && add_generation_prompt {
            let message = "continue_final_message cannot be combined with add_generation_prompt";
            return Err(ApiError::invalid("continue_final_message", message));
        }
        let thinking = thinking::thinking(&mut fields)?;
        let effort = Effort::read(&mut fields, "reasoning_effort")?;
        let template_kwargs = template_kwargs(&mut fields, thinking, effort)?;
        let tools = Tools::read(&mut fields)?;
        let thinking_budget = thinking_budget(&mut fields, &template_kwargs)?;
        let structured = Structured::read(&mut fields, budget)?;

        let mut params = Params::read(&mut fields, max_n)?;
        params.logprobs = logprobs(&mut fields)?;
        params.hide_reasoning = !fields.bool("include_reasoning")?.unwrap_or(true);
        match (params.max_tokens, fields.count("max_completion_tokens", 1)?) {
            (Some(old), Some(new)) if old != new => {
                let message = "max_tokens and max_completion_tokens are synonyms and must not differ";
                return Err(ApiError::invalid("max_completion_tokens", message));
            }
            (old, new) => params.max_tokens = new.or(old),
        }
        let params = params.checked()?;
        let ignored = refuse_rest(fields, lenient)?;
        Ok(Self {
            model,
            field: "messages",
            messages,
            add_generation_prompt,
            continue_final_message,
            template_kwargs,
            effort: effort.filter(|effort| *effort != Effort::None),
            tools,
            params,
            structured,
            thinking_budget,
            ignored,
        })
    }
}

fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    match fields.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)? {
        Some(_) if !wanted => Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs: true")),
        top => Ok(wanted.then_some(top.unwrap_or(0) as u32)),
    }
}

/// vLLM's `thinking_token_budget`, or Qwen's `thinking_budget` among the arguments of the template.
fn thinking_budget(fields: &mut Fields, kwargs: &Map<String, Value>) -> Result<Option<u32>, ApiError> {
    const KWARG: &str = "chat_template_kwargs.thinking_budget";
    let given = fields.count("thinking_token_budget", 0)?;
    let Some(value) = kwargs.get("thinking_budget") else { return Ok(given) };
    let budget = integer(KWARG, value, 0..=i64::from(u32::MAX))? as u32;
    if given.is_some_and(|given| given != budget) {
        let message = format!("thinking_token_budget and {KWARG} must not differ");
        return Err(ApiError::invalid(KWARG, message));
    }
    Ok(Some(budget))
}

/// Most entries of `chat_template_kwargs`.
const MAX_KWARGS: usize = 32;
/// Longest name or string there, in bytes.
const MAX_KWARG_BYTES: usize = 256;

/// `chat_template_kwargs`, with what the request says about thinking in other words. The former win.
fn template_kwargs(
    fields: &mut Fields,
    thinking: Option<bool>,
    effort: Option<Effort>,
) -> Result<Map<String, Value>, ApiError> {
    let mut kwargs = Map::new();
    // Who asks for an effort asks for thinking.
    if let Some(on) = thinking.or(effort.map(|_| true)) {
        thinking::switch(&mut kwargs, on && effort != Some(Effort::None));
    }
    let given = fields.object("chat_template_kwargs")?.map(Fields::into_rest).unwrap_or_default();
    if given.len() > MAX_KWARGS {
        let accepted = format!("an object of at most {MAX_KWARGS} entries");
        return Err(ApiError::out_of_range("chat_template_kwargs", accepted));
    }
    for (name, value) in given {
        let is_name = name.len() <= MAX_KWARG_BYTES && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        let is_plain = match &value {
            Value::Null => continue,
            Value::Bool(_) | Value::Number(_) => true,
            Value::String(text) => text.len() <= MAX_KWARG_BYTES,
            _ => false,
        };
        if !is_name || !is_plain {
            let accepted = format!("booleans, numbers and strings of at most {MAX_KWARG_BYTES} bytes, by plain names");
            return Err(ApiError::out_of_range("chat_template_kwargs", accepted));
        }
        kwargs.insert(name, value);
    }
    Ok(kwargs)
}
