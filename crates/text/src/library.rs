//! The `tokenizers` crate, as far as it meets data from outside.
//!
//! It was written for files of honest origin and panics on some others, at load or on a text. Here a panic is an
//! error, as everything else that a checkpoint can cause.

use std::panic::{AssertUnwindSafe, catch_unwind};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::TextError;
use crate::sentencepiece::check_charsmap;

/// Key of a SentencePiece table of characters.
const CHARSMAP: &str = "precompiled_charsmap";

/// How many times longer a normalizer or decoder may make a text, at most. A table of characters, spaces as three bytes
/// and a prefix make some thousands.
const MAX_GROWTH: u64 = 1 << 16;

/// Reads a `tokenizer.json`; `file` is what it is called in an error.
pub(crate) fn read(file: &str, json: &[u8]) -> Result<Tokenizer, TextError> {
    let refused = |reason: String| TextError::Tokenizer(format!("{file}: {reason}"));
    check_charsmaps(json).map_err(refused)?;
    let read = || {
        let mut tokenizer = Tokenizer::from_bytes(json)?;
        // Lengths are the server's affair; a tokenizer that was saved while training must not cut or fill prompts.
        tokenizer.with_truncation(None)?;
        tokenizer.with_padding(None);
        // The cache of words is kept by each thread, and outlives the model: generations come and go.
        let mut model = tokenizer.get_model().clone();
        model.resize_cache(0);
        tokenizer.with_model(model);
        Ok(tokenizer)
    };
    let tokenizer = guarded(read).map_err(refused)?;
    let steps = [serde_json::to_value(tokenizer.get_normalizer()), serde_json::to_value(tokenizer.get_decoder())];
    for steps in steps.into_iter().flatten() {
        let growth = growth(&steps);
        if growth > MAX_GROWTH {
            return Err(refused(format!(
                "it may make a text {growth} times as long; at most {MAX_GROWTH} is accepted"
            )));
        }
    }
    Ok(tokenizer)
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

/// The result of a call into the library; its panics are errors.
pub(crate) fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizer library failed".into()),
    }
}

/// The part of a `tokenizer.json` that may have tables of characters.
#[derive(Deserialize)]
struct Normalizing {
    normalizer: Option<Value>,
}

/// Checks what the library reserves memory for unseen.
fn check_charsmaps(json: &[u8]) -> Result<(), String> {
    let Normalizing { normalizer } = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    let mut open: Vec<Value> = normalizer.into_iter().collect();
    while let Some(value) = open.pop() {
        match value {
            Value::Object(fields) => {
                if let Some(table) = fields.get(CHARSMAP).and_then(Value::as_str) {
                    check_charsmap(&BASE64_STANDARD.decode(table).map_err(|e| format!("{CHARSMAP}: {e}"))?)?;
                }
                open.extend(fields.into_iter().map(|(_, value)| value));
            }
            Value::Array(items) => open.extend(items),
            _ => {}
        }
    }
    Ok(())
}

/// How many times longer a step may make a text: a chain of replacements multiplies, so that few bytes of file would
/// make any number of text.
fn growth(step: &Value) -> u64 {
    let len = |key: &str| step[key].as_str().map_or(1, |text| 1 + text.len() as u64);
    match step["type"].as_str() {
        Some("Sequence") => {
            let steps = ["normalizers", "decoders"].into_iter().filter_map(|key| step[key].as_array()).flatten();
            steps.map(growth).fold(1, u64::saturating_mul)
        }
        Some("Replace") => len("content"),
        Some("Prepend") => len("prepend"),
        Some("Precompiled") => {
            let table = BASE64_STANDARD.decode(step[CHARSMAP].as_str().unwrap_or_default()).unwrap_or_default();
            // After a trie, whose length comes first, the replacements.
            let trie = table.first_chunk().map_or(0, |len| u32::from_le_bytes(*len) as usize + 4);
            let replacements = table.get(trie..).unwrap_or_default().split(|byte| *byte == 0);
            replacements.map(|text| 1 + text.len() as u64).max().unwrap_or(1)
        }
        Some("NFKC" | "NFKD") => 11, // U+FDFA, three bytes, becomes 33
        _ => 1,
    }
}
