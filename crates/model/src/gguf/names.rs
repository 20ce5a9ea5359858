//! Names of tensors: llama.cpp's, and those of Hugging Face checkpoints.

use crate::config::Architecture;

pub(super) const EMBEDDING: &str = "token_embd.weight";
pub(super) const HEAD: &str = "output.weight";
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";
/// Factors of longrope.
pub(super) const LONG_ROPE_FACTORS: [&str; 2] = ["rope_factors_long.weight", "rope_factors_short.weight"];

/// Stands for the number of an expert.
const EXPERT: char = '*';

/// Tensors of a layer, after `blk.{layer}.`, and their names after `model.layers.{layer}.`.
const LAYER: [(&str, &str); 28] = [
    ("attn_k", "self_attn.k_proj"),
    ("attn_k_b", "self_attn.k_b_proj"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("attn_norm", "input_layernorm"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_v_b", "self_attn.v_b_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_down_exps", "mlp.experts.*.down_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_gate_exps", "mlp.experts.*.gate_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_up_exps", "mlp.experts.*.up_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("exp_probs_b", "mlp.gate.e_score_correction"),
];

/// Where an architecture's differ from those.
fn own(architecture: Architecture) -> &'static [(&'static str, &'static str)] {
    match architecture {
        Architecture::Mixtral => &[
            ("ffn_down_exps", "block_sparse_moe.experts.*.w2"),
            ("ffn_gate_exps", "block_sparse_moe.experts.*.w1"),
            ("ffn_gate_inp", "block_sparse_moe.gate"),
            ("ffn_up_exps", "block_sparse_moe.experts.*.w3"),
        ],
        Architecture::Phi3 => &[("ffn_up", "mlp.gate_up_proj")],
        Architecture::Gemma2 | Architecture::Gemma3 => &[
            ("ffn_norm", "pre_feedforward_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ],
        _ => &[],
    }
}

/// The tensors of a Hugging Face checkpoint that one of a GGUF file is.
#[derive(Debug, PartialEq)]
pub(super) enum Name {
    One(String),
    /// One per expert, stacked: the name before and after the expert's number.
    Stacked(String, String),
}

/// The name that the tensor has in Hugging Face checkpoints; `None` if it has none.
pub(super) fn hugging_face(name: &str, architecture: Architecture) -> Option<Name> {
    match name {
        EMBEDDING => return Some(Name::One("model.embed_tokens.weight".into())),
        HEAD => return Some(Name::One("lm_head.weight".into())),
        "output_norm.weight" => return Some(Name::One("model.norm.weight".into())),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (tensor, kind) = rest.rsplit_once('.')?;
    let known = |tensor: &str| own(architecture).iter().chain(&LAYER).find(|t| t.0 == tensor).map(|t| t.1);
    // Old files have a tensor per expert: `ffn_gate.7`.
    let (known, expert) = match tensor.split_once('.') {
        None => (known(tensor)?, None),
        Some((stem, expert)) => (known(&format!("{stem}_exps"))?, Some(expert.parse::<usize>().ok()?)),
    };
    let separator = if tensor == "exp_probs_b" { '_' } else { '.' };
    let full = format!("model.layers.{layer}.{known}{separator}{kind}");
    Some(match (full.split_once(EXPERT), expert) {
        (None, _) => Name::One(full),
        (Some((before, after)), Some(expert)) => Name::One(format!("{before}{expert}{after}")),
        (Some((before, after)), None) => Name::Stacked(before.into(), after.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_has_the_name_that_its_architecture_gives_it() {
        let one = |name: &str| Some(Name::One(name.into()));
        let stacked = |a: &str, b: &str| Some(Name::Stacked(a.into(), b.into()));
        for (name, architecture, wanted) in [
            ("blk.3.ffn_norm.weight", Architecture::Llama, one("model.layers.3.post_attention_layernorm.weight")),
            ("blk.3.ffn_norm.weight", Architecture::Gemma2, one("model.layers.3.pre_feedforward_layernorm.weight")),
            ("blk.0.attn_q.bias", Architecture::Qwen2, one("model.layers.0.self_attn.q_proj.bias")),
            (
                "blk.1.exp_probs_b.bias",
                Architecture::DeepseekV3,
                one("model.layers.1.mlp.gate.e_score_correction_bias"),
            ),
            (
                "blk.1.ffn_up_exps.weight",
                Architecture::Mixtral,
                stacked("model.layers.1.block_sparse_moe.experts.", ".w3.weight"),
            ),
            (
                "blk.1.ffn_down.12.weight",
                Architecture::Mixtral,
                one("model.layers.1.block_sparse_moe.experts.12.w2.weight"),
            ),
            ("blk.1.attn_q.12.weight", Architecture::Llama, None),
            ("blk.x.attn_q.weight", Architecture::Llama, None),
            ("model.norm.weight", Architecture::Llama, None),
        ] {
            assert_eq!(hugging_face(name, architecture), wanted, "{name}");
        }
    }
}
