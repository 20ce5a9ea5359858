//! Architectures: which tensors they have, what they need of a device, how they compute.
//!
//! Each is written once against the device seam. To add one: a module here, an arm in each `match`
//! below, a parser in `config`.

mod decoder;
mod deepseek;
mod deepseek_v4;
mod feed_forward;
mod llama;
mod mtp;
mod projection;

use std::collections::BTreeMap;

use baton_device::{
    Backend, CompressedOps, KvDtype, KvSpec, LatentOps, LayerKv, Op, PoolKv, Result as DeviceResult, TokenIds, World,
};

use crate::LoadError;
use crate::checkpoint::{Role, TensorSpec};
use crate::config::{Architecture, Family, ModelConfig, V4Attention, V4Layer};
use crate::loader::Loader;
use crate::split::Split;

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
/// tokens are never quantised. `stored` gives the type of a tensor in the checkpoint, if it is there: some configs leave to it
/// how weights are stored.
pub(crate) fn specs(config: &ModelConfig, stored: impl Fn(&str) -> Option<&'static str>) -> Specs {
    let mut specs = Specs::default();
    let layers = 0..config.num_layers + config.mtp_layers;
    match &config.family {
        Family::Llama(own) => layers.for_each(|layer| llama::layer_specs(config, own, layer, &mut specs)),
        Family::Deepseek(own) => layers.for_each(|layer| deepseek::layer_specs(config, own, layer, &mut specs)),
        Family::DeepseekV4(own) => deepseek_v4::specs(config, own, &mut specs),
    }
    if !matches!(config.family, Family::DeepseekV4(_)) {
        decoder::outer_specs(config, &mut specs);
        mtp::specs(config, &mut specs);
    }
    if let Some(quantization) = &config.quantization {
        let projection = mtp::projection(config);
        let quantizable = |spec: &&mut TensorSpec| match spec.role {
            Role::Linear => true,
            // Quantisers leave these two alone.
            Role::Float => spec.name != embedding_weight(config) && spec.module() != projection,
            Role::Router | Role::Table | Role::Vector => false,
        };
        for spec in specs.0.values_mut().filter(quantizable) {
            spec.encoding = quantization.encoding(spec.module(), stored(&spec.name)).cloned();
        }
    }
    specs
}

/// The embedding's name.
pub(crate) fn embedding_weight(config: &ModelConfig) -> &'static str {
    match config.family {
        Family::DeepseekV4(_) => deepseek_v4::EMBEDDING_WEIGHT,
        _ => decoder::EMBEDDING_WEIGHT,
    }
}

/// Whether logits are products with this tensor.
pub(crate) fn is_head(config: &ModelConfig, name: &str) -> bool {
    name == match config.family {
        Family::DeepseekV4(_) => deepseek_v4::HEAD_WEIGHT,
        _ if config.tie_word_embeddings => decoder::EMBEDDING_WEIGHT,
        _ => decoder::HEAD_WEIGHT,
    }
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
        || (config.architecture == Architecture::DeepseekV4 && deepseek_v4::is_of_prediction(name))
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
        Family::DeepseekV4(_) => Op::CompressedAttention,
    };
    let has_experts = config.moe.as_ref().is_some_and(|moe| moe.layers.contains(&true));
    [Some(attention), has_experts.then_some(Op::FusedMoe)].into_iter().flatten().collect()
}

/// The cache that a rank of a model of this config keeps.
pub(crate) fn kv_spec(config: &ModelConfig, world: World, dtype: KvDtype, block_size: usize) -> KvSpec {
    let alike = |layer| vec![layer; config.num_layers + config.mtp_layers];
    let layers = match &config.family {
        Family::Llama(own) => {
            alike(LayerKv::Full { kv_heads: world.share(own.num_kv_heads).len(), head_dim: own.head_dim })
        }
        Family::Deepseek(own) => {
            let (rank, rope) = (own.kv_lora_rank, own.qk_rope_head_dim);
            alike(LayerKv::Latent { rank, rope, index: own.indexer.as_ref().map(|indexer| indexer.head_dim) })
        }
        Family::DeepseekV4(own) => {
            let index = own.indexer.as_ref().map(|indexer| indexer.head_dim);
            let pool = |layer: &V4Layer| match layer.attention {
                V4Attention::Window => None,
                V4Attention::Heavy { rate } => Some(PoolKv { rate, overlaps: false, index: None }),
                V4Attention::Sparse { rate } => Some(PoolKv { rate, overlaps: true, index }),
            };
            let windowed = |layer| LayerKv::Windowed { width: own.head_dim, window: own.window, pool: pool(layer) };
            own.layers.iter().map(windowed).collect()
        }
    };
    KvSpec { layers, dtype, block_size }
}

/// Whether drafts can be taken back that were not accepted: what is pooled of tokens cannot.
pub(crate) fn takes_drafts(config: &ModelConfig) -> bool {
    !matches!(config.family, Family::DeepseekV4(_))
}

/// Loads a model's weights.
pub(crate) fn build<B: LatentOps + CompressedOps>(
    config: &ModelConfig,
    sizes: Sizes,
    loader: &mut Loader<'_, B>,
) -> Result<Box<dyn Model<B>>, LoadError> {
    Ok(match &config.family {
        Family::Llama(own) => Box::new(llama::build(config, own, sizes, loader)?),
        Family::Deepseek(own) => Box::new(deepseek::build(config, own, sizes, loader)?),
        Family::DeepseekV4(own) => Box::new(deepseek_v4::build(config, own, sizes, loader)?),
    })
}
