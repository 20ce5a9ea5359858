//! The fields of a config that are a family's own: attention, windows, experts.
//!
//! Where a field is absent, the default of Hugging Face transformers for that architecture counts;
//! null is a value of its own where transformers distinguishes it.

use std::ops::RangeInclusive;

use baton_device::{GroupScore, Groups, Routing, Scoring};
use serde_json::{Value, json};

use super::fields::Fields;
use super::parse::{HEAD_DIM, HEADS, POSITIONS, WIDTH};
use super::{Architecture, DeepseekConfig, IndexerConfig, LlamaConfig, MoeConfig, deepseek_v4};

const EXPERTS: RangeInclusive<usize> = 1..=4096;
/// Experts of all layers: bounds the list of tensors that a config can ask for.
const TOTAL_EXPERTS: usize = 1 << 16;
/// The window that transformers assumes where a config says nothing.
const DEFAULT_WINDOW: usize = 4096;

/// Grouped-query attention; its rotary embeddings are read elsewhere.
pub(super) fn llama(
    fields: &mut Fields<'_>,
    architecture: Architecture,
    (num_heads, hidden_size): (usize, usize),
    windows: Vec<Option<usize>>,
) -> LlamaConfig {
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
    let scaled_by = if architecture.is_gemma() {
        let scalar = fields.optional_number("query_pre_attn_scalar", "a positive number", |v| v > 0.0 && v < 1e6);
        scalar.unwrap_or(256.0) as f32
    } else {
        head_dim as f32
    };
    let fixed = matches!(
        architecture,
        Architecture::Mistral | Architecture::Mixtral | Architecture::Qwen2 | Architecture::Phi3
    );
    let attention_bias = bias(fields, "attention_bias", !fixed);
    LlamaConfig {
        num_kv_heads,
        head_dim,
        qkv_bias: attention_bias || architecture == Architecture::Qwen2,
        o_bias: attention_bias,
        qk_norm: matches!(architecture, Architecture::Qwen3 | Architecture::Qwen3Moe | Architecture::Gemma3),
        scale: scaled_by.sqrt().recip(),
        softcap: softcap(fields, architecture, "attn_logit_softcapping", 50.0),
        windows,
        window_rope: None,
    }
}

/// A switch for biases, refused where transformers has none to switch.
pub(super) fn bias(fields: &mut Fields<'_>, name: &str, exists: bool) -> bool {
    if !exists {
        fields.only(name, &[json!(false)]);
    }
    fields.flag(name, false)
}

/// A soft cap of Gemma 2, by default that of its release; null is none. Gemma 3 has none but by name.
pub(super) fn softcap(fields: &mut Fields<'_>, architecture: Architecture, name: &str, released: f64) -> Option<f32> {
    if !architecture.is_gemma() {
        return None;
    }
    if architecture == Architecture::Gemma2 && !fields.is_stated(name) {
        return Some(released as f32);
    }
    fields.optional_number(name, "a positive number", |v| v > 1e-3 && v < 1e6).map(|cap| cap as f32)
}

/// The window of every layer: `sliding_window`, and which layers it is for.
pub(super) fn windows(fields: &mut Fields<'_>, architecture: Architecture, num_layers: usize) -> Vec<Option<usize>> {
    use Architecture::{
        DeepseekV2, DeepseekV3, DeepseekV4, DeepseekV32, Gemma2, Gemma3, Llama, Mistral, Mixtral, Phi3, Qwen2, Qwen3,
        Qwen3Moe,
    };
    let stated = fields.is_stated("sliding_window");
    let assumed = matches!(architecture, Mistral | Qwen2 | Qwen3 | Gemma2 | Gemma3).then_some(DEFAULT_WINDOW);
    let window = if stated { fields.optional_size("sliding_window", POSITIONS) } else { assumed };
    // Qwen's configs state a window and then whether it is used: by default it is not.
    let used = fields.flag("use_sliding_window", !matches!(architecture, Qwen2 | Qwen3 | Qwen3Moe));
    let window = window.filter(|_| used);

    let by_rule: Vec<bool> = match architecture {
        Mistral | Mixtral | Phi3 => vec![true; num_layers],
        Qwen2 | Qwen3 => {
            let full = fields.size_or("max_window_layers", 28, 0..=1 << 20);
            (0..num_layers).map(|layer| window.is_some() && layer >= full).collect()
        }
        Gemma2 => (0..num_layers).map(|layer| layer % 2 == 0).collect(),
        Gemma3 => {
            let own_name = ["sliding_window_pattern", "_sliding_window_pattern"];
            let name = if fields.get(own_name[0]).is_some() { own_name[0] } else { own_name[1] };
            let pattern = fields.size_or(name, 6, 1..=1 << 20);
            (0..num_layers).map(|layer| (layer + 1) % pattern != 0).collect()
        }
        Llama | Qwen3Moe | DeepseekV2 | DeepseekV3 | DeepseekV32 => {
            if window.is_some() {
                fields.refuse(format!("sliding_window is in use; {} has full attention only", architecture.name()));
            }
            vec![false; num_layers]
        }
        DeepseekV4 => unreachable!("all its layers have a window"),
    };
    let free = matches!(architecture, Qwen2 | Qwen3 | Gemma2 | Gemma3);
    let slides = match layer_types(fields, architecture, num_layers) {
        None => by_rule,
        Some(types) if free => types,
        // Where it decides nothing, it may say the same in other words.
        Some(types) => {
            if types.iter().any(|slides| *slides != (window.is_some() && by_rule[0])) {
                fields.refuse(format!("layer_types names other layers than {} has", architecture.name()));
            }
            by_rule
        }
    };
    if free && window.is_none() && slides.contains(&true) {
        fields.refuse("some layers have sliding attention, but no sliding_window is in use");
    }
    slides.into_iter().map(|slides| window.filter(|_| slides)).collect()
}

