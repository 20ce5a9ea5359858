//! The parameters that chat and completions share, and what becomes of all others.
//!
//! A field is read, or is on the no-effect list, or is refused by name: nothing that could change the output is
//! dropped silently.

use std::time::Duration;

use serde_json::Value;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::openai::list_params;

/// Longest deadline: a day.
const MAX_DEADLINE_MS: i64 = 24 * 60 * 60 * 1000;
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
    /// Not encoded yet.
    pub bad_words: Vec<String>,
    /// The only ids to choose from, not checked against the vocabulary yet.
    pub allowed_token_ids: Option<Vec<u32>>,
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
    /// The same of each token of the prompt.
    pub prompt_logprobs: Option<u32>,
    /// Tell the ids of prompt and output.
    pub return_token_ids: bool,
    /// Write tokens among scores as `token_id:` and their id.
    pub return_tokens_as_token_ids: bool,
    /// BOS and EOS around an encoded prompt, where the tokenizer has them; each endpoint has its own default.
    pub add_special_tokens: Option<bool>,
    pub truncate: Option<Truncate>,
    /// Text, scores and ids of reasoning stay here.
    pub hide_reasoning: bool,
    /// The prompt comes before the output.
    pub echo: bool,
    /// How many choices are generated per prompt, of which the `n` likeliest are told: at least `n`.
    pub best_of: Option<u32>,
    /// Lower goes first.
    pub priority: i32,
    /// From arrival to the last token.
    pub deadline: Option<Duration>,
    pub cache_salt: Option<String>,
    pub stream: bool,
    pub include_usage: bool,
    /// With `include_usage`: every chunk tells the tokens so far.
    pub continuous_usage: bool,
}

/// How much of a prompt is kept: its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Truncate {
    /// What leaves room for the output.
    ToContext,
    /// So many tokens, at least one.
    To(u32),
}

impl Default for Params {
    /// What holds where a request says nothing.
    fn default() -> Self {
        Self {
            n: 1,
            max_tokens: None,
            temperature: None,
            top_p: None,
            top_k: None,
            min_p: None,
            repetition_penalty: None,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            bad_words: Vec::new(),
            allowed_token_ids: None,
            seed: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            ignore_eos: false,
            include_stop_str_in_output: false,
            skip_special_tokens: true,
            logprobs: None,
            prompt_logprobs: None,
            return_token_ids: false,
            return_tokens_as_token_ids: false,
            add_special_tokens: None,
            truncate: None,
            hide_reasoning: false,
            echo: false,
            best_of: None,
            priority: 0,
            deadline: None,
            cache_salt: None,
            stream: false,
            include_usage: false,
            continuous_usage: false,
        }
    }
}

impl Params {
    /// Reads the shared fields. `max_n`: most choices per prompt.
    pub fn read(fields: &mut Fields, max_n: u32) -> Result<Self, ApiError> {
        let stream = fields.bool("stream")?.unwrap_or(false);
        let (include_usage, continuous_usage) = stream_options(fields, stream)?;
        let deadline_ms = fields.integer("deadline_ms", 1..=MAX_DEADLINE_MS)?;
        let params = Self {
            n: fields.integer("n", 1..=i64::from(max_n))?.unwrap_or(1) as u32,
            max_tokens: fields.count("max_tokens", 0)?,
            temperature: fields.number("temperature", 0.0..=2.0)?,
            top_p: top_p(fields)?,
            // vLLM writes "all" as -1.
            top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| k.max(0) as u32),
            min_p: fields.number("min_p", 0.0..=1.0)?,
            repetition_penalty: fields.number("repetition_penalty", 0.01..=10.0)?,
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            logit_bias: list_params::logit_bias(fields)?,
            bad_words: list_params::bad_words(fields)?,
            allowed_token_ids: list_params::allowed_token_ids(fields)?,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
            stop: list_params::stop(fields)?,
            stop_token_ids: list_params::stop_token_ids(fields)?,
            min_tokens: fields.count("min_tokens", 0)?.unwrap_or(0),
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            include_stop_str_in_output: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
            skip_special_tokens: fields.bool("skip_special_tokens")?.unwrap_or(true),
            prompt_logprobs: fields.integer("prompt_logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|top| top as u32),
            return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
            return_tokens_as_token_ids: fields.bool("return_tokens_as_token_ids")?.unwrap_or(false),
            add_special_tokens: fields.bool("add_special_tokens")?,
            truncate: truncate(fields)?,
            priority: fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.unwrap_or(0) as i32,
            deadline: deadline_ms.map(|ms| Duration::from_millis(ms as u64)),
            cache_salt: cache_salt(fields)?,
            stream,
            include_usage,
            continuous_usage,
            ..Self::default()
        };
        Ok(params)
    }

    /// Checks what depends on several fields, once all are read.
    pub fn checked(self) -> Result<Self, ApiError> {
        if self.max_tokens == Some(0) && !self.echo {
            return Err(ApiError::out_of_range("max_tokens", "at least 1"));
        }
        if self.max_tokens.is_some_and(|max| self.min_tokens > max) {
            return Err(ApiError::invalid("min_tokens", "min_tokens must not exceed max_tokens"));
        }
        if self.stream && self.prompt_logprobs.is_some() {
            return Err(ApiError::invalid("prompt_logprobs", "prompt_logprobs cannot be combined with stream: true"));
        }
        Ok(self)
    }

