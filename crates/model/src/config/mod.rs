//! `config.json` as a typed [`ModelConfig`].
//!
//! Invariant: a config that exists can be run. Everything this crate cannot run is refused here and
//! nowhere else, with every reason at once; sizes are capped so that products of them cannot overflow.

mod deepseek_v4;
mod families;
mod fields;
mod generation;
mod parse;
mod pattern;
mod quantization;
mod rope;

pub(crate) use fields::Fields;
pub use generation::GenerationConfig;
pub(crate) use parse::json_object;
pub(crate) use pattern::Pattern;
pub use quantization::QuantizationConfig;
pub(crate) use quantization::of_blocks;
pub use rope::{RopeConfig, RopeScaling};

use baton_device::{Activation, DType, Routing};

/// Why a config file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file} cannot be served: {}", reasons.join("; "))]
pub struct ConfigError {
    /// The file at fault.
    pub file: &'static str,
    /// Every reason found.
    pub reasons: Vec<String>,
}

/// The architectures that can be served. To add one: a variant here, its fields in `parse.rs` and
/// `families.rs`, its tensors and forward in `arch`, its entry in `models/supported.toml`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3 (arXiv 2302.13971, 2407.21783).
    Llama,
    /// Mistral (arXiv 2310.06825): Llama with a sliding window.
    Mistral,
    /// Mixtral (arXiv 2401.04088): Mistral with experts.
    Mixtral,
    /// Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on q, k and v.
    Qwen2,
    /// Qwen3 (arXiv 2505.09388): Llama with a norm on each query and key head.
    Qwen3,
    /// Qwen3-MoE: Qwen3 with experts.
    Qwen3Moe,
    /// Phi-3 (arXiv 2404.14219): Llama with q, k, v and gate, up stored as one tensor each.
    Phi3,
    /// Gemma 2 (arXiv 2408.00118): alternating windows, soft-capping, norms around each half layer.
    Gemma2,
    /// Gemma 3, text only (arXiv 2503.19786): Gemma 2 with head norms for the soft-capping, and two
    /// rotary bases.
    Gemma3,
    /// DeepSeek-V2 and V2-Lite (arXiv 2405.04434).
    DeepseekV2,
    /// DeepSeek-V3 and R1 (arXiv 2412.19437).
    DeepseekV3,
    /// DeepSeek-V3.2: V3 whose attention reads the positions that an indexer chooses.
    DeepseekV32,
    /// DeepSeek-V4: attention to a window and to what is pooled of the tokens before, several residual streams.
    DeepseekV4,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Architecture; 13] = [
        Architecture::Llama,
        Architecture::Mistral,
        Architecture::Mixtral,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Qwen3Moe,
        Architecture::Phi3,
        Architecture::Gemma2,
        Architecture::Gemma3,
        Architecture::DeepseekV2,
        Architecture::DeepseekV3,
        Architecture::DeepseekV32,
        Architecture::DeepseekV4,
    ];

    /// As in the config's `architectures`.
    pub const fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Mistral => "MistralForCausalLM",
            Architecture::Mixtral => "MixtralForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
            Architecture::Qwen3Moe => "Qwen3MoeForCausalLM",
            Architecture::Phi3 => "Phi3ForCausalLM",
            Architecture::Gemma2 => "Gemma2ForCausalLM",
            Architecture::Gemma3 => "Gemma3ForCausalLM",
            Architecture::DeepseekV2 => "DeepseekV2ForCausalLM",
            Architecture::DeepseekV3 => "DeepseekV3ForCausalLM",
            Architecture::DeepseekV32 => "DeepseekV32ForCausalLM",
            Architecture::DeepseekV4 => "DeepseekV4ForCausalLM",
        }
    }

    /// As in the config's `model_type`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Mixtral => "mixtral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Qwen3Moe => "qwen3_moe",
            Architecture::Phi3 => "phi3",
            Architecture::Gemma2 => "gemma2",
            Architecture::Gemma3 => "gemma3_text",
            Architecture::DeepseekV2 => "deepseek_v2",
            Architecture::DeepseekV3 => "deepseek_v3",
            Architecture::DeepseekV32 => "deepseek_v32",
            Architecture::DeepseekV4 => "deepseek_v4",
        }
    }

    /// Whether it is one of the DeepSeek models.
    const fn is_deepseek(self) -> bool {
        use Architecture::{DeepseekV2, DeepseekV3, DeepseekV4, DeepseekV32};
        matches!(self, DeepseekV2 | DeepseekV3 | DeepseekV32 | DeepseekV4)
    }

    /// Whether it is one of the Gemma models, which have several habits in common.
    const fn is_gemma(self) -> bool {
        matches!(self, Architecture::Gemma2 | Architecture::Gemma3)
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
    /// Width of a dense feed-forward layer; of an expert where no layer is dense by design (DeepSeek-V4).
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Layers behind those that guess a further token (multi-token prediction): 1 or 0.
    pub mtp_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Epsilon of the norms.
    pub rms_norm_eps: f32,
    /// Longest context the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Function of the gated feed-forward networks.
    pub hidden_act: Activation,
    /// Biases on the dense feed-forward networks.
    pub mlp_bias: bool,
    /// Experts in some or all layers.
    pub moe: Option<MoeConfig>,
    /// q, k and v are stored as one tensor, and so are gate and up.
    pub fused_projections: bool,
    /// Norms also behind each half of a layer, before the residual stream.
    pub post_norms: bool,
    /// Added to the weights of all norms: 1 where they are stored as the difference from one.
    pub norm_offset: f32,
    /// Factor on the embeddings.
    pub embedding_scale: Option<f32>,
    /// Bounds the logits smoothly: `cap * tanh(logit / cap)`.
    pub logit_softcap: Option<f32>,
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
    /// Llama and its near copies, up to Gemma.
    Llama(LlamaConfig),
    /// DeepSeek-V2, V3 and V3.2.
    Deepseek(DeepseekConfig),
    /// DeepSeek-V4.
    DeepseekV4(DeepseekV4Config),
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Key/value heads; divides the query heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// A bias on the output projection.
    pub o_bias: bool,
    /// A norm on each query and key head, before rotation.
    pub qk_norm: bool,
    /// Factor on the attention scores.
    pub scale: f32,
    /// Bounds the attention scores smoothly.
    pub softcap: Option<f32>,
    /// Per layer, how many positions a token sees, its own included; `None` for all.
    pub windows: Vec<Option<usize>>,
    /// Rotary embedding of the layers with a window, where it is not the model's.
    pub window_rope: Option<RopeConfig>,
}

