//! Architectures: which tensors they have, what they need of a device, how they compute.
//!
//! Each is written once against the device seam. To add one: a module here, an arm in each `match`
//! below, a parser in `config`.

mod decoder;
mod deepseek;
mod feed_forward;
mod llama;
mod mtp;
mod projection;

use std::collections::BTreeMap;

use baton_device::{Backend, KvDtype, KvSpec, LatentOps, LayerKv, MoeOps, Op, Result as DeviceResult, TokenIds, World};

use crate::LoadError;
use crate::checkpoint::{Role, TensorSpec};
use crate::config::{Architecture, Family, ModelConfig};
use crate::loader::Loader;
use crate::split::Split;

pub(crate) use decoder::EMBEDDING_WEIGHT;
pub(crate) use projection::{AdaptedRows, AdapterScratch, AdapterWeights, Delta, Projection, StepAdapters};

/// A loaded model: weights, and activations sized once.
pub(crate) trait Model<B: Backend>: Send {
    /// Computes all layers for the rows of `plan`, whose tokens are `ids`, and keeps their final hidden
    /// states for [`Model::logits`].
    fn forward(
        &mut self,
        backend: &B,
        ids: TokenIds<'_, B::Chosen>,
        plan: &B::AttentionPlan,
        cache: &mut B::KvCache,
        adapters: &mut StepAdapters<'_, B>,
    ) -> DeviceResult<()>;

    /// Whether [`Model::look_ahead`] can be called.
    fn looks_ahead(&self) -> bool;

    /// Replaces the hidden states of the last forward by those of the module for multi-token prediction: the logits
    /// of a row are then for the token after next. `next` holds the token behind each row, `plan` is the forward's.
    fn look_ahead(
        &mut self,
        backend: &B,
        next: &[u32],
        plan: &B::AttentionPlan,
        cache: &mut B::KvCache,
        adapters: &mut StepAdapters<'_, B>,
    ) -> DeviceResult<()>;

    /// Hidden states `[rows.len(), hidden]` behind the last norm, of some rows of the last forward; at most
    /// [`Sizes::logit_rows`].
    fn hidden(&mut self, backend: &B, rows: &[u32]) -> DeviceResult<&B::Tensor>;

    /// Logits `[rows.len(), vocab]` of some rows of the last forward; at most [`Sizes::logit_rows`].
    fn logits(&mut self, backend: &B, rows: &[u32]) -> DeviceResult<&B::Tensor>;
}

/// Capacities for which activations are allocated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// Tokens of a step.
    pub(crate) rows: usize,
    /// Rows of logits computed at once.
    pub(crate) logit_rows: usize,
    /// Positions of a sequence.
    pub(crate) positions: usize,
}

/// The tensors of a model by name.
#[derive(Default)]
pub(crate) struct Specs(pub(crate) BTreeMap<String, TensorSpec>);

impl Specs {
    fn add(&mut self, name: String, shape: Vec<usize>, role: Role, split: Split) {
        self.0.insert(name.clone(), TensorSpec { name, shape, role, encoding: None, split });
    }

    /// `{prefix}.weight`, a matrix `[out, in]`.
    fn matrix(&mut self, prefix: String, out_features: usize, in_features: usize, role: Role) {
        self.add(format!("{prefix}.weight"), vec![out_features, in_features], role, Split::Whole);
    }

    /// `{prefix}.weight`, a matrix `[out, in]` that may be quantised.
    fn linear(&mut self, prefix: String, out_features: usize, in_features: usize) {
        self.matrix(prefix, out_features, in_features, Role::Linear);
    }

    /// As [`linear`](Self::linear), shared out among ranks.
    fn shared(&mut self, prefix: String, out_features: usize, in_features: usize, split: Split) {
        self.add(format!("{prefix}.weight"), vec![out_features, in_features], Role::Linear, split);
    }

    /// `{prefix}.weight` of a norm.
    fn norm(&mut self, prefix: String, len: usize) {
        self.vector(format!("{prefix}.weight"), len);
    }

    /// A vector by its full name. Biases are shared out as their weights are.
    fn vector(&mut self, name: String, len: usize) {
        self.add(name, vec![len], Role::Vector, Split::Whole);
    }
}

