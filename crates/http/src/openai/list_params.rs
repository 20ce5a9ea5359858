//! Parameters that are lists, each of bounded length.

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
/// Most words that must not be written.
const MAX_BAD_WORDS: usize = 128;
/// Longest of them, in bytes.
const MAX_BAD_WORD_BYTES: usize = 256;

/// `logit_bias`.
pub(crate) fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
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

/// `stop`.
pub(crate) fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
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

/// `stop_token_ids`.
pub(crate) fn stop_token_ids(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
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

/// `bad_words`.
pub(crate) fn bad_words(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let words = fields.array("bad_words")?.unwrap_or_default();
    if words.len() > MAX_BAD_WORDS {
        return Err(ApiError::out_of_range("bad_words", format!("at most {MAX_BAD_WORDS} strings")));
    }
    let word = |word: Value| match word {
        Value::String(text) if (1..=MAX_BAD_WORD_BYTES).contains(&text.len()) => Ok(text),
        Value::String(_) => {
            Err(ApiError::out_of_range("bad_words", format!("strings of 1 to {MAX_BAD_WORD_BYTES} bytes")))
        }
        _ => Err(ApiError::wrong_type("bad_words", "an array of strings")),
    };
    words.into_iter().map(word).collect()
}

/// `allowed_token_ids`: at least one, ascending and distinct.
pub(crate) fn allowed_token_ids(fields: &mut Fields) -> Result<Option<Vec<u32>>, ApiError> {
    let Some(ids) = fields.array("allowed_token_ids")? else { return Ok(None) };
    let ids = ids.iter().map(|id| token_id("allowed_token_ids", id)).collect::<Result<Vec<_>, _>>()?;
    let ids: std::collections::BTreeSet<u32> = ids.into_iter().collect();
    if ids.is_empty() {
        return Err(ApiError::out_of_range("allowed_token_ids", "an array of at least one id"));
    }
    Ok(Some(ids.into_iter().collect()))
}
