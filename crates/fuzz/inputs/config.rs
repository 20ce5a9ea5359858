//! `config.json` and `generation_config.json`, beside weights that lack every tensor: what the config asks for is
//! worked out in full, and refused.

use std::fs;

use super::{checkpoint, parts};
use baton_model::{GenerationConfig, ModelConfig};

pub fn run(data: &[u8]) -> bool {
    let [config, generation] = parts::split(data);
    let Ok(model) = ModelConfig::parse(config) else { return false };
    let _ = GenerationConfig::parse((!generation.is_empty()).then_some(generation), &model);
    let Ok(folder) = tempfile::tempdir() else { return false };
    let empty = [&2u64.to_le_bytes(), b"{}".as_slice()].concat();
    for (name, content) in [("config.json", config), ("model.safetensors", &empty)] {
        fs::write(folder.path().join(name), content).expect("a temporary file");
    }
    !checkpoint::run(folder.path())
}
