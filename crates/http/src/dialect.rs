//! What the dialects besides OpenAI's chat have in common: each translates its request into a chat request in chat's
//! own words, so that every rule of the values is in one place, and says in its own words what is wrong with it.

use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::openai::chat_request::ChatRequest;
use crate::service::ServiceConfig;

/// Fields of the chat request that no dialect has a word of its own for, and that mean the same in all.
pub(crate) const EXTENSIONS: &[&str] = &[
    "allowed_token_ids",
    "bad_words",
    "cache_salt",
    "chat_template_kwargs",
    "deadline_ms",
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "priority",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "stop_token_ids",
    "structured_outputs",
    "truncate_prompt_tokens",
];

/// A request in the words of chat, while it is being translated.
#[derive(Default)]
pub(crate) struct Translation(Map<String, Value>);

impl Translation {
    /// Sets a field of the chat request.
    pub fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.into(), value.into());
    }

    /// Sets a field that the dialect has under its own name, if it is there.
    pub fn pass(&mut self, fields: &mut Fields, theirs: &str, ours: &str) {
        if let Some(value) = fields.take(theirs) {
            self.set(ours, value);
        }
    }

    /// Reads the chat request. `fields`: what is left of the dialect's own, of which the extensions are taken over and
    /// the rest refused unless it is `known` to have no effect. `rename` gives a chat field's path in the dialect.
    pub fn read(
        mut self,
        mut fields: Fields,
        known: &Known,
        rename: impl Fn(&str) -> String,
        config: &ServiceConfig,
        budget: &mut usize,
    ) -> Result<ChatRequest, ApiError> {
        for name in EXTENSIONS {
            self.pass(&mut fields, name, name);
        }
        for name in known.no_effect {
            fields.take(name);
        }
        for name in known.unsupported {
            fields.take_if(name, |value| matches!(value, Value::Array(items) if items.is_empty()));
        }
        for name in fields.rest() {
            let unsupported = known.unsupported.contains(&name);
            fields.ignore(name, if unsupported { ApiError::unsupported } else { ApiError::unknown_parameter })?;
        }
        let mut request = ChatRequest::read(self.0, config.max_n, config.lenient, budget)
            .map_err(|error| error.renamed(|param| rename(param)))?;
        request.ignored.extend(fields.ignored());
        Ok(request)
    }
}

/// What becomes of the fields of a dialect that nobody read.
pub(crate) struct Known {
    /// Accepted with any value.
    pub no_effect: &'static [&'static str],
    /// Would change the output, unless empty.
    pub unsupported: &'static [&'static str],
}

/// A text, or an array of parts that are all of this type. The parts' texts, in order. `no_effect`: fields of a part
/// that are accepted with any value; `parent`: what it stands in, at `path`.
pub(crate) fn texts(
    parent: &Fields,
    path: &str,
    value: Value,
    kinds: &[&str],
    no_effect: &[&str],
) -> Result<Vec<String>, ApiError> {
    match value {
        Value::String(text) => Ok(vec![text]),
        Value::Array(parts) => {
            let part = |(i, part)| text_part(parent.item(format!("{path}[{i}]"), part)?, kinds, no_effect);
            parts.into_iter().enumerate().map(part).collect()
        }
        _ => Err(ApiError::wrong_type(path, "a string or an array of parts")),
    }
}

fn text_part(mut part: Fields, kinds: &[&str], no_effect: &[&str]) -> Result<String, ApiError> {
    let kind = part.string("type")?;
    let kind = part.required("type", kind)?;
    if !kinds.contains(&kind.as_str()) {
        return Err(ApiError::unsupported(&part.path("type")));
    }
    let text = part.string("text")?;
    let text = part.required("text", text)?;
    for name in no_effect {
        part.take(name);
    }
    part.finish()?;
    Ok(text)
}

/// What a field that must be one of these words says; `None` if it is absent.
pub(crate) fn word<'a>(fields: &mut Fields, name: &str, words: &[&'a str]) -> Result<Option<&'a str>, ApiError> {
    let Some(given) = fields.string(name)? else { return Ok(None) };
    let known = words.iter().copied().find(|word| *word == given);
    known.map(Some).ok_or_else(|| ApiError::out_of_range(&fields.path(name), words.join(", ")))
}
