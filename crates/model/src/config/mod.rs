//! `config.json` as a typed [`ModelConfig`].
//!
//! Invariant: a config that exists can be run. Everything this crate cannot run is refused here and
//! nowhere else, with every reason at once; sizes are capped so that products of them cannot overflow.

mod fields;
mod generation;
mod parse;
mod pattern;
mod quantization;
mod rope;

pub use generation::GenerationConfig;
pub(crate) use parse::json_object;
pub use quantization::QuantizationConfig;
pub use rope::{RopeConfig, RopeScaling};

use baton_device::{DType, Routing};

/// Why a config file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file} cannot be served: {}", reasons.join("; "))]
pub struct ConfigError {
    /// The file at fault.
    pub file: &'static str,
    /// Every reason found.
    pub reasons: Vec<String>,
}

/// The architectures that can be served. To add one: a variant here, a parser in `parse.rs`, a module
/// in `arch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3 (arXiv 2302.13971, 2407.21783).
    Llama,
    /// Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on q, k and v.
    Qwen2,
    /// Qwen3 (arXiv 2505.09388): Llama with a norm on each query and key head.
    Qwen3,
    /// DeepSeek-V3 and R1 (arXiv 2412.19437).
    DeepseekV3,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Architecture; 4] =
        [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3, Architecture::DeepseekV3];

    /// As in the config's `architectures`.
    pub const fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
            Architecture::DeepseekV3 => "DeepseekV3ForCausalLM",
        }
    }

    /// As in the config's `model_type`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::DeepseekV3 => "deepseek_v3",
        }
    }
}

/// What every decoder has, and its family's own part.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which model.
    pub architecture: Architecture,
    /// Rows of the embedding, width of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of a dense feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Epsilon of the norms.
    pub rms_norm_eps: f32,
    /// Longest context the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Element type that the config states for the weights; the tensors' own decides.
    pub dtype: Option<DType>,
    /// How the weights are quantised, if they are.
    pub quantization: Option<QuantizationConfig>,
    /// Tokens that end a text, where no generation config says otherwise.
    pub eos_token_ids: Vec<u32>,
    /// The rest.
    pub family: Family,
}

/// What is a family's own.
#[derive(Debug, Clone, PartialEq)]
pub enum Family {
    /// Llama and its near copies.
    Llama(LlamaConfig),
    /// DeepSeek-V3.
    DeepseekV3(DeepseekV3Config),
}

/// Grouped-query attention and a dense feed-forward network.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Key/value heads; divides the query heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// A norm on each query and key head, before rotation.
    pub qk_norm: bool,
}

/// Latent attention and mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct DeepseekV3Config {
    /// Width of the query's latent; `None` projects the query directly.
    pub q_lora_rank: Option<usize>,
    /// Width of the latent that keys and values share.
    pub kv_lora_rank: usize,
    /// Query and key width per head without position.
    pub qk_nope_head_dim: usize,
    /// Query and key width per head with rotary position.
    pub qk_rope_head_dim: usize,
    /// Value width per head.
    pub v_head_dim: usize,
    /// Rotary pairs are neighbouring columns.
    pub rope_interleaved: bool,
    /// Layers before the first with experts.
    pub first_k_dense_replace: usize,
    /// Width of an expert.
    pub moe_intermediate_size: usize,
    /// Routed experts of a layer.
    pub n_routed_experts: usize,
    /// Shared experts, kept as one network of that many times the width; 0 for none.
    pub n_shared_experts: usize,
    /// How a token's experts are chosen; the correction bias is a tensor and left empty here.
    pub routing: Routing,
}

impl ModelConfig {
    /// Reads the bytes of a `config.json`.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        parse::model_config(json)
    }
}
