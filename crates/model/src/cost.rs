//! What a step costs: multiply-adds of a model's matrices, and bytes of weights that are read for them. Benchmarks
//! hold it against what a machine can do.

use crate::arch;
use crate::checkpoint::TensorSpec;
use crate::config::ModelConfig;

/// The matrices of a model, by who meets them. Attention over the context is no matrix and not among them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepCost {
    /// Met by every token.
    layers: Part,
    /// Routed experts; a token meets some of them.
    experts: Part,
    /// The share of the experts that a token meets.
    expert_share: f64,
    /// Met by the tokens that are sampled from.
    head: Part,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Part {
    elements: u64,
    bytes: u64,
}

impl StepCost {
    /// Of a model whose matrices take the bytes that `kept` says.
    pub(crate) fn new<'a>(
        config: &ModelConfig,
        specs: impl Iterator<Item = &'a TensorSpec>,
        kept: impl Fn(&TensorSpec) -> u64,
    ) -> Self {
        let mut cost = Self::default();
        if let Some(moe) = &config.moe {
            cost.expert_share = moe.routing.top_k as f64 / moe.num_experts.max(1) as f64;
        }
        for spec in specs.filter(|s| s.role.has_format()) {
            let part = match spec.name.as_str() {
                name if arch::is_head(config, name) => &mut cost.head,
                name if name == arch::embedding_weight(config) => continue, // of which a row is copied
                name if arch::is_expert(name) => &mut cost.experts,
                _ => &mut cost.layers,
            };
            let elements: usize = spec.shape.iter().product();
            part.elements += elements as u64;
            part.bytes += kept(spec);
        }
        cost
    }

    /// Multiply-adds of a step of `tokens` tokens, of which `sampled` are sampled from.
    pub fn mul_adds(&self, tokens: usize, sampled: usize) -> f64 {
        let each = self.layers.elements as f64 + self.experts.elements as f64 * self.expert_share;
        tokens as f64 * each + sampled as f64 * self.head.elements as f64
    }

    /// Bytes of weights read for it, each once. Tokens choose their experts as if at random: of `E`, `k` each, `n` tokens
    /// meet `E (1 - (1 - k/E)^n)` on average.
    pub fn bytes(&self, tokens: usize, sampled: usize) -> f64 {
        let met = 1.0 - (1.0 - self.expert_share).powi(tokens as i32);
        let head = if sampled > 0 { self.head.bytes } else { 0 };
        self.layers.bytes as f64 + self.experts.bytes as f64 * met + head as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_costs_what_the_shapes_say() {
        let dense = r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "vocab_size": 100,
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "eos_token_id": 1"#;
        let cost = |json: &str| {
            let config = ModelConfig::parse(json.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
            StepCost::new(&config, arch::specs(&config, |_| None).0.values(), |spec| {
                2 * spec.shape.iter().product::<usize>() as u64
            })
        };
        let layers = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64);
        for tied in [true, false] {
            let cost = cost(&format!("{dense}, \"tie_word_embeddings\": {tied}}}"));
            assert_eq!(cost.mul_adds(5, 2), f64::from(5 * layers + 2 * 3200));
            assert_eq!((cost.bytes(5, 2), cost.bytes(5, 0)), (f64::from(2 * (layers + 3200)), f64::from(2 * layers)));
        }
        let moe = dense.replace("Qwen2ForCausalLM", "Qwen3MoeForCausalLM").replace("\"qwen2\"", "\"qwen3_moe\"");
        let moe = cost(&format!(
            "{moe}, \"tie_word_embeddings\": true, \"num_experts\": 8, \"num_experts_per_tok\": 2,
            \"moe_intermediate_size\": 16, \"norm_topk_prob\": true, \"head_dim\": 8}}"
        ));
        let expert = 3 * 32 * 16;
        let dense = f64::from(3 * (2 * 32 * 32 + 2 * 16 * 32 + 8 * 32));
        assert_eq!(moe.mul_adds(1, 0), dense + f64::from(3 * 2 * expert));
        assert_eq!(moe.bytes(1, 0), 2.0 * (dense + f64::from(3 * 2 * expert)));
        assert!(moe.bytes(1000, 0) > 2.0 * (dense + f64::from(3 * 8 * expert)) - 1.0);
    }
}
