//! A GGUF file.

use super::checkpoint;
use std::fs;

pub fn run(data: &[u8]) -> bool {
    let Ok(folder) = tempfile::tempdir() else { return false };
    let path = folder.path().join("model.gguf");
    fs::write(&path, data).expect("a temporary file");
    checkpoint::run(&path)
}