/// Per layer, whether it is named as sliding.
fn layer_types(fields: &mut Fields<'_>, architecture: Architecture, num_layers: usize) -> Option<Vec<bool>> {
    if architecture == Architecture::DeepseekV32 {
        fields.only("layer_types", &[json!(vec!["indexed_attention"; num_layers])]);
        return None;
    }
    let slides = |t: &Value| match t.as_str()? {
        "sliding_attention" => Some(true),
        "full_attention" => Some(false),
        _ => None,
    };
    let list = fields.get("layer_types")?.as_array();
    let types = list.and_then(|types| types.iter().map(slides).collect::<Option<Vec<_>>>());
    if types.as_ref().is_none_or(|types| types.len() != num_layers) {
        fields.refuse(format!(
            "layer_types is not a list of full_attention or sliding_attention for each of {num_layers} layers"
        ));
        return None;
    }
    types
}

/// Latent attention.
pub(super) fn deepseek(fields: &mut Fields<'_>, architecture: Architecture, num_heads: usize) -> DeepseekConfig {
    fields.only("num_key_value_heads", &[json!(num_heads)]);
    let indexed = architecture == Architecture::DeepseekV32;
    let config = DeepseekConfig {
        // The indexer's queries come from it.
        q_lora_rank: match indexed {
            true => Some(fields.size("q_lora_rank", WIDTH)),
            false => fields.optional_size("q_lora_rank", WIDTH),
        },
        kv_lora_rank: fields.size("kv_lora_rank", WIDTH),
        qk_nope_head_dim: fields.size("qk_nope_head_dim", HEAD_DIM),
        qk_rope_head_dim: fields.size("qk_rope_head_dim", HEAD_DIM),
        v_head_dim: fields.size("v_head_dim", HEAD_DIM),
        rope_interleaved: architecture == Architecture::DeepseekV2 || fields.flag("rope_interleave", true),
        bias: fields.flag("attention_bias", false),
        indexer: None,
    };
    let indexer = indexed.then(|| indexer(fields, config.qk_rope_head_dim));
    DeepseekConfig { indexer, ..config }
}

/// What chooses what is read, by heads of which so many columns are rotated.
pub(super) fn indexer(fields: &mut Fields<'_>, rotated: usize) -> IndexerConfig {
    let head_dim = fields.size("index_head_dim", HEAD_DIM);
    if head_dim < rotated {
        fields.refuse(format!("index_head_dim {head_dim} is less than the {rotated} columns that are rotated"));
    }
    IndexerConfig { heads: fields.size("index_n_heads", HEADS), head_dim, top_k: fields.size("index_topk", POSITIONS) }
}

