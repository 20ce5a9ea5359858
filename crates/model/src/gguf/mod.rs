//! A GGUF file as a model: its metadata read as a config, its tensors under the names and in the row order
//! of Hugging Face checkpoints, its vocabulary as plain values.
//!
//! Keys and names are llama.cpp's (`gguf-py/gguf/constants.py`). The config is written as JSON and read by
//! the one parser of configs, so a GGUF file is held to the same limits as a folder.

mod metadata;
mod names;
mod tokenizer;

use std::collections::BTreeMap;
use std::path::Path;

use sha2::{Digest, Sha256};
pub use tokenizer::GgufTokenizer;

use crate::LoadError;
use crate::checkpoint::gguf::{self, Gguf, Value};
use crate::checkpoint::{Checkpoint, CheckpointError, Entry, FileError, Files, LatentHalves, OpenFile, Part};
use crate::config::{ConfigError, Family, GenerationConfig, ModelConfig, RopeScaling};
use metadata::Tensors;
use names::{LONG_ROPE_FACTORS, Name, ROPE_FACTORS};

const METADATA: &str = "the GGUF metadata";
const MAX_PARTS: u64 = 4096;

/// All of a model but the device.
pub(crate) struct Opened {
    pub(crate) config: ModelConfig,
    pub(crate) generation_config: GenerationConfig,
    /// Has seen the config.
    pub(crate) digest: Sha256,
    pub(crate) checkpoint: Checkpoint,
}

/// Opens a file, and the other parts of a split one.
pub(crate) fn open(files: &Files, path: &Path) -> Result<Opened, LoadError> {
    let mut tensors = BTreeMap::new();
    let mut add = |number: usize, file: &str, entries: Vec<Entry>| {
        entries.into_iter().try_for_each(|entry| match tensors.insert(entry.name.clone(), (number, entry)) {
            Some((_, first)) => Err(damaged(file, format!("tensor {} is in another part too", first.name))),
            None => Ok(()),
        })
    };
    let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
    let (file, bytes) = open_whole(files, &name)?;
    let gguf = parse(&name, &bytes)?;
    add(0, &name, gguf.tensors)?;
    let mut parts = vec![file];
    for (number, name) in split_names(&name, &gguf.metadata)?.iter().enumerate().skip(1) {
        let (file, bytes) = open_whole(files, name)?;
        let gguf = parse(name, &bytes)?;
        if gguf.metadata.get("split.no") != Some(&Value::Unsigned(number as u64)) {
            return Err(damaged(name, format!("it does not say that it is part {number} of a split model")).into());
        }
        add(number, name, gguf.tensors)?;
        parts.push(file);
    }

    let (json, prefix) = metadata::config_json(&gguf.metadata, &tensors)?;
    let json = serde_json::to_vec(&json).expect("a map of values");
    let mut config = ModelConfig::parse(&json).map_err(|error| metadata::in_own_terms(error, prefix))?;
    config.norm_offset = 0.0; // the converter has added it
    let mut digest = Sha256::new_with_prefix(&json);
    if let Some(factors) = rope_factors(&mut tensors, &bytes, &config)? {
        factors.iter().for_each(|f| digest.update(f.to_le_bytes()));
        config.rope.scaling = RopeScaling::Divided { factors };
    }
    let generation_config = GenerationConfig { eos_token_ids: config.eos_token_ids.clone(), ..Default::default() };
    let checkpoint = checkpoint(tensors, parts, &config, prefix)?;
    Ok(Opened { config, generation_config, digest, checkpoint })
}

/// What each rotary frequency is divided by, if the file has it.
fn rope_factors(tensors: &mut Tensors, file: &[u8], config: &ModelConfig) -> Result<Option<Vec<f32>>, ConfigError> {
    if let Some(name) = LONG_ROPE_FACTORS.iter().find(|name| tensors.contains_key(**name)) {
        return Err(refuse(format!("{name} is there: longrope is not supported")));
    }
    let Some((part, entry)) = tensors.remove(ROPE_FACTORS) else { return Ok(None) };
    let bytes = file.get(entry.offset as usize..).and_then(|b| b.get(..entry.bytes));
    let bytes = bytes.filter(|_| entry.stored_type == "F32" && part == 0).unwrap_or_default();
    let factors: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let pairs = config.rope.dim / 2;
    if factors.len() != pairs || !factors.iter().all(|f| f.is_normal() && *f > 0.0) {
        let reason = format!("{ROPE_FACTORS} is not {pairs} positive numbers of type F32 in the first file");
        return Err(refuse(reason));
    }
    if config.rope.scaling != RopeScaling::None {
        return Err(refuse(format!("{ROPE_FACTORS} and rope.scaling are both there")));
    }
    Ok(Some(factors))
}

