//! A model with a template of the test's own.

use std::path::Path;

use baton_text::{TextError, TextFiles, TextModel, TokenizerFile};
use serde_json::{Value, json};

/// Bytes of a file of a reference tokenizer.
pub fn golden_file(name: &str, file: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/golden/tokenizers");
    std::fs::read(folder.join(name).join(file)).expect("a golden file")
}

/// The chatml tokenizer with this tokenizer_config.json.
pub fn model(config: &Value) -> Result<TextModel, TextError> {
    TextModel::new(&TextFiles {
        tokenizer: TokenizerFile::Json(&golden_file("chatml", "tokenizer.json")),
        tokenizer_config: Some(config.to_string().as_bytes()),
        special_tokens_map: None,
        chat_template_jinja: None,
    })
}

/// The chatml tokenizer with this chat template.
pub fn with_template(source: &str) -> Result<TextModel, TextError> {
    model(&json!({ "chat_template": source }))
}

/// 26 July 2024, 12:00:00.
pub fn noon() -> chrono::NaiveDateTime {
    chrono::NaiveDate::from_ymd_opt(2024, 7, 26).and_then(|d| d.and_hms_opt(12, 0, 0)).expect("a date")
}
