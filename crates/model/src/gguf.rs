//! A GGUF file as a model: its metadata read as a config, its tensors under the names and in the row order
//! of Hugging Face checkpoints, its vocabulary as plain values.
//!
//! Keys and names are llama.cpp's (`gguf-py/gguf/constants.py`). The config is written as JSON and read by
//! the one parser of configs, so a GGUF file is held to the same limits as a folder.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value as Json, json};
use sha2::{Digest, Sha256};

use crate::LoadError;
use crate::checkpoint::gguf::{self, Gguf, Value};
use crate::checkpoint::{Checkpoint, CheckpointError, Entry, FileError, Files, OpenFile, Part};
use crate::config::{Architecture, ConfigError, Family, GenerationConfig, ModelConfig, RopeScaling};

const METADATA: &str = "the GGUF metadata";
const ROPE_FACTORS: &str = "rope_freqs.weight";
const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";
const MAX_PARTS: u64 = 4096;

/// The architectures by `general.architecture`.
const ARCHITECTURES: [(&str, Architecture); 3] =
    [("llama", Architecture::Llama), ("qwen2", Architecture::Qwen2), ("qwen3", Architecture::Qwen3)];

/// Metadata keys, after `{architecture}.`, and the fields of a config that they are.
const FIELDS: [(&str, &str); 10] = [
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.sliding_window", "sliding_window"),
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("rope.freq_base", "rope_theta"),
];

/// The same for what stretches the rotary frequencies.
const ROPE_FIELDS: [(&str, &str); 5] = [
    ("rope.scaling.factor", "factor"),
    ("rope.scaling.original_context_length", "original_max_position_embeddings"),
    ("rope.scaling.type", "rope_type"),
    ("rope.scaling.yarn_beta_fast", "beta_fast"),
    ("rope.scaling.yarn_beta_slow", "beta_slow"),
];

/// Tensors of a layer, after `blk.{layer}.`, and their names after `model.layers.{layer}.`.
const LAYER_TENSORS: [(&str, &str); 11] = [
    ("attn_k", "self_attn.k_proj"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_norm", "input_layernorm"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_v", "self_attn.v_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_up", "mlp.up_proj"),
];

/// What a GGUF file says of its tokenizer, as plain values; `None` or empty where it says nothing. Nothing but
/// the types is checked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufTokenizer {
    /// `tokenizer.ggml.model`: `gpt2`, `llama`, ….
    pub model: String,
    /// `tokenizer.ggml.pre`.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

impl GgufTokenizer {
    /// Reads a file's metadata; `None` if `files` are not GGUF.
    ///
    /// # Errors
    /// As for loading, and if a key has a value of another type than these.
    pub fn read(files: &Files) -> Result<Option<Self>, LoadError> {
        let Files::Gguf(path) = files else { return Ok(None) };
        let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
        let (_, bytes) = open_whole(files, &name)?;
        let metadata = parse(&name, &bytes)?.metadata;
        let get = |key: &'static str| Key { key, value: metadata.get(key) };
        Ok(Some(Self {
            model: get("tokenizer.ggml.model").text()?.unwrap_or_default(),
            pre: get("tokenizer.ggml.pre").text()?,
            tokens: get("tokenizer.ggml.tokens").list(text)?,
            scores: get("tokenizer.ggml.scores").list(|v| match v {
                Value::Float(v) => Some(v as f32),
                _ => None,
            })?,
            token_types: get("tokenizer.ggml.token_type").list(|v| i32::try_from(unsigned(&v)?).ok())?,
            merges: get("tokenizer.ggml.merges").list(text)?,
            bos: get("tokenizer.ggml.bos_token_id").id()?,
            eos: get("tokenizer.ggml.eos_token_id").id()?,
            add_bos: get("tokenizer.ggml.add_bos_token").flag()?,
            add_space_prefix: get("tokenizer.ggml.add_space_prefix").flag()?,
            chat_template: get("tokenizer.chat_template").text()?,
        }))
    }
}

