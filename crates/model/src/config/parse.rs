//! From JSON to [`ModelConfig`]: which fields exist, their ranges, and every refusal.
//!
//! Fields are named as in Hugging Face configs, in the style of published files (`torch_dtype`,
//! `rope_theta`, `rope_scaling`) and the newer one (`dtype`, `rope_parameters`). Code that a
//! checkpoint brings (`auto_map`) is never run, so it is ignored.

use std::ops::RangeInclusive;

use baton_device::{Activation, DType};
use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::{Architecture, ConfigError, Family, ModelConfig, RopeConfig, deepseek_v4, families, quantization, rope};

const FILE: &str = "config.json";

// Far above any published model; their products stay far below 2^63.
pub(super) const WIDTH: RangeInclusive<usize> = 1..=1 << 20;
const LAYERS: RangeInclusive<usize> = 1..=1024;
pub(super) const HEADS: RangeInclusive<usize> = 1..=1024;
pub(super) const HEAD_DIM: RangeInclusive<usize> = 1..=4096;
const VOCAB: RangeInclusive<usize> = 1..=1 << 22;
/// Positions below 2^24 are exact in f32.
pub(super) const POSITIONS: RangeInclusive<usize> = 1..=1 << 24;

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
    // Of several only the first is of use: the others build on it.
    let mtp_layers = match architecture {
        Architecture::DeepseekV3 => fields.size_or("num_nextn_predict_layers", 0, 0..=1 << 10).min(1),
        _ => 0,
    };
    let max_position_embeddings = fields.size("max_position_embeddings", POSITIONS);
    let (family, rope) =
        family(&mut fields, architecture, [num_layers, num_heads, hidden_size, max_position_embeddings]);
    let moe = families::moe(&mut fields, architecture, (num_layers, mtp_layers));
    let intermediate_size = match &moe {
        Some(moe) if architecture == Architecture::DeepseekV4 => moe.intermediate_size,
        _ => fields.size("intermediate_size", WIDTH),
    };
    let gemma = architecture.is_gemma();
    let config = ModelConfig {
        architecture,
        vocab_size: fields.size("vocab_size", VOCAB),
        hidden_size,
        intermediate_size,
        num_layers,
        mtp_layers,
        num_heads,
        rms_norm_eps: fields.number("rms_norm_eps", "a number from 0 to 1", |v| (0.0..=1.0).contains(&v)) as f32,
        max_position_embeddings,
        tie_word_embeddings: fields.flag("tie_word_embeddings", gemma),
        hidden_act: if gemma { Activation::GeluTanh } else { Activation::Silu },
        mlp_bias: families::bias(&mut fields, "mlp_bias", architecture == Architecture::Llama),
        moe,
        fused_projections: architecture == Architecture::Phi3,
        post_norms: gemma,
        norm_offset: if gemma { 1.0 } else { 0.0 },
        embedding_scale: gemma.then(|| (hidden_size as f32).sqrt()),
        logit_softcap: families::softcap(&mut fields, architecture, "final_logit_softcapping", 30.0),
        rope,
        dtype: dtype(&mut fields),
        quantization: quantization::parse(&mut fields, architecture),
        eos_token_ids: fields.token_ids("eos_token_id").unwrap_or_default(),
        family,
    };
    if fields.reasons.is_empty() { Ok(config) } else { Err(ConfigError { file: FILE, reasons: fields.reasons }) }
}

/// What is the family's own, and the rotary embedding.
fn family(
    fields: &mut Fields<'_>,
    architecture: Architecture,
    [num_layers, num_heads, hidden_size, max_positions]: [usize; 4],
) -> (Family, RopeConfig) {
    if architecture == Architecture::DeepseekV4 {
        let (own, rope) = deepseek_v4::parse(fields, [num_layers, num_heads, max_positions]);
        refuse_odd(fields, own.rope_dim);
        return (Family::DeepseekV4(own), rope);
    }
    let windows = families::windows(fields, architecture, num_layers);
    if architecture.is_deepseek() {
        let own = families::deepseek(fields, architecture, num_heads);
        refuse_odd(fields, own.qk_rope_head_dim);
        let rope = rope::parse(fields, own.qk_rope_head_dim, max_positions, 1e4);
        return (Family::Deepseek(own), rope);
    }
    let mut own = families::llama(fields, architecture, (num_heads, hidden_size), windows);
    refuse_odd(fields, own.head_dim);
    let rope = match architecture {
        Architecture::Gemma3 => {
            let [full, windowed] = rope::parse_two(fields, own.head_dim, max_positions);
            own.window_rope = Some(windowed);
            full
        }
        Architecture::Mixtral => rope::parse(fields, own.head_dim, max_positions, 1e6),
        _ => rope::parse(fields, own.head_dim, max_positions, 1e4),
    };
    (Family::Llama(own), rope)
}

fn refuse_odd(fields: &mut Fields<'_>, rope_dim: usize) {
    if !rope_dim.is_multiple_of(2) {
        fields.refuse(format!("the rotary width {rope_dim} is odd; pairs of columns are rotated"));
    }
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
    if architecture.is_gemma() {
        // hidden_act of its configs is a leftover that transformers does not read.
        fields.only("hidden_activation", &[json!("gelu_pytorch_tanh")]);
        fields.only("use_bidirectional_attention", &[json!(false)]);
    } else {
        fields.only("hidden_act", &[json!("silu")]);
    }
    if architecture != Architecture::DeepseekV4 {
        fields.only("partial_rotary_factor", &[json!(1), json!(1.0)]);
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
