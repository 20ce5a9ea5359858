//! The `tokenizers` crate, as far as it meets data from outside.
//!
//! It was written for files of honest origin and panics on some others, at load or on a text. Here a panic is an
//! error, as everything else that a checkpoint can cause.

use std::panic::{AssertUnwindSafe, catch_unwind};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::TextError;
use crate::sentencepiece::check_charsmap;

/// Reads a `tokenizer.json`; `file` is what it is called in an error.
pub(crate) fn read(file: &str, json: &[u8]) -> Result<Tokenizer, TextError> {
    let refused = |reason: String| TextError::Tokenizer(format!("{file}: {reason}"));
    check_charsmaps(json).map_err(refused)?;
    let read = || {
        let mut tokenizer = Tokenizer::from_bytes(json)?;
        // Lengths are the server's affair; a tokenizer that was saved while training must not cut or fill prompts.
        tokenizer.with_truncation(None)?;
        tokenizer.with_padding(None);
        Ok(tokenizer)
    };
    guarded(read).map_err(refused)
}

/// Ids of a text, with the special tokens that the tokenizer's own post-processor writes if `special`.
pub(crate) fn encode(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<Vec<u32>, TextError> {
    let encode = || Ok(tokenizer.encode_fast(text, special)?.get_ids().to_vec());
    guarded(encode).map_err(TextError::Encode)
}

/// Text of ids that the vocabulary has; empty if it cannot be decoded.
pub(crate) fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    guarded(|| tokenizer.decode(ids, false)).unwrap_or_default()
}

fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizer library failed".into()),
    }
}

/// Checks what the library reserves memory for unseen. Few vocabularies have such a table.
fn check_charsmaps(json: &[u8]) -> Result<(), String> {
    const KEY: &str = "precompiled_charsmap";
    if !json.windows(KEY.len()).any(|window| window == KEY.as_bytes()) {
        return Ok(());
    }
    let mut open = vec![serde_json::from_slice::<Value>(json).map_err(|e| e.to_string())?];
    while let Some(value) = open.pop() {
        match value {
            Value::Object(fields) => {
                if let Some(table) = fields.get(KEY).and_then(Value::as_str) {
                    check_charsmap(&BASE64_STANDARD.decode(table).map_err(|e| format!("{KEY}: {e}"))?)?;
                }
                open.extend(fields.into_iter().map(|(_, value)| value));
            }
            Value::Array(items) => open.extend(items),
            _ => {}
        }
    }
    Ok(())
}
