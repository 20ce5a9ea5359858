//! `metadata`: what a client writes onto things that are kept.

use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::Fields;

const MAX_ENTRIES: usize = 16;
const MAX_NAME_CHARS: usize = 64;
const MAX_VALUE_CHARS: usize = 512;

/// Reads `metadata`: up to 16 strings by names.
pub(crate) fn read(fields: &mut Fields) -> Result<Option<Map<String, Value>>, ApiError> {
    let path = fields.path("metadata");
    let Some(entries) = fields.object("metadata")?.map(Fields::into_rest) else { return Ok(None) };
    let fits = |(name, value): (&String, &Value)| {
        let value = value.as_str().map(|text| text.chars().count());
        name.chars().count() <= MAX_NAME_CHARS && value.is_some_and(|chars| chars <= MAX_VALUE_CHARS)
    };
    if entries.len() > MAX_ENTRIES || !entries.iter().all(fits) {
        let accepted = format!(
            "at most {MAX_ENTRIES} strings of at most {MAX_VALUE_CHARS} characters, by names of at most {MAX_NAME_CHARS}"
        );
        return Err(ApiError::out_of_range(&path, accepted));
    }
    Ok(Some(entries))
}
