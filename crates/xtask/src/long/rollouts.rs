//! A thousand rollouts under streams, between the bundled model and one that answers otherwise.

use std::fs;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Setting;
use crate::rollouts::{self, Args};

/// The tensor by which the two differ.
const NORM: &str = "model.norm.weight";

/// Runs the check.
pub fn check(setting: &Setting) -> Result<()> {
    let folder = setting.folder;
    let binary = setting.binary()?;
    let abacus = crate::root().join("models/abacus");
    let other = folder.join("other");
    fs::create_dir_all(&other)?;
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(abacus.join(name), other.join(name)).context(name)?;
    }
    fs::write(other.join("model.safetensors"), turned(fs::read(abacus.join("model.safetensors"))?)?)?;
    rollouts::main(&Args {
        binary,
        count: 1000,
        streams: 16,
        model_a: abacus,
        model_b: other,
        // What was turned round is not what was trained.
        serve_flags: ["--handoff", "off"].map(str::to_owned).into(),
    })
}

/// Weights with every fourth channel of the last norm turned round: the high byte of a bf16 has the sign.
fn turned(mut file: Vec<u8>) -> Result<Vec<u8>> {
    let header = u64::from_le_bytes(*file.first_chunk().context("no header")?) as usize;
    let index: Value = serde_json::from_slice(file.get(8..8 + header).context("no header")?)?;
    let at = |end: usize| Some(index[NORM]["data_offsets"][end].as_u64()? as usize + 8 + header);
    let bytes = at(0).zip(at(1)).and_then(|(start, end)| file.get_mut(start..end)).context(NORM)?;
    bytes.chunks_mut(8).for_each(|four| four[1] ^= 0x80);
    Ok(file)
}