/// Latent attention.
#[derive(Debug, Clone, PartialEq)]
pub struct DeepseekConfig {
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
    /// Biases on the projections down to the latents and on the output projection.
    pub bias: bool,
    /// What chooses the positions that are read; `None` for all.
    pub indexer: Option<IndexerConfig>,
}

/// Windows, pools and streams.
#[derive(Debug, Clone, PartialEq)]
pub struct DeepseekV4Config {
    /// Width of the query's latent.
    pub q_lora_rank: usize,
    /// Width of a head, and of the one vector that is key and value of all heads.
    pub head_dim: usize,
    /// Rotated columns, the last of a head.
    pub rope_dim: usize,
    /// Width of the latent that each group of heads is projected to.
    pub o_lora_rank: usize,
    /// Groups of heads in the output projection; divides the heads.
    pub o_groups: usize,
    /// Positions that a token sees as they are, its own included.
    pub window: usize,
    /// One per layer.
    pub layers: Vec<V4Layer>,
    /// Rotary embedding of the layers that pool; the model's is that of the others.
    pub compress_rope: RopeConfig,
    /// What chooses among entries; there where a layer is sparse.
    pub indexer: Option<IndexerConfig>,
    /// Residual streams.
    pub streams: usize,
    /// Normalisations of the matrix that mixes streams.
    pub mixing_iterations: usize,
    /// Added to the weights of streams and to sums that are divided by.
    pub mixing_eps: f32,
    /// Bound of an expert's products before they are multiplied.
    pub expert_limit: f32,
}

/// A layer of DeepSeek-V4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct V4Layer {
    /// What a token sees.
    pub attention: V4Attention,
    /// Whether a table names the experts of each token, and scores do not choose them.
    pub hashed: bool,
}

/// What a token sees beside itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum V4Attention {
    /// The window.
    Window,
    /// The window, and those entries that an indexer chooses.
    Sparse {
        /// Tokens of an entry, which pools those of the one before as well.
        rate: usize,
    },
    /// The window and all entries.
    Heavy {
        /// Tokens of an entry.
        rate: usize,
    },
}

/// The indexer that chooses what attention reads: positions in front of latent attention, entries in DeepSeek-V4.
#[derive(Debug, Clone, PartialEq)]
pub struct IndexerConfig {
    /// Heads, whose scores are added.
    pub heads: usize,
    /// Width of a head, and of the key that they share.
    pub head_dim: usize,
    /// Positions or entries that a token reads.
    pub top_k: usize,
}

/// Mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeConfig {
    /// Per layer, those that predict further tokens last, whether it has experts; the others are dense.
    pub layers: Vec<bool>,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// Routed experts of a layer.
    pub num_experts: usize,
    /// Shared experts, kept as one network of that many times the width; 0 for none.
    pub num_shared_experts: usize,
    /// How a token's experts are chosen; a correction bias is a tensor and left empty here.
    pub routing: Routing,
}

impl ModelConfig {
    /// Reads the bytes of a `config.json`.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        parse::model_config(json)
    }

    /// The model without its layers that predict further tokens.
    pub(crate) fn without_mtp(mut self) -> Self {
        self.mtp_layers = 0;
        if let Some(moe) = &mut self.moe {
            moe.layers.truncate(self.num_layers);
        }
        self
    }
}
