//! The same weights as a GGUF file, under the names and keys that llama.cpp reads (`gguf-py/gguf/constants.py`).
//!
//! Only architectures whose tensors are those of the Hugging Face checkpoint under other names are written.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};
use baton_device::{BlockFormat, DType};
use baton_model::{Architecture, ModelConfig, tensor_shapes};
use serde_json::{Map, Value};

use super::tokenizer::{TEMPLATE, Vocab};

/// Tensors begin at multiples of this.
const ALIGNMENT: u64 = 32;

/// Keys after the architecture's name, and the fields of a config that they are.
const KEYS: [(&str, &str); 12] = [
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.value_length", "head_dim"),
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("expert_count", "num_experts"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_used_count", "num_experts_per_tok"),
    ("feed_forward_length", "intermediate_size"),
];

/// Names of a layer's modules.
const MODULES: [(&str, &str); 17] = [
    ("input_layernorm", "attn_norm"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.experts.*.down_proj", "ffn_down_exps"),
    ("mlp.experts.*.gate_proj", "ffn_gate_exps"),
    ("mlp.experts.*.up_proj", "ffn_up_exps"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.v_proj", "attn_v"),
    ("lm_head", "output"),
    ("model.norm", "output_norm"),
];

/// A tensor of the file.
pub struct Tensor {
    name: String,
    /// Outermost first.
    shape: Vec<usize>,
    pub dtype: DType,
    /// The tensors of the Hugging Face checkpoint that it holds one behind the other: of experts many.
    pub parts: Vec<String>,
}

impl Tensor {
    fn bytes(&self) -> u64 {
        self.dtype.bytes(self.shape.iter().product()) as u64
    }

    /// Elements of each part.
    pub fn part_elements(&self) -> usize {
        self.shape.iter().product::<usize>() / self.parts.len()
    }
}

/// The tensors of a model, its matrices in `dtype` (of blocks, as llama.cpp falls back, in wider ones where they do not
/// divide the rows), vectors and routers in f32.
pub fn tensors(config: &ModelConfig, dtype: DType) -> Result<Vec<Tensor>> {
    architecture(config)?;
    let mut tensors: BTreeMap<String, BTreeMap<usize, (String, Vec<usize>)>> = BTreeMap::new();
    for (name, shape) in tensor_shapes(config) {
        let (own, expert) = own_name(&name).with_context(|| format!("{name} has no name in GGUF files"))?;
        tensors.entry(own).or_default().insert(expert, (name, shape));
    }
    let tensor = |(name, parts): (String, BTreeMap<usize, (String, Vec<usize>)>)| {
        let inner = parts.values().next().expect("made with a part").1.clone();
        let dtype = match dtype {
            _ if inner.len() < 2 || name.contains("ffn_gate_inp") => DType::F32,
            DType::Ggml(format) => DType::Ggml(format.made_for(inner[1])),
            float => float,
        };
        ensure!(inner[inner.len() - 1].is_multiple_of(dtype.block()), "{name}: rows are not whole blocks of {dtype}");
        let shape = if name.contains("_exps") { [&[parts.len()], &inner[..]].concat() } else { inner };
        Ok(Tensor { name, shape, dtype, parts: parts.into_values().map(|(name, _)| name).collect() })
    };
    tensors.into_iter().map(tensor).collect()
}

/// The name in the file, and which expert's.
fn own_name(name: &str) -> Option<(String, usize)> {
    if name == "model.embed_tokens.weight" {
        return Some(("token_embd.weight".into(), 0));
    }
    let (rest, prefix) = match name.strip_prefix("model.layers.") {
        Some(rest) => rest.split_once('.').map(|(layer, rest)| (rest, format!("blk.{layer}.")))?,
        None => (name, String::new()),
    };
    let (module, kind) = rest.rsplit_once('.')?;
    let (module, expert) = match module.strip_prefix("mlp.experts.").and_then(|rest| rest.split_once('.')) {
        Some((expert, projection)) => (format!("mlp.experts.*.{projection}"), expert.parse().ok()?),
        None => (module.to_owned(), 0),
    };
    let own = MODULES.iter().find(|(theirs, _)| *theirs == module)?.1;
    Some((format!("{prefix}{own}.{kind}"), expert))
}

fn architecture(config: &ModelConfig) -> Result<&'static str> {
    Ok(match config.architecture {
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
        Architecture::Qwen3Moe => "qwen3moe",
        other => bail!("GGUF files are written of Qwen2, Qwen3 and Qwen3-MoE shapes, not of {}", other.name()),
    })
}

/// Writes the file, which must not exist. `data` writes a tensor's bytes; `progress` is told those written and all.
pub fn write(
    out: &Path,
    (config, json): (&ModelConfig, &Map<String, Value>),
    vocab: &Vocab,
    tensors: &[Tensor],
    progress: &dyn Fn(u64, u64),
    mut data: impl FnMut(&Tensor, &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
) -> Result<()> {
    ensure!(!out.exists(), "{} exists already", out.display());
    let partial = out.with_extension("partial");
    let mut file = BufWriter::new(File::create(&partial).with_context(|| partial.display().to_string())?);
    let keys = metadata(architecture(config)?, json, vocab);
    let mut head = [b"GGUF".as_slice(), &3u32.to_le_bytes()].concat();
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((keys.len() as u64).to_le_bytes());
    head.extend(keys.concat());
    let mut end = 0u64;
    for tensor in tensors {
        head.extend(text(&tensor.name));
        head.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|dim| head.extend((*dim as u64).to_le_bytes()));
        head.extend(type_number(tensor.dtype).to_le_bytes());
        head.extend(end.to_le_bytes());
        end += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);
    file.write_all(&head)?;
    let mut written = 0u64;
    for tensor in tensors {
        data(tensor, &mut |bytes| {
            written += bytes.len() as u64;
            progress(written, end);
            Ok(file.write_all(bytes)?)
        })?;
        let padding = written.next_multiple_of(ALIGNMENT) - written;
        file.write_all(&vec![0; padding as usize])?;
        written += padding;
    }
    file.into_inner()?.sync_all()?;
    Ok(fs::rename(&partial, out)?)
}

/// Each key with its type and value, as the file has them.
fn metadata(architecture: &str, config: &Map<String, Value>, vocab: &Vocab) -> Vec<Vec<u8>> {
    let mut keys = Vec::new();
    let mut add = |key: &str, kind: u32, value: Vec<u8>| {
        keys.push([text(key), kind.to_le_bytes().to_vec(), value].concat());
    };
    let number = |n: u64| (n as u32).to_le_bytes().to_vec();
    let float = |x: f64| (x as f32).to_le_bytes().to_vec();
    add("general.architecture", STRING, text(architecture));
    add("general.name", STRING, text("random weights"));
    for (key, field) in KEYS {
        let key = format!("{architecture}.{key}");
        match config.get(field) {
            Some(value) if value.is_u64() => add(&key, U32, number(value.as_u64().expect("checked"))),
            Some(value) if value.is_f64() => add(&key, F32, float(value.as_f64().expect("checked"))),
            _ => {}
        }
    }
    let theta = config.get("rope_theta").and_then(Value::as_f64);
    theta.into_iter().for_each(|theta| add(&format!("{architecture}.rope.freq_base"), F32, float(theta)));
    add("tokenizer.ggml.model", STRING, text("gpt2"));
    add("tokenizer.ggml.pre", STRING, text("gpt-2"));
    let tokens: Vec<Vec<u8>> = vocab.tokens.iter().map(|token| text(token)).collect();
    add("tokenizer.ggml.tokens", ARRAY, array(STRING, &tokens));
    let kind = |id: usize| if id < vocab.first_special { 1i32 } else { 3 };
    let kinds: Vec<Vec<u8>> = (0..vocab.tokens.len()).map(|id| kind(id).to_le_bytes().to_vec()).collect();
    add("tokenizer.ggml.token_type", ARRAY, array(I32, &kinds));
    add("tokenizer.ggml.merges", ARRAY, array(STRING, &[]));
    add("tokenizer.ggml.eos_token_id", U32, number(vocab.end_id()));
    add("tokenizer.ggml.add_bos_token", BOOL, vec![0]);
    add("tokenizer.chat_template", STRING, text(TEMPLATE));
    keys
}

const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

fn array(kind: u32, elements: &[Vec<u8>]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &(elements.len() as u64).to_le_bytes(), &elements.concat()].concat()
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

fn type_number(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 30,
        DType::Ggml(BlockFormat::Q4_0) => 2,
        DType::Ggml(BlockFormat::Q8_0) => 8,
        DType::Ggml(BlockFormat::Q4_K) => 12,
        DType::Ggml(other) => unreachable!("{other} is never made"),
    }
}