/// The tensors under their Hugging Face names.
fn checkpoint(
    tensors: Tensors,
    parts: Vec<OpenFile>,
    config: &ModelConfig,
    prefix: &str,
) -> Result<Checkpoint, CheckpointError> {
    let mut renamed = Tensors::new();
    let mut add = |name: String, tensor: (usize, Entry)| match renamed.insert(name, tensor) {
        Some((_, first)) => Err(refuse_tensor(format!("tensor {} is there in two forms", first.name))),
        None => Ok(()),
    };
    for (number, entry) in tensors.into_values() {
        match names::hugging_face(&entry.name, config.architecture) {
            None => add(entry.name.clone(), (number, entry))?,
            Some(Name::One(name)) => add(name, (number, entry))?,
            Some(Name::Stacked(before, after)) => {
                for (expert, entry) in unstacked(entry, config)?.enumerate() {
                    add(format!("{before}{expert}{after}"), (number, entry))?;
                }
            }
        }
    }
    let attention = |layer: usize, name: &str| format!("model.layers.{layer}.self_attn.{name}");
    let mut joined = Vec::new();
    if let Family::Deepseek(own) = &config.family {
        for layer in 0..config.num_layers {
            let mut take = |name: &str| renamed.remove(&attention(layer, name));
            let (Some(key), Some(value)) = (take("k_b_proj.weight"), take("v_b_proj.weight")) else { continue };
            let wanted = [
                (&key.1, [config.num_heads, own.kv_lora_rank, own.qk_nope_head_dim]),
                (&value.1, [config.num_heads, own.v_head_dim, own.kv_lora_rank]),
            ];
            if let Some((half, wanted)) = wanted.into_iter().find(|(half, wanted)| half.shape != wanted) {
                let reason = format!("tensor {} has shape {:?}, the file asks for {wanted:?}", half.name, half.shape);
                return Err(refuse_tensor(reason));
            }
            joined.push((attention(layer, "kv_b_proj.weight"), LatentHalves { key, value }));
        }
    }
    let mut checkpoint = Checkpoint::new(parts, renamed);
    joined.into_iter().for_each(|(name, halves)| checkpoint.join(name, halves));
    // llama.cpp turns neighbouring columns of a llama's heads, and its converter has reordered q and k for that.
    if let ("llama", Family::Llama(own)) = (prefix, &config.family) {
        for (layer, kind) in (0..config.num_layers).flat_map(|layer| [(layer, "weight"), (layer, "bias")]) {
            checkpoint.interleave(attention(layer, &format!("q_proj.{kind}")), config.num_heads);
            checkpoint.interleave(attention(layer, &format!("k_proj.{kind}")), own.num_kv_heads);
        }
    }
    Ok(checkpoint)
}

/// The experts that a tensor holds one after the other.
fn unstacked(stack: Entry, config: &ModelConfig) -> Result<impl Iterator<Item = Entry> + use<>, CheckpointError> {
    let count = config.moe.as_ref().map_or(0, |moe| moe.num_experts);
    match &stack.shape[..] {
        [experts, rows, cols] if *experts == count => {
            let (shape, bytes) = (vec![*rows, *cols], stack.bytes / count);
            Ok((0..count).map(move |expert| Entry {
                shape: shape.clone(),
                offset: stack.offset + (expert * bytes) as u64,
                bytes,
                ..stack.clone()
            }))
        }
        shape => {
            let reason = format!("tensor {} has shape {shape:?}, not [{count}, rows, columns]", stack.name);
            Err(refuse_tensor(reason))
        }
    }
}

fn refuse_tensor(reason: String) -> CheckpointError {
    CheckpointError::Tensors { reasons: vec![reason] }
}

fn damaged(file: &str, reason: String) -> CheckpointError {
    CheckpointError::Damaged { file: file.to_owned(), reason }
}

fn refuse(reason: String) -> ConfigError {
    ConfigError { file: METADATA, reasons: vec![reason] }
}

/// A file, mapped as a whole: only the pages that are read become resident.
fn open_whole(files: &Files, name: &str) -> Result<(OpenFile, Part), CheckpointError> {
    let file = files.open(name)?.ok_or_else(|| FileError::Missing { name: name.to_owned() })?;
    if file.len() == 0 {
        return Err(FileError::Empty { name: file.name }.into());
    }
    let len = usize::try_from(file.len()).map_err(|_| damaged(name, "it is too large".into()))?;
    let bytes = file.part(0, len)?;
    Ok((file, bytes))
}

fn parse<'a>(name: &str, bytes: &'a [u8]) -> Result<Gguf<'a>, CheckpointError> {
    gguf::parse(bytes).map_err(|reason| damaged(name, reason))
}

/// The names of all parts: of a model in one file just its own.
fn split_names(name: &str, metadata: &BTreeMap<&str, Value<'_>>) -> Result<Vec<String>, CheckpointError> {
    let count = match metadata.get("split.count") {
        None | Some(Value::Unsigned(0 | 1)) => return Ok(vec![name.to_owned()]),
        Some(&Value::Unsigned(count)) if count <= MAX_PARTS => count,
        Some(_) => return Err(damaged(name, format!("split.count is not a number up to {MAX_PARTS}"))),
    };
    match name.strip_suffix(&format!("-00001-of-{count:05}.gguf")) {
        Some(stem) if metadata.get("split.no") == Some(&Value::Unsigned(0)) => {
            Ok((1..=count).map(|i| format!("{stem}-{i:05}-of-{count:05}.gguf")).collect())
        }
        _ => {
            let reason = format!("it is a part of {count}; name the first, which ends in -00001-of-{count:05}.gguf");
            Err(damaged(name, reason))
        }
    }
}
