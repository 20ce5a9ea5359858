//! What several of these tests need.
#![allow(dead_code)] // each test takes what it needs

pub mod abacus;
pub mod bundle;
pub mod otlp;

use std::{fs, os::unix::fs::symlink, path::Path};

use baton_text::{TextFiles, TextModel, TokenizerFile};
use tempfile::TempDir;

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

/// A folder with the simulator under the names of CANN's libraries.
pub fn simulator() -> TempDir {
    let test = std::env::current_exe().expect("this test's path");
    let library = test.parent().expect("its folder").join("libascend_sim.so");
    assert!(library.exists(), "{} is built with the tests", library.display());
    let folder = TempDir::new().expect("a folder");
    let names = ["ascendcl", "nnopbase", "opapi_nn", "opapi_math", "opapi_transformer", "opapi", "hccl"];
    for name in names.map(|name| format!("lib{name}.so")) {
        symlink(&library, folder.path().join(name)).expect("a link");
    }
    folder
}
