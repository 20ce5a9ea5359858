//! The parameters that chat and completions share, and what becomes of all others.
//!
//! A field is read, or is on the no-effect list, or is refused by name: nothing that could change the output is
//! dropped silently.

use serde_json::Value;

use crate::error::ApiError;
use crate::fields::{Fields, integer, number};

/// Most stop strings.
const MAX_STOPS: usize = 4;
/// Longest stop string, in bytes.
const MAX_STOP_BYTES: usize = 1024;
/// Most stop token ids.
const MAX_STOP_TOKENS: usize = 128;
/// Most entries of `logit_bias`.
const MAX_BIASES: usize = 1024;
/// Most alternatives per token.
pub(crate) const MAX_TOP_LOGPROBS: i64 = 20;

/// Parameters of a generation as requested. `None`: not said.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Params {
    pub n: u32,
    pub max_tokens: Option<u32>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 for all.
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Ids are not checked against the vocabulary yet.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: Option<u64>,
    pub stop: Vec<String>,
    /// Ids are not checked against the vocabulary yet.
    pub stop_token_ids: Vec<u32>,
    pub min_tokens: u32,
    pub ignore_eos: bool,
    pub include_stop_str_in_output: bool,
    pub skip_special_tokens: bool,
    /// Scores of the chosen token and of this many most likely ones.
    pub logprobs: Option<u32>,
    pub cache_salt: Option<String>,
    pub stream: bool,
    pub include_usage: bool,
}

impl Params {
    /// Reads the shared fields. `max_n`: most choices per prompt.
    pub fn read(fields: &mut Fields, max_n: u32) -> Result<Self, ApiError> {
        let stream = fields.bool("stream")?.unwrap_or(false);
        let params = Self {
            n: fields.integer("n", 1..=i64::from(max_n))?.unwrap_or(1) as u32,
            max_tokens: fields.count("max_tokens", 1)?,
            temperature: fields.number("temperature", 0.0..=2.0)?,
            top_p: top_p(fields)?,
            // vLLM writes "all" as -1.
            top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| k.max(0) as u32),
            min_p: fields.number("min_p", 0.0..=1.0)?,
            repetition_penalty: fields.number("repetition_penalty", 0.01..=10.0)?,
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            logit_bias: logit_bias(fields)?,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
            stop: stop(fields)?,
            stop_token_ids: stop_token_ids(fields)?,
            min_tokens: fields.count("min_tokens", 0)?.unwrap_or(0),
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            include_stop_str_in_output: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
            skip_special_tokens: fields.bool("skip_special_tokens")?.unwrap_or(true),
            logprobs: None,
            cache_salt: cache_salt(fields)?,
            stream,
            include_usage: stream_options(fields, stream)?,
        };
        Ok(params)
    }

    /// Checks what depends on several fields, once all are read.
    pub fn checked(self) -> Result<Self, ApiError> {
        match self.max_tokens {
            Some(max) if self.min_tokens > max => {
                Err(ApiError::invalid("min_tokens", "min_tokens must not exceed max_tokens"))
            }
            _ => Ok(self),
        }
    }
}

fn top_p(fields: &mut Fields) -> Result<Option<f32>, ApiError> {
    match fields.number("top_p", 0.0..=1.0)? {
        Some(p) if p <= 0.0 => Err(ApiError::out_of_range("top_p", "above 0 and at most 1")),
        p => Ok(p),
    }
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(biases) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let biases = biases.into_rest();
    if biases.len() > MAX_BIASES {
        return Err(ApiError::out_of_range("logit_bias", format!("an object of at most {MAX_BIASES} entries")));
    }
    let entry = |(id, bias): (String, Value)| {
        let id =
            id.parse().map_err(|_| ApiError::invalid("logit_bias", "the names in logit_bias must be token ids"))?;
        Ok((id, number("logit_bias", &bias, -100.0..=100.0)?))
    };
    biases.into_iter().map(entry).collect()
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(one) => vec![one],
    };
    if stops.len() > MAX_STOPS {
        return Err(ApiError::out_of_range("stop", format!("at most {MAX_STOPS} strings")));
    }
    let text = |stop: Value| match stop {
        Value::String(text) if (1..=MAX_STOP_BYTES).contains(&text.len()) => Ok(text),
        Value::String(_) => Err(ApiError::out_of_range("stop", format!("strings of 1 to {MAX_STOP_BYTES} bytes"))),
        _ => Err(ApiError::wrong_type("stop", "a string or an array of strings")),
    };
    stops.into_iter().map(text).collect()
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
    let ids = fields.array("stop_token_ids")?.unwrap_or_default();
    if ids.len() > MAX_STOP_TOKENS {
        return Err(ApiError::out_of_range("stop_token_ids", format!("at most {MAX_STOP_TOKENS} ids")));
    }
    ids.iter().map(|id| token_id("stop_token_ids", id)).collect()
}

