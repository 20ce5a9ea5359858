//! A GGUF file's metadata in the terms of `config.json`.
//!
//! What the file says by leaving a key out is what llama.cpp takes it to say (`src/llama-model.cpp` and
//! `src/models` there), since its converter leaves out what is usual.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};

use super::names::{EMBEDDING, HEAD};
use super::{METADATA, refuse};
use crate::checkpoint::Entry;
use crate::checkpoint::gguf::{Array, Value};
use crate::config::{Architecture, ConfigError};

/// Values of `general.architecture`.
const ARCHITECTURES: [&str; 8] = ["llama", "qwen2", "qwen3", "qwen3moe", "phi3", "gemma2", "gemma3", "deepseek2"];

/// Metadata keys, after `{architecture}.`, and the fields of a config that they are.
const FIELDS: [(&str, &str); 24] = [
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.kv_lora_rank", "kv_lora_rank"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.q_lora_rank", "q_lora_rank"),
    ("attention.sliding_window", "sliding_window"),
    ("attention.sliding_window_pattern", "sliding_window_pattern"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_group_count", "n_group"),
    ("expert_group_used_count", "topk_group"),
    ("expert_shared_count", "n_shared_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_weights_norm", "norm_topk_prob"),
    ("expert_weights_scale", "routed_scaling_factor"),
    ("feed_forward_length", "intermediate_size"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("leading_dense_block_count", "first_k_dense_replace"),
    ("rope.freq_base", "rope_theta"),
    ("rope.freq_base_swa", "rope_local_base_freq"),
];

/// The number of experts has a name of its own in every architecture.
const EXPERT_COUNT: &str = "expert_count";
const EXPERT_FIELDS: [&str; 3] = ["num_local_experts", "num_experts", "n_routed_experts"];

/// The same for what stretches the rotary frequencies.
const ROPE_FIELDS: [(&str, &str); 5] = [
    ("rope.scaling.factor", "factor"),
    ("rope.scaling.original_context_length", "original_max_position_embeddings"),
    ("rope.scaling.type", "rope_type"),
    ("rope.scaling.yarn_beta_fast", "beta_fast"),
    ("rope.scaling.yarn_beta_slow", "beta_slow"),
];

/// Keys that would change results, with the one value that is supported; absent is fine.
const FIXED: [(&str, f64); 9] = [
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.scale", 0.0),
    ("embedding_scale", 0.0),
    ("logit_scale", 0.0),
    ("nextn_predict_layers", 0.0),
    ("residual_scale", 0.0),
    ("rope.scaling.yarn_attn_factor", 1.0),
    ("rope.scaling.yarn_ext_factor", 1.0),
];

/// The base of rotary frequencies where a file says nothing.
const DEFAULT_THETA: f64 = 1e4;
/// `expert_gating_func`.
const GATING_SOFTMAX: u64 = 1;
const GATING_SIGMOID: u64 = 2;

type Metadata<'a> = BTreeMap<&'a str, Value<'a>>;
pub(super) type Tensors = BTreeMap<String, (usize, Entry)>;

/// The config of a file, and the value of `general.architecture`.
pub(super) fn config_json(
    metadata: &Metadata<'_>,
    tensors: &Tensors,
) -> Result<(Map<String, Json>, &'static str), ConfigError> {
    let named = match metadata.get("general.architecture") {
        Some(Value::Text(name)) => *name,
        _ => return Err(refuse("general.architecture is missing".into())),
    };
    let Some(prefix) = ARCHITECTURES.into_iter().find(|a| *a == named) else {
        let named: String = named.chars().take(60).collect();
        let known = ARCHITECTURES.join(", ");
        return Err(refuse(format!("general.architecture is {named:?}; supported: {known}")));
    };
    let mut reader = Reader { metadata, tensors, prefix, config: Map::new(), reasons: Vec::new() };
    reader.read();
    match reader.reasons {
        reasons if reasons.is_empty() => Ok((reader.config, prefix)),
        reasons => Err(ConfigError { file: METADATA, reasons }),
    }
}

/// A refusal that names the file's own keys.
pub(super) fn in_own_terms(error: ConfigError, prefix: &str) -> ConfigError {
    let experts = EXPERT_FIELDS.map(|field| (EXPERT_COUNT, field));
    let own = |reason: String| {
        let inner = reason.strip_prefix("rope_scaling.");
        let named = |&(key, field): &(&'static str, &str)| {
            let rest = inner.unwrap_or(&reason).strip_prefix(field)?;
            rest.starts_with(' ').then(|| format!("{prefix}.{key}{rest}"))
        };
        let fields = if inner.is_some() { &ROPE_FIELDS[..] } else { &FIELDS[..] };
        fields.iter().chain(&experts).find_map(named).unwrap_or(reason)
    };
    ConfigError { file: METADATA, reasons: error.reasons.into_iter().map(own).collect() }
}

struct Reader<'a> {
    metadata: &'a Metadata<'a>,
    tensors: &'a Tensors,
    prefix: &'static str,
    config: Map<String, Json>,
    reasons: Vec<String>,
}