/// Every tensor that a model of this config has. Routers, embeddings and the input of the layer that predicts further
/// tokens are never quantised.
pub(crate) fn specs(config: &ModelConfig) -> Specs {
    let mut specs = Specs::default();
    decoder::outer_specs(config, &mut specs);
    mtp::specs(config, &mut specs);
    for layer in 0..config.num_layers + config.mtp_layers {
        match &config.family {
            Family::Llama(own) => llama::layer_specs(config, own, layer, &mut specs),
            Family::Deepseek(own) => deepseek::layer_specs(config, own, layer, &mut specs),
        }
    }
    if let Some(quantization) = &config.quantization {
        let projection = mtp::projection(config);
        let quantizable = |spec: &&mut TensorSpec| match spec.role {
            Role::Linear => true,
            // Quantisers leave these two alone.
            Role::Float => spec.name != EMBEDDING_WEIGHT && spec.module() != projection,
            Role::Router | Role::Vector => false,
        };
        for spec in specs.0.values_mut().filter(quantizable) {
            spec.encoding = quantization.encoding(spec.module()).cloned();
        }
    }
    specs
}

/// Whether logits are products with this tensor.
pub(crate) fn is_head(config: &ModelConfig, name: &str) -> bool {
    name == if config.tie_word_embeddings { EMBEDDING_WEIGHT } else { decoder::HEAD_WEIGHT }
}

/// What names of routed experts' tensors have before the expert's number.
const EXPERTS: &str = ".experts.";

/// Whether a tensor is a routed expert's.
pub(crate) fn is_expert(name: &str) -> bool {
    name.contains(EXPERTS)
}

/// A tensor's name without the number of its expert, if it is one's: that of a layer's projection in all its experts.
pub(crate) fn without_expert(name: &str) -> String {
    let parts = name.split_once(EXPERTS).and_then(|(layer, part)| Some((layer, part.split_once('.')?.1)));
    parts.map_or_else(|| name.to_owned(), |(layer, projection)| format!("{layer}{EXPERTS}{projection}"))
}

/// Whether a tensor beyond [`specs`] is known to change nothing.
pub(crate) fn is_ignorable(config: &ModelConfig, name: &str) -> bool {
    let beyond_last_layer = || {
        let number = name.strip_prefix("model.layers.")?.split('.').next()?;
        Some(number.parse::<usize>().ok()? >= config.num_layers)
    };
    // Tables that old files carry; a copy of the embedding; multi-token prediction that is not asked for, and its
    // copies of embedding and head.
    name.ends_with(".rotary_emb.inv_freq")
        || (config.tie_word_embeddings && name == decoder::HEAD_WEIGHT)
        || (matches!(config.architecture, Architecture::DeepseekV3 | Architecture::DeepseekV32)
            && beyond_last_layer() == Some(true))
}

/// Whether the checkpoint that has these tensors has what `config.mtp_layers` says.
pub(crate) fn has_mtp<'a>(config: &ModelConfig, mut names: impl Iterator<Item = &'a str>) -> bool {
    let wanted = mtp::projection(config);
    names.any(|name| name.strip_suffix(".weight") == Some(&wanted))
}

/// Operations that a model of this config calls, beyond those that every device has.
pub(crate) fn ops(config: &ModelConfig) -> Vec<Op> {
    let attention = match &config.family {
        Family::Llama(_) => Op::PagedAttention,
        Family::Deepseek(own) if own.indexer.is_some() => Op::IndexedAttention,
        Family::Deepseek(_) => Op::LatentAttention,
    };
    let has_experts = config.moe.as_ref().is_some_and(|moe| moe.layers.contains(&true));
    [Some(attention), has_experts.then_some(Op::FusedMoe)].into_iter().flatten().collect()
}

/// The cache that a rank of a model of this config keeps.
pub(crate) fn kv_spec(config: &ModelConfig, world: World, dtype: KvDtype, block_size: usize) -> KvSpec {
    let layer = match &config.family {
        Family::Llama(own) => LayerKv::Full { kv_heads: world.share(own.num_kv_heads).len(), head_dim: own.head_dim },
        Family::Deepseek(own) => {
            let (rank, rope) = (own.kv_lora_rank, own.qk_rope_head_dim);
            LayerKv::Latent { rank, rope, index: own.indexer.as_ref().map(|indexer| indexer.head_dim) }
        }
    };
    KvSpec { layers: vec![layer; config.num_layers + config.mtp_layers], dtype, block_size }
}

/// Loads a model's weights.
pub(crate) fn build<B: Backend + LatentOps + MoeOps>(
    config: &ModelConfig,
    sizes: Sizes,
    loader: &mut Loader<'_, B>,
) -> Result<Box<dyn Model<B>>, LoadError> {
    Ok(match &config.family {
        Family::Llama(own) => Box::new(llama::build(config, own, sizes, loader)?),
        Family::Deepseek(own) => Box::new(deepseek::build(config, own, sizes, loader)?),
    })
}