/// A token id, not checked against the vocabulary yet.
pub(crate) fn token_id(path: &str, value: &Value) -> Result<u32, ApiError> {
    Ok(integer(path, value, 0..=i64::from(u32::MAX))? as u32)
}

fn cache_salt(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let salt = fields.string("cache_salt")?;
    let fits = |s: &str| {
        (1..=128).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    match salt {
        Some(salt) if !fits(&salt) => {
            Err(ApiError::out_of_range("cache_salt", "1 to 128 letters, digits, hyphens and underscores"))
        }
        salt => Ok(salt),
    }
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        return Err(ApiError::invalid("stream_options", "stream_options is only allowed with stream: true"));
    }
    let include_usage = options.bool("include_usage")?.unwrap_or(false);
    // Padding against traffic analysis: accepted, not done.
    options.bool("include_obfuscation")?;
    options.finish()?;
    Ok(include_usage)
}

/// Fields without effect on the output, accepted with any value.
const NO_EFFECT: &[&str] =
    &["metadata", "user", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"];

/// Fields that are known here or elsewhere and would change the output.
const UNSUPPORTED: &[&str] = &[
    "add_special_tokens",
    "allowed_token_ids",
    "audio",
    "bad_words",
    "best_of",
    "chat_template",
    "deadline_ms",
    "documents",
    "echo",
    "function_call",
    "functions",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "length_penalty",
    "logits_processors",
    "mirostat",
    "mm_processor_kwargs",
    "modalities",
    "moderation",
    "parallel_tool_calls",
    "prediction",
    "priority",
    "prompt_logprobs",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "spaces_between_special_tokens",
    "store",
    "suffix",
    "tool_choice",
    "tools",
    "truncate_prompt_tokens",
    "typical_p",
    "use_beam_search",
    "verbosity",
    "web_search_options",
];

/// Whether a value of an unsupported field asks for nothing beyond what is done anyway.
fn is_neutral(name: &str, value: &Value) -> bool {
    match (name, value) {
        ("store" | "echo" | "use_beam_search" | "return_token_ids" | "return_tokens_as_token_ids", value) => {
            value == false
        }
        ("tools" | "functions" | "bad_words" | "documents", Value::Array(items)) => items.is_empty(),
        ("best_of", value) => value == 1,
        ("add_special_tokens" | "spaces_between_special_tokens", value) => value == true,
        ("modalities", Value::Array(kinds)) => kinds.len() == 1 && kinds[0] == "text",
        ("parallel_tool_calls", value) => value.is_boolean(),
        ("priority", value) => value == 0,
        ("suffix", value) => value == "",
        ("tool_choice", value) => value == "none" || value == "auto",
        ("function_call", value) => value == "none" || value == "auto",
        _ => false,
    }
}

/// Decides on the fields that no one read. The first that matters is refused, or, if `lenient`, all are returned.
pub(crate) fn refuse_rest(mut fields: Fields, lenient: bool) -> Result<Vec<String>, ApiError> {
    for name in NO_EFFECT {
        fields.take(name);
    }
    let mut ignored = Vec::new();
    for (name, value) in fields.into_rest() {
        let supported_elsewhere = UNSUPPORTED.contains(&name.as_str());
        if value.is_null() || (supported_elsewhere && is_neutral(&name, &value)) {
            continue;
        }
        if !lenient && supported_elsewhere {
            return Err(ApiError::unsupported(&name));
        }
        if !lenient {
            return Err(ApiError::unknown_parameter(&name));
        }
        ignored.push(name);
    }
    Ok(ignored)
}
