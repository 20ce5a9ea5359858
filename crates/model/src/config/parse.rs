//! From JSON to [`ModelConfig`]: which fields exist, their ranges, and every refusal.
//!
//! Fields are named as in Hugging Face configs, in the style of published files (`torch_dtype`,
//! `rope_theta`, `rope_scaling`) and the newer one (`dtype`, `rope_parameters`). Code that a
//! checkpoint brings (`auto_map`) is never run, so it is ignored.

use std::ops::RangeInclusive;

use baton_device::{DType, Routing};
use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::{Architecture, ConfigError, DeepseekV3Config, Family, LlamaConfig, ModelConfig, quantization, rope};

const FILE: &str = "config.json";

// Far above any published model; their products stay far below 2^63.
const WIDTH: RangeInclusive<usize> = 1..=1 << 20;
const LAYERS: RangeInclusive<usize> = 1..=1024;
const HEADS: RangeInclusive<usize> = 1..=1024;
const HEAD_DIM: RangeInclusive<usize> = 1..=4096;
const VOCAB: RangeInclusive<usize> = 1..=1 << 22;
/// Positions below 2^24 are exact in f32.
const POSITIONS: RangeInclusive<usize> = 1..=1 << 24;
const EXPERTS: RangeInclusive<usize> = 1..=4096;
/// Experts of all layers: bounds the list of tensors that a config can ask for.
const TOTAL_EXPERTS: usize = 1 << 16;

/// A JSON object, or why it is none.
pub(crate) fn json_object(file: &'static str, json: &[u8]) -> Result<Map<String, Value>, ConfigError> {
    let refuse = |reason: String| ConfigError { file, reasons: vec![reason] };
    match serde_json::from_slice(json) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(refuse("it is not a JSON object".into())),
        Err(error) => Err(refuse(format!("it is not valid JSON: {error}"))),
    }
}

pub(super) fn model_config(json: &[u8]) -> Result<ModelConfig, ConfigError> {
    let map = json_object(FILE, json)?;
    let mut fields = Fields::new(&map, "");
    let Some(architecture) = architecture(&mut fields) else {
        return Err(ConfigError { file: FILE, reasons: fields.reasons });
    };
    refuse_unsupported(&mut fields, architecture);

    let num_heads = fields.size("num_attention_heads", HEADS);
    let hidden_size = fields.size("hidden_size", WIDTH);
    let num_layers = fields.size("num_hidden_layers", LAYERS);
    let max_position_embeddings = fields.size("max_position_embeddings", POSITIONS);
    let family = match architecture {
        Architecture::DeepseekV3 => Family::DeepseekV3(deepseek_v3(&mut fields, num_heads, num_layers)),
        _ => Family::Llama(llama(&mut fields, architecture, num_heads, hidden_size)),
    };
    let rope_dim = match &family {
        Family::Llama(c) => c.head_dim,
        Family::DeepseekV3(c) => c.qk_rope_head_dim,
    };
    if rope_dim % 2 != 0 {
        fields.refuse(format!("the rotary width {rope_dim} is odd; pairs of columns are rotated"));
    }
    let config = ModelConfig {
        architecture,
        vocab_size: fields.size("vocab_size", VOCAB),
        hidden_size,
        intermediate_size: fields.size("intermediate_size", WIDTH),
        num_layers,
        num_heads,
        rms_norm_eps: fields.number("rms_norm_eps", "a number from 0 to 1", |v| (0.0..=1.0).contains(&v)) as f32,
        max_position_embeddings,
        tie_word_embeddings: fields.flag("tie_word_embeddings", false),
        rope: rope::parse(&mut fields, rope_dim, max_position_embeddings),
        dtype: dtype(&mut fields),
        quantization: quantization::parse(&mut fields),
        eos_token_ids: fields.token_ids("eos_token_id").unwrap_or_default(),
        family,
    };
    if fields.reasons.is_empty() { Ok(config) } else { Err(ConfigError { file: FILE, reasons: fields.reasons }) }
}

/// The one architecture that the config names, by class or, without that, by type.
fn architecture(fields: &mut Fields<'_>) -> Option<Architecture> {
    let supported = || Architecture::ALL.map(Architecture::name).join(", ");
    let model_type = fields.text("model_type");
    let found = match fields.get("architectures") {
        Some(Value::Array(list)) if list.len() == 1 => {
            let found = Architecture::ALL.into_iter().find(|a| list[0] == a.name());
            if found.is_none() {
                fields.only("architectures", &Architecture::ALL.map(|a| json!([a.name()])));
            }
            found
        }
        Some(_) => {
            fields.refuse(format!("architectures must be a list of one name; supported: {}", supported()));
            None
        }
        None => {
            let found = Architecture::ALL.into_iter().find(|a| model_type == Some(a.model_type()));
            match model_type {
                None => fields.refuse(format!("architectures and model_type are missing; supported: {}", supported())),
                Some(_) => fields.only("model_type", &Architecture::ALL.map(|a| json!(a.model_type()))),
            }
            found
        }
    }?;
    fields.only("model_type", &[json!(found.model_type())]);
    Some(found)
}