/// A key of the metadata on its way to a plain value.
struct Key<'a> {
    key: &'static str,
    value: Option<&'a Value<'a>>,
}

impl<'a> Key<'a> {
    fn read<T>(self, what: &str, get: impl FnOnce(&Value<'a>) -> Option<T>) -> Result<Option<T>, ConfigError> {
        self.value.map(|v| get(v).ok_or_else(|| refuse(format!("{} is not {what}", self.key)))).transpose()
    }

    fn text(self) -> Result<Option<String>, ConfigError> {
        self.read("a string", |v| text(*v))
    }

    fn id(self) -> Result<Option<u32>, ConfigError> {
        self.read("a token id", |v| u32::try_from(unsigned(v)?).ok())
    }

    fn flag(self) -> Result<Option<bool>, ConfigError> {
        self.read("a flag", |v| match v {
            Value::Bool(v) => Some(*v),
            _ => None,
        })
    }

    fn list<T>(self, item: impl Fn(Value<'a>) -> Option<T>) -> Result<Vec<T>, ConfigError> {
        let list = self.read("a list of the right type", |v| match v {
            Value::Array(array) => array.iter().map(item).collect(),
            _ => None,
        })?;
        Ok(list.unwrap_or_default())
    }
}

fn text(value: Value<'_>) -> Option<String> {
    match value {
        Value::Text(text) => Some(text.to_owned()),
        _ => None,
    }
}

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

    let (json, architecture) = config_json(&gguf.metadata, &tensors)?;
    let json = serde_json::to_vec(&json).expect("a map of values");
    let mut config = ModelConfig::parse(&json).map_err(|error| in_own_terms(error, architecture))?;
    let mut digest = Sha256::new_with_prefix(&json);
    if let Some((part, entry)) = tensors.remove(ROPE_FACTORS) {
        let bytes = bytes.get(entry.offset as usize..).and_then(|b| b.get(..entry.bytes));
        let bytes = bytes.filter(|_| entry.stored_type == "F32" && part == 0).unwrap_or_default();
        let factors: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let pairs = config.rope.dim / 2;
        if factors.len() != pairs || !factors.iter().all(|f| f.is_normal() && *f > 0.0) {
            let reason = format!("{ROPE_FACTORS} is not {pairs} positive numbers of type F32 in the first file");
            return Err(refuse(reason).into());
        }
        if config.rope.scaling != RopeScaling::None {
            return Err(refuse(format!("{ROPE_FACTORS} and rope.scaling are both there")).into());
        }
        digest.update(bytes);
        config.rope.scaling = RopeScaling::Divided { factors };
    }
    let generation_config = GenerationConfig { eos_token_ids: config.eos_token_ids.clone(), ..Default::default() };

    let renamed = tensors.into_values().map(|(number, entry)| {
        let name = hugging_face_name(&entry.name).unwrap_or_else(|| entry.name.clone());
        (name, (number, entry))
    });
    let mut checkpoint = Checkpoint::new(parts, renamed.collect());
    // llama.cpp turns neighbouring columns of a llama's heads, and its converter has reordered q and k for that.
    if let (Architecture::Llama, Family::Llama(own)) = (config.architecture, &config.family) {
        for layer in 0..config.num_layers {
            checkpoint.interleave(format!("model.layers.{layer}.self_attn.q_proj.weight"), config.num_heads);
            checkpoint.interleave(format!("model.layers.{layer}.self_attn.k_proj.weight"), own.num_kv_heads);
        }
    }
    Ok(Opened { config, generation_config, digest, checkpoint })
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

/// The metadata in the terms of `config.json`, and the architecture as the file names it.
fn config_json(
    metadata: &BTreeMap<&str, Value<'_>>,
    tensors: &BTreeMap<String, (usize, Entry)>,
) -> Result<(Map<String, Json>, &'static str), ConfigError> {
    let named = match metadata.get("general.architecture") {
        Some(Value::Text(name)) => *name,
        _ => return Err(refuse("general.architecture is missing".into())),
    };
    let Some(&(prefix, architecture)) = ARCHITECTURES.iter().find(|a| a.0 == named) else {
        let known = ARCHITECTURES.map(|a| a.0).join(", ");
        let named: String = named.chars().take(60).collect();
        return Err(refuse(format!("general.architecture is {named:?}; supported: {known}")));
    };
    let get = |key: &str| metadata.get(format!("{prefix}.{key}").as_str()).map(scalar);
    let fields = |list: &[(&str, &str)]| -> Map<String, Json> {
        list.iter().filter_map(|(key, field)| Some(((*field).to_owned(), get(key)?))).collect()
    };
    let mut reasons = Vec::new();
    let mut config = fields(&FIELDS);
    config.insert("architectures".into(), json!([architecture.name()]));
    config.insert("use_sliding_window".into(), json!(config.contains_key("sliding_window")));
    config.insert("tie_word_embeddings".into(), json!(!tensors.contains_key(HEAD)));
    match tensors.get(EMBEDDING) {
        Some((_, entry)) => _ = config.insert("vocab_size".into(), json!(entry.shape[0])),
        None => reasons.push(format!("tensor {EMBEDDING} is missing")),
    }
    let rope = fields(&ROPE_FIELDS);
    if rope.get("rope_type").is_some_and(|t| t != "none") {
        config.insert("rope_scaling".into(), rope.into());
    }
    let ends = ["eos_token_id", "eot_token_id", "eom_token_id"];
    let mut ends: Vec<u64> =
        ends.iter().filter_map(|id| unsigned(metadata.get(format!("tokenizer.ggml.{id}").as_str())?)).collect();
    ends.dedup();
    config.insert("eos_token_id".into(), json!(ends));

    // What the file could say and the config cannot.
    let width = config.get("head_dim").and_then(Json::as_u64).or_else(|| {
        let of = |field: &str| config.get(field).and_then(Json::as_u64);
        of("hidden_size")?.checked_div(of("num_attention_heads")?)
    });
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(value) = get(key).filter(|v| v.as_u64() != width) {
            reasons.push(format!("{prefix}.{key} is {value}; only the width of a head is supported"));
        }
    }
    if let Some(experts) = get("expert_count").filter(|v| v.as_u64() != Some(0)) {
        reasons.push(format!("{prefix}.expert_count is {experts}; only dense models are supported"));
    }
    if reasons.is_empty() { Ok((config, prefix)) } else { Err(ConfigError { file: METADATA, reasons }) }
}

/// A refusal that names the file's own keys.
fn in_own_terms(error: ConfigError, architecture: &str) -> ConfigError {
    let own = |reason: String| {
        let found = FIELDS.iter().find_map(|(key, field)| Some((key, reason.strip_prefix(field)?)));
        found.map(|(key, rest)| format!("{architecture}.{key}{rest}")).unwrap_or(reason)
    };
    ConfigError { file: METADATA, reasons: error.reasons.into_iter().map(own).collect() }
}

/// A value as JSON; of an array only its length, which no field accepts.
fn scalar(value: &Value<'_>) -> Json {
    match *value {
        Value::Unsigned(v) => json!(v),
        Value::Signed(v) => json!(v),
        Value::Float(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::Text(v) => json!(v),
        Value::Array(array) => json!(format!("an array of {}", array.len())),
    }
}

fn unsigned(value: &Value<'_>) -> Option<u64> {
    match *value {
        Value::Unsigned(v) => Some(v),
        Value::Signed(v) => u64::try_from(v).ok(),
        _ => None,
    }
}

/// The name that the tensor has in Hugging Face checkpoints.
fn hugging_face_name(name: &str) -> Option<String> {
    match name {
        EMBEDDING => return Some("model.embed_tokens.weight".into()),
        HEAD => return Some("lm_head.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (tensor, kind) = rest.split_once('.')?;
    let (_, own) = LAYER_TENSORS.iter().find(|t| t.0 == tensor)?;
    Some(format!("model.layers.{layer}.{own}.{kind}"))
}