impl Reader<'_> {
    /// The value of `{architecture}.{key}`.
    fn get(&self, key: &str) -> Option<Json> {
        self.metadata.get(format!("{}.{key}", self.prefix).as_str()).map(scalar)
    }

    /// Its value as a number other than 0.
    fn number(&self, key: &str) -> Option<f64> {
        self.get(key)?.as_f64().filter(|v| *v != 0.0)
    }

    fn set(&mut self, field: &str, value: impl Into<Json>) {
        self.config.insert(field.into(), value.into());
    }

    fn refuse(&mut self, key: &str, reason: impl std::fmt::Display) {
        self.reasons.push(format!("{}.{key}{reason}", self.prefix));
    }

    fn read(&mut self) {
        self.config = self.fields(&FIELDS);
        let architecture = self.architecture();
        self.set("architectures", json!([architecture.name()]));
        self.set("tie_word_embeddings", !self.tensors.contains_key(HEAD));
        match self.tensors.get(EMBEDDING) {
            Some((_, entry)) => self.set("vocab_size", entry.shape[0]),
            None => self.reasons.push(format!("tensor {EMBEDDING} is missing")),
        }
        self.config.entry("rope_theta").or_insert(json!(DEFAULT_THETA));
        let ends = ["eos_token_id", "eot_token_id", "eom_token_id"];
        let end = |id: &&str| self.metadata.get(format!("tokenizer.ggml.{id}").as_str())?.unsigned();
        let mut ends: Vec<u64> = ends.iter().filter_map(end).collect();
        ends.dedup();
        self.set("eos_token_id", ends);
        for (key, supported) in FIXED {
            match self.get(key) {
                Some(value) if value.as_f64() != Some(supported) => {
                    self.refuse(key, format_args!(" is {value}; supported: {supported}"));
                }
                _ => {}
            }
        }
        self.window(architecture);
        self.rope(architecture);
        if matches!(architecture, Architecture::DeepseekV2 | Architecture::DeepseekV3) {
            self.latent_attention();
        } else {
            self.heads();
        }
        self.experts(architecture);
        match architecture {
            Architecture::Llama => {
                // Files say it by having them.
                self.set("attention_bias", self.tensors.contains_key("blk.0.attn_q.bias"));
                self.set("mlp_bias", self.tensors.contains_key("blk.0.ffn_gate.bias"));
            }
            Architecture::Gemma2 | Architecture::Gemma3 => self.gemma_scale(architecture),
            _ => {}
        }
    }

    fn fields(&self, list: &[(&str, &str)]) -> Map<String, Json> {
        list.iter().filter_map(|(key, field)| Some(((*field).to_owned(), self.get(key)?))).collect()
    }

    /// llama.cpp has one name for Llama, Mistral and Mixtral, and one for DeepSeek-V2 and V3.
    fn architecture(&mut self) -> Architecture {
        match self.prefix {
            "qwen2" => Architecture::Qwen2,
            "qwen3" => Architecture::Qwen3,
            "qwen3moe" => Architecture::Qwen3Moe,
            "phi3" => Architecture::Phi3,
            "gemma2" => Architecture::Gemma2,
            "gemma3" => Architecture::Gemma3,
            "deepseek2" => match self.get("expert_gating_func").map(|v| v.as_u64().ok_or(v)) {
                None | Some(Ok(0 | GATING_SOFTMAX)) => Architecture::DeepseekV2,
                Some(Ok(GATING_SIGMOID)) => Architecture::DeepseekV3,
                Some(other) => {
                    let other = other.map_or_else(|v| v.to_string(), |v| v.to_string());
                    let supported = format!("{GATING_SOFTMAX} (softmax), {GATING_SIGMOID} (sigmoid)");
                    self.refuse("expert_gating_func", format_args!(" is {other}; supported: {supported}"));
                    Architecture::DeepseekV3
                }
            },
            _ if self.get(EXPERT_COUNT).is_some_and(|v| v != 0) => Architecture::Mixtral,
            _ if self.number("attention.sliding_window").is_some() => Architecture::Mistral,
            _ => Architecture::Llama,
        }
    }

    /// A window of 0 is none.
    fn window(&mut self, architecture: Architecture) {
        let window = self.config.get("sliding_window").filter(|v| **v != 0).cloned();
        self.set("use_sliding_window", window.is_some() || architecture == Architecture::Gemma2);
        match (architecture, window) {
            (Architecture::Gemma3, None) => {
                self.set("sliding_window", Json::Null);
                self.set("sliding_window_pattern", 1);
            }
            (Architecture::Gemma2, Some(_)) => match self.config.remove("sliding_window_pattern") {
                Some(pattern) if pattern != 2 => {
                    self.refuse("attention.sliding_window_pattern", format_args!(" is {pattern}; supported: 2"));
                }
                _ => {}
            },
            (Architecture::Gemma2, None) => {}
            (Architecture::Qwen2 | Architecture::Qwen3, Some(window)) => {
                let reason = format_args!(" is {window}, but nothing says which layers have it");
                self.refuse("attention.sliding_window", reason);
            }
            (_, Some(_)) => {}
            (_, None) => self.set("sliding_window", Json::Null),
        }
    }

    fn rope(&mut self, architecture: Architecture) {
        let mut rope = self.fields(&ROPE_FIELDS);
        // Old files have the factor of linear scaling under a name of its own.
        if let (None, Some(factor)) = (rope.get("factor"), self.get("rope.scale_linear")) {
            rope.insert("factor".into(), factor);
        }
        let kind = rope.get("rope_type").and_then(Json::as_str).unwrap_or("linear").to_owned();
        let attention = self.number("rope.scaling.attn_factor").unwrap_or(1.0);
        let log_multiplier = self.number("rope.scaling.yarn_log_multiplier");
        let factor = rope.get("factor").and_then(Json::as_f64).unwrap_or(0.0);
        let latent = matches!(architecture, Architecture::DeepseekV2 | Architecture::DeepseekV3);
        if attention != 1.0 && (kind != "yarn" || latent) {
            self.refuse("rope.scaling.attn_factor", format_args!(" is {attention}; supported: 1"));
        }
        if let Some(multiplier) = log_multiplier.filter(|_| !latent) {
            let reason = format_args!(" is {multiplier}; supported with deepseek2 alone");
            self.refuse("rope.scaling.yarn_log_multiplier", reason);
        }
        if kind == "none" || (kind == "linear" && factor == 0.0) {
            return;
        }
        if kind == "yarn" {
            match log_multiplier {
                // A tenth of DeepSeek's `mscale_all_dim`, in f32: rounded to what a config would say. Its
                // `mscale` is not in the file; every released model has the same for both.
                Some(tenth) => {
                    let mscale = (tenth * 1e7).round() / 1e6;
                    rope.insert("mscale".into(), json!(mscale));
                    rope.insert("mscale_all_dim".into(), json!(mscale));
                }
                // llama.cpp multiplies yarn's own factor by the file's, a config has the product.
                None if attention != 1.0 => {
                    let own = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
                    rope.insert("attention_factor".into(), json!(own * attention));
                }
                None => {}
            }
        }
        rope.insert("rope_type".into(), json!(kind));
        self.set("rope_scaling", rope);
    }

    /// All heads are of one width, and rotated as a whole.
    fn heads(&mut self) {
        let of = |field: &str| self.config.get(field).and_then(Json::as_u64);
        let divided = || of("hidden_size")?.checked_div(of("num_attention_heads")?);
        let width = of("head_dim").or_else(divided);
        for key in ["attention.value_length", "rope.dimension_count"] {
            if let Some(value) = self.get(key).filter(|v| v.as_u64() != width) {
                self.refuse(key, format_args!(" is {value}; only the width of a head is supported"));
            }
        }
    }

    /// Widths of latent attention. Files with `attn_kv_b` have a head's own widths as `key_length` and
    /// `value_length`; newer ones have the cached row's there, and the head's as `…_mla`.
    fn latent_attention(&mut self) {
        self.config.remove("num_key_value_heads");
        let width = |of_head: &str, plain: &str| self.get(of_head).or_else(|| self.get(plain));
        let key = width("attention.key_length_mla", "attention.key_length");
        let value = width("attention.value_length_mla", "attention.value_length");
        let rope = self.get("rope.dimension_count");
        let (key, rope_width) = (key.as_ref().and_then(Json::as_u64), rope.as_ref().and_then(Json::as_u64));
        match (key, rope_width, value) {
            (Some(key), Some(rope), Some(value)) if rope < key => {
                self.set("qk_nope_head_dim", key - rope);
                self.set("qk_rope_head_dim", rope);
                self.set("v_head_dim", value);
            }
            _ => self.refuse(
                "attention.key_length",
                ", attention.value_length and rope.dimension_count must be there, the last below the first",
            ),
        }
        // Ranks are required, but the one of queries: a file leaves it out, or has 0, if they have none.
        if self.config.get("q_lora_rank").is_some_and(|v| *v == 0) {
            self.config.remove("q_lora_rank");
        }
    }

    fn experts(&mut self, architecture: Architecture) {
        let (name, normalized) = match architecture {
            Architecture::Mixtral => (EXPERT_FIELDS[0], true),
            Architecture::Qwen3Moe => (EXPERT_FIELDS[1], true),
            Architecture::DeepseekV2 | Architecture::DeepseekV3 => (EXPERT_FIELDS[2], false),
            _ => {
                if let Some(experts) = self.get(EXPERT_COUNT).filter(|v| *v != 0) {
                    self.refuse(EXPERT_COUNT, format_args!(" is {experts}; {} is dense", architecture.name()));
                }
                return;
            }
        };
        if let Some(count) = self.get(EXPERT_COUNT) {
            self.set(name, count);
        }
        let norm = self.config.entry("norm_topk_prob").or_insert(json!(normalized)).clone();
        let scale = self.number("expert_weights_scale");
        if scale.is_none() {
            self.config.remove("routed_scaling_factor"); // 0 is none
        }
        match architecture {
            Architecture::DeepseekV2 => {
                if norm != false {
                    self.refuse(
                        "expert_weights_norm",
                        format_args!(" is {norm}; with softmax only false is supported"),
                    );
                }
                let grouped = self.config.get("n_group").and_then(Json::as_u64).is_some_and(|n| n > 1);
                self.set("topk_method", if grouped { "group_limited_greedy" } else { "greedy" });
            }
            Architecture::DeepseekV3 => {
                if !self.config.contains_key("n_group") {
                    tracing::warn!("the file does not say expert_group_count: experts are chosen among all of a layer");
                }
            }
            _ => {
                if let Some(scale) = scale.filter(|v| *v != 1.0) {
                    self.refuse("expert_weights_scale", format_args!(" is {scale}; supported: 1"));
                }
                if architecture == Architecture::Mixtral && norm != true {
                    self.refuse("expert_weights_norm", format_args!(" is {norm}; supported: true"));
                }
            }
        }
    }

    /// `query_pre_attn_scalar` is not in the file: it is the width of a head but for the 27B models, which have
    /// hidden size by heads. llama.cpp tells them by their layers.
    fn gemma_scale(&mut self, architecture: Architecture) {
        let of = |field: &str| self.config.get(field).and_then(Json::as_u64);
        let layers = if architecture == Architecture::Gemma2 { 46 } else { 62 };
        let divided = of("hidden_size").zip(of("num_attention_heads")).and_then(|(h, n)| h.checked_div(n));
        let scalar = if of("num_hidden_layers") == Some(layers) { divided } else { of("head_dim").or(divided) };
        if let Some(scalar) = scalar {
            self.set("query_pre_attn_scalar", scalar);
        }
    }
}

/// A value as JSON. A list with one value for all layers is that value; of another only its length, which no
/// field accepts.
fn scalar(value: &Value<'_>) -> Json {
    match *value {
        Value::Unsigned(v) => json!(v),
        Value::Signed(v) => json!(v),
        Value::Float(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::Text(v) => json!(v),
        Value::Array(array) => {
            uniform(array).map_or_else(|| json!(format!("a list of {}", array.len())), |v| scalar(&v))
        }
    }
}

/// The value of all elements, if it is one.
fn uniform(array: Array<'_>) -> Option<Value<'_>> {
    let first = array.iter().next()?;
    array.iter().all(|v| v == first).then_some(first)
}