/// What changes a model's results and is not built.
fn refuse_unsupported(fields: &mut Fields<'_>, architecture: Architecture) {
    fields.only("hidden_act", &[json!("silu")]);
    fields.only("attention_bias", &[json!(false)]);
    fields.only("mlp_bias", &[json!(false)]);
    if let Some(factor) = fields.get("partial_rotary_factor")
        && factor.as_f64() != Some(1.0)
    {
        fields.refuse("partial_rotary_factor other than 1 is not supported");
    }
    // Qwen's configs state a window and then whether it is used: by default it is not.
    let default = !matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3);
    let window = fields.get("sliding_window").is_some();
    if fields.flag("use_sliding_window", default) && window {
        fields.refuse("sliding_window is in use; only full attention is supported");
    }
    if let Some(types) = fields.get("layer_types") {
        let full = |t: &Value| t == "full_attention";
        if !types.as_array().is_some_and(|types| types.iter().all(full)) {
            fields.refuse("layer_types names other layers than full_attention; only full attention is supported");
        }
    }
}

fn llama(fields: &mut Fields<'_>, architecture: Architecture, num_heads: usize, hidden_size: usize) -> LlamaConfig {
    let num_kv_heads = fields.size_or("num_key_value_heads", num_heads, HEADS);
    if !num_heads.is_multiple_of(num_kv_heads) {
        fields
            .refuse(format!("num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"));
    }
    let head_dim = fields.optional_size("head_dim", HEAD_DIM).unwrap_or_else(|| {
        if !hidden_size.is_multiple_of(num_heads) {
            fields.refuse(format!(
                "hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and head_dim is missing"
            ));
        }
        hidden_size / num_heads
    });
    LlamaConfig {
        num_kv_heads,
        head_dim,
        qkv_bias: architecture == Architecture::Qwen2,
        qk_norm: architecture == Architecture::Qwen3,
    }
}

fn deepseek_v3(fields: &mut Fields<'_>, num_heads: usize, num_layers: usize) -> DeepseekV3Config {
    fields.only("scoring_func", &[json!("sigmoid")]);
    fields.only("topk_method", &[json!("noaux_tc")]);
    fields.only("moe_layer_freq", &[json!(1)]);
    fields.only("num_key_value_heads", &[json!(num_heads)]);
    let experts = fields.size("n_routed_experts", EXPERTS);
    if experts * num_layers > TOTAL_EXPERTS {
        fields.refuse(format!("{num_layers} layers of {experts} experts are more than {TOTAL_EXPERTS} experts"));
    }
    let n_group = fields.size_or("n_group", 1, 1..=EXPERTS.into_inner().1);
    let topk_group = fields.size_or("topk_group", n_group, 1..=EXPERTS.into_inner().1);
    let top_k = fields.size("num_experts_per_tok", EXPERTS);
    if !experts.is_multiple_of(n_group) || (n_group > 1 && experts / n_group < 2) {
        fields.refuse(format!("{experts} experts cannot be split into {n_group} groups of at least two"));
    } else if topk_group > n_group {
        fields.refuse(format!("topk_group {topk_group} exceeds n_group {n_group}"));
    } else if top_k > topk_group * (experts / n_group) {
        fields.refuse(format!("num_experts_per_tok {top_k} exceeds the experts of {topk_group} of {n_group} groups"));
    }
    let scaling = fields.optional_number("routed_scaling_factor", "a positive number", |v| v > 0.0 && v < 1e6);
    DeepseekV3Config {
        q_lora_rank: fields.optional_size("q_lora_rank", WIDTH),
        kv_lora_rank: fields.size("kv_lora_rank", WIDTH),
        qk_nope_head_dim: fields.size("qk_nope_head_dim", HEAD_DIM),
        qk_rope_head_dim: fields.size("qk_rope_head_dim", HEAD_DIM),
        v_head_dim: fields.size("v_head_dim", HEAD_DIM),
        rope_interleaved: fields.flag("rope_interleave", true),
        first_k_dense_replace: fields.size("first_k_dense_replace", 0..=num_layers),
        moe_intermediate_size: fields.size("moe_intermediate_size", WIDTH),
        n_routed_experts: experts,
        n_shared_experts: fields.size_or("n_shared_experts", 0, 0..=256),
        routing: Routing {
            top_k,
            n_group,
            topk_group,
            correction_bias: Vec::new(),
            norm_topk_prob: fields.flag("norm_topk_prob", true),
            scaling_factor: scaling.unwrap_or(1.0) as f32,
        },
    }
}

fn dtype(fields: &mut Fields<'_>) -> Option<DType> {
    let name = if fields.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match fields.text(name)? {
        "float32" => Some(DType::F32),
        "float16" => Some(DType::F16),
        "bfloat16" => Some(DType::BF16),
        _ => {
            fields.only(name, &[json!("float32"), json!("float16"), json!("bfloat16")]);
            None
        }
    }
}
