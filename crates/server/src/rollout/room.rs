//! Whether a candidate has room beside the generation that serves, known before anything of it is loaded.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use baton_model::{Files, ModelConfig, Quantization, tensor_shapes};
use indicatif::BinaryBytes;

use crate::{memory, settings::Settings};

/// Bytes of `config.json` that are read.
const MAX_CONFIG: u64 = 1 << 20;

/// Memory that a generation holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    pub weights: u64,
    pub cache: u64,
}

/// Bytes that a candidate may take: what is free, less what the serving generation has reserved and not yet touched.
/// `None` where the system does not say.
pub fn free(serving: Held) -> Option<u64> {
    let untouched = (serving.weights + serving.cache).saturating_sub(memory::resident_bytes()?);
    Some(memory::available_bytes()?.saturating_sub(untouched))
}

/// Refuses a checkpoint whose weights and cache are more than is free.
pub fn check(files: &Files, settings: &Settings, free: Option<u64>) -> Result<()> {
    let weights = weights(files, settings)?;
    // What cannot be known is not limited: the allocation itself then decides.
    let Some(free) = free else { return Ok(()) };
    let cache = settings.kv_cache_memory_bytes.unwrap_or(free / 4);
    if weights.saturating_add(cache) > free {
        let bytes = |n: u64| format!("{} ({n} bytes)", BinaryBytes(n));
        bail!(
            "not enough memory beside the generation that serves: it takes {} of weights and up to {} of cache; {} are free",
            bytes(weights),
            bytes(cache),
            bytes(free)
        );
    }
    Ok(())
}

/// Bytes of the weights as they will be kept. Of GGUF files, whose blocks are kept, the bytes of the files.
fn weights(files: &Files, settings: &Settings) -> Result<u64> {
    let stored = stored(files)?;
    let Files::Folder(_) = files else { return Ok(stored) };
    let config = files.read("config.json", MAX_CONFIG)?.context("config.json is missing")?;
    let config = ModelConfig::parse(&config)?;
    let (mut floats, mut linear) = (0, 0);
    for (name, shape) in tensor_shapes(&config) {
        let elements = shape.iter().map(|&n| n as u64).product::<u64>();
        let quantizable = shape.len() > 1 && !name.contains("embed_tokens");
        *(if quantizable { &mut linear } else { &mut floats }) += elements;
    }
    let all = floats + linear;
    let as_floats = |elements: u64| match (settings.dtype.stored(), &config.quantization) {
        (Some(dtype), _) => dtype.bytes(elements as usize) as u64,
        // Stored quantised, kept as bf16.
        (None, Some(_)) => elements * 2,
        (None, None) => (u128::from(stored) * u128::from(elements) / u128::from(all.max(1))) as u64,
    };
    Ok(match settings.quantize {
        None => as_floats(all),
        Some(quantize) => {
            let block = Quantization::from(quantize).format();
            as_floats(floats) + linear.div_ceil(block.elements() as u64) * block.bytes() as u64
        }
    })
}

/// Bytes of the files that hold weights; none means that there is no checkpoint.
fn stored(files: &Files) -> Result<u64> {
    let folder = match files {
        Files::Folder(folder) => folder.as_path(),
        Files::Gguf(file) => file.parent().unwrap_or(Path::new(".")),
        Files::Embedded(files) => return Ok(files.iter().map(|(_, content)| content.len() as u64).sum()),
    };
    let mut bytes = 0;
    for name in files.names()?.iter().filter(|n| n.ends_with(".safetensors") || n.ends_with(".gguf")) {
        bytes += fs::metadata(folder.join(name)).with_context(|| name.clone())?.len();
    }
    if bytes == 0 {
        bail!("{} has no weights: *.safetensors is read, and .gguf files by their own name", folder.display());
    }
    Ok(bytes)
}