    /// Choices that are generated per prompt.
    pub fn candidates(&self) -> u32 {
        self.best_of.unwrap_or(self.n)
    }
}

fn top_p(fields: &mut Fields) -> Result<Option<f32>, ApiError> {
    match fields.number("top_p", 0.0..=1.0)? {
        Some(p) if p <= 0.0 => Err(ApiError::out_of_range("top_p", "above 0 and at most 1")),
        p => Ok(p),
    }
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

/// `include_usage` and `continuous_usage_stats`.
fn stream_options(fields: &mut Fields, stream: bool) -> Result<(bool, bool), ApiError> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok((false, false)) };
    if !stream {
        return Err(ApiError::invalid("stream_options", "stream_options is only allowed with stream: true"));
    }
    let include_usage = options.bool("include_usage")?.unwrap_or(false);
    let continuous = options.bool("continuous_usage_stats")?.unwrap_or(false);
    if continuous && !include_usage {
        let message = "continuous_usage_stats needs include_usage: true";
        return Err(ApiError::invalid("stream_options.continuous_usage_stats", message));
    }
    // Padding against traffic analysis: accepted, not done.
    options.bool("include_obfuscation")?;
    options.finish()?;
    Ok((include_usage, continuous))
}

fn truncate(fields: &mut Fields) -> Result<Option<Truncate>, ApiError> {
    match fields.integer("truncate_prompt_tokens", -1..=i64::from(u32::MAX))? {
        Some(0) => Err(ApiError::out_of_range("truncate_prompt_tokens", "at least 1, or -1 for what fits")),
        Some(-1) => Ok(Some(Truncate::ToContext)),
        kept => Ok(kept.map(|kept| Truncate::To(kept as u32))),
    }
}

/// Fields without effect on the output, accepted with any value.
pub(crate) const NO_EFFECT: &[&str] = &[
    "cache_prompt",
    "id_slot",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
];

/// Fields that are known here or elsewhere and would change the output.
pub(crate) const UNSUPPORTED: &[&str] = &[
    "audio",
    "best_of",
    "chat_template",
    "documents",
    "dry_multiplier",
    "dynatemp_range",
    "echo",
    "function_call",
    "functions",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "kv_transfer_params",
    "length_penalty",
    "logits_processors",
    "mirostat",
    "mm_processor_kwargs",
    "modalities",
    "moderation",
    "n_keep",
    "n_predict",
    "n_probs",
    "parallel_tool_calls",
    "post_sampling_probs",
    "prediction",
    "prompt_embeds",
    "reasoning_format",
    "repeat_last_n",
    "repeat_penalty",
    "request_id",
    "return_progress",
    "samplers",
    "spaces_between_special_tokens",
    "store",
    "suffix",
    "thinking_budget_tokens",
    "thinking_token_budget",
    "timings_per_token",
    "tool_choice",
    "tools",
    "top_n_sigma",
    "typical_p",
    "use_beam_search",
    "verbosity",
    "vllm_xargs",
    "web_search_options",
    "xtc_probability",
];

/// Whether a value of an unsupported field asks for nothing beyond what is done anyway.
fn is_neutral(name: &str, value: &Value) -> bool {
    match (name, value) {
        ("store" | "echo" | "use_beam_search" | "post_sampling_probs", value) => value == false,
        ("timings_per_token" | "return_progress", value) => value == false,
        ("tools" | "functions" | "documents", Value::Array(items)) => items.is_empty(),
        ("best_of" | "length_penalty" | "repeat_penalty" | "typical_p", value) => value.as_f64() == Some(1.0),
        ("dry_multiplier" | "dynatemp_range" | "mirostat" | "xtc_probability", value) => value.as_f64() == Some(0.0),
        ("spaces_between_special_tokens", value) => value == true,
        ("reasoning_format", value) => value == "auto" || value == "deepseek",
        ("verbosity", value) => value == "medium",
        ("modalities", Value::Array(kinds)) => kinds.len() == 1 && kinds[0] == "text",
        ("parallel_tool_calls", value) => value.is_boolean(),
        ("suffix", value) => value == "",
        ("tool_choice", value) => value == "none" || value == "auto",
        ("function_call", value) => value == "none" || value == "auto",
        _ => false,
    }
}

/// Decides on the fields that no one read: refuses the first that matters or, if `lenient`, returns all that were
/// ignored, those inside of objects that were read leniently included.
pub(crate) fn refuse_rest(fields: Fields, lenient: bool) -> Result<Vec<String>, ApiError> {
    let mut fields = fields.lenient(lenient);
    for name in NO_EFFECT {
        fields.take(name);
    }
    let names: Vec<String> = fields.rest().map(str::to_owned).collect();
    for name in names {
        if !UNSUPPORTED.contains(&name.as_str()) {
            fields.ignore(&name, ApiError::unknown_parameter)?;
        } else if fields.take(&name).is_some_and(|value| !is_neutral(&name, &value)) {
            fields.ignore(&name, ApiError::unsupported)?;
        }
    }
    Ok(fields.ignored())
}
