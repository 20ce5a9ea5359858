//! What several of these tests need.
#![allow(dead_code)] // each test takes what it needs

pub mod abacus;
pub mod bundle;

use std::{fs, path::Path};

use baton_text::{TextFiles, TextModel, TokenizerFile};

/// The tokenizer of a folder, without its template.
pub fn text_model(folder: &Path) -> TextModel {
    let file = |name: &str| fs::read(folder.join(name)).expect(name);
    let (tokenizer, config) = (file("tokenizer.json"), file("tokenizer_config.json"));
    let files = TextFiles {
        tokenizer: TokenizerFile::Json(&tokenizer),
        tokenizer_config: Some(&config),
        special_tokens_map: None,
        chat_template_jinja: None,
    };
    TextModel::new(&files).expect("a tokenizer that loads")
}
