//! The model that ships with Baton: found beside the work, beside the executable, or inside it.

use std::path::PathBuf;

/// Name of the bundled model, and of its folder.
pub const NAME: &str = "abacus";

macro_rules! embedded {
    ($($file:literal),*) => {
        &[$(($file, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/abacus/", $file)) as &[u8])),*]
    };
}

/// Its files, all that its bundle lists, so that a copied binary serves too and proves it.
pub const FILES: &[(&str, &[u8])] = embedded![
    "README.md",
    "config.json",
    "eval.jsonl",
    "eval_reference.jsonl",
    "generation_config.json",
    "golden.json",
    "handoff.json",
    "model.safetensors",
    "prompts.jsonl",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "train/README.md",
    "train/data.py",
    "train/model.py",
    "train/train.py"
];

/// Its folder on disk: under the working directory, else beside the executable.
pub fn folder() -> Option<PathBuf> {
    let beside_executable = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()));
    [Some(PathBuf::new()), beside_executable]
        .into_iter()
        .flatten()
        .map(|base| base.join("models").join(NAME))
        .find(|folder| folder.join("config.json").is_file())
}