/// Experts, where the architecture has them.
pub(super) fn moe(
    fields: &mut Fields<'_>,
    architecture: Architecture,
    (num_layers, mtp_layers): (usize, usize),
) -> Option<MoeConfig> {
    let experts_field = match architecture {
        Architecture::Mixtral => "num_local_experts",
        // The second as transformers 5 writes it.
        Architecture::Qwen3Moe if fields.get("num_experts").is_some() => "num_experts",
        Architecture::Qwen3Moe => "num_local_experts",
        architecture if architecture.is_deepseek() => "n_routed_experts",
        _ => return None,
    };
    let num_experts = fields.size(experts_field, EXPERTS);
    if num_experts * num_layers > TOTAL_EXPERTS {
        fields.refuse(format!("{num_layers} layers of {num_experts} experts are more than {TOTAL_EXPERTS} experts"));
    }
    let top_k = fields.size("num_experts_per_tok", EXPERTS);
    let (scoring, groups, by_token) = (Scoring::Softmax, None, None);
    let shares = Routing { top_k, scoring, groups, norm_topk_prob: true, scaling_factor: 1.0, by_token };
    let (layers, routing) = match architecture {
        Architecture::Mixtral => (vec![true; num_layers], shares),
        Architecture::Qwen3Moe => {
            let norm_topk_prob = fields.flag("norm_topk_prob", false);
            (sparse_layers(fields, num_layers), Routing { norm_topk_prob, ..shares })
        }
        Architecture::DeepseekV4 => (vec![true; num_layers], deepseek_v4::routing(fields, shares)),
        _ => {
            fields.only("moe_layer_freq", &[json!(1)]);
            let dense = fields.size("first_k_dense_replace", 0..=num_layers);
            let kinds: Vec<_> = (0..num_layers).map(|layer| if layer < dense { "dense" } else { "sparse" }).collect();
            fields.only("mlp_layer_types", &[json!(kinds)]);
            let layers = (0..num_layers + mtp_layers).map(|layer| layer >= dense).collect();
            (layers, deepseek_routing(fields, architecture, shares))
        }
    };
    let eligible = check_groups(fields, num_experts, routing.groups);
    if top_k > eligible {
        fields.refuse(format!("num_experts_per_tok {top_k} exceeds the {eligible} experts that can be chosen"));
    }
    let width = if architecture == Architecture::Mixtral { "intermediate_size" } else { "moe_intermediate_size" };
    let shared = match architecture {
        Architecture::DeepseekV4 => 1,
        architecture if architecture.is_deepseek() => fields.size_or("n_shared_experts", 0, 0..=256),
        _ => 0,
    };
    Some(MoeConfig {
        layers,
        intermediate_size: fields.size(width, WIDTH),
        num_experts,
        num_shared_experts: shared,
        routing,
    })
}

/// Every `decoder_sparse_step`-th layer except `mlp_only_layers` (Qwen3-MoE).
fn sparse_layers(fields: &mut Fields<'_>, num_layers: usize) -> Vec<bool> {
    let step = fields.size_or("decoder_sparse_step", 1, 1..=1 << 20);
    let dense: Vec<usize> = match fields.get("mlp_only_layers") {
        None => Vec::new(),
        Some(list) => serde_json::from_value(list.clone()).unwrap_or_else(|_| {
            fields.refuse("mlp_only_layers is not a list of layer numbers");
            Vec::new()
        }),
    };
    (0..num_layers).map(|layer| (layer + 1) % step == 0 && !dense.contains(&layer)).collect()
}

/// V3 chooses by biased sigmoids among the groups with the best pairs, V2 by softmax among those with
/// the best experts. V2's weights are never normalised: transformers does not read its
/// `norm_topk_prob`, and every published file has it false.
fn deepseek_routing(fields: &mut Fields<'_>, architecture: Architecture, shares: Routing) -> Routing {
    let scaling_factor = scaling_factor(fields, 1.0);
    let groups = |fields: &mut Fields<'_>, score| {
        let count = fields.size_or("n_group", 1, EXPERTS);
        let kept = fields.size_or("topk_group", count, EXPERTS);
        (count > 1).then_some(Groups { count, kept, score })
    };
    if architecture != Architecture::DeepseekV2 {
        fields.only("scoring_func", &[json!("sigmoid")]);
        fields.only("topk_method", &[json!("noaux_tc")]);
        return Routing {
            scoring: Scoring::Sigmoid { correction_bias: Vec::new() },
            groups: groups(fields, GroupScore::TwoBest),
            norm_topk_prob: fields.flag("norm_topk_prob", true),
            scaling_factor,
            ..shares
        };
    }
    fields.only("scoring_func", &[json!("softmax")]);
    fields.only("topk_method", &[json!("greedy"), json!("group_limited_greedy")]);
    let grouped = fields.text("topk_method") == Some("group_limited_greedy");
    Routing {
        groups: if grouped { groups(fields, GroupScore::Best) } else { None },
        norm_topk_prob: false,
        scaling_factor,
        ..shares
    }
}

/// Factor on the weights of experts.
pub(super) fn scaling_factor(fields: &mut Fields<'_>, default: f64) -> f32 {
    let factor = fields.optional_number("routed_scaling_factor", "a positive number", |v| v > 0.0 && v < 1e6);
    factor.unwrap_or(default) as f32
}

/// How many experts can be chosen.
fn check_groups(fields: &mut Fields<'_>, experts: usize, groups: Option<Groups>) -> usize {
    let Some(Groups { count, kept, score }) = groups else { return experts };
    let least = if score == GroupScore::TwoBest { 2 } else { 1 };
    if !experts.is_multiple_of(count) || experts / count < least {
        fields.refuse(format!("{experts} experts cannot be split into {count} groups of at least {least}"));
    } else if kept > count {
        fields.refuse(format!("topk_group {kept} exceeds n_group {count}"));
    }
    kept.min(count) * (experts / count)
}
