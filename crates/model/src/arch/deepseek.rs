//! DeepSeek-V2, V3 and V3.2 (arXiv 2405.04434, 2412.19437): multi-head latent attention, and experts behind
//! the first layers. V2 and V3 differ in how experts are chosen, which is in the config. In V3.2 an indexer in every layer
//! chooses the positions that a token reads: its queries come from the latent of attention's queries, its one key from
//! the hidden state, both rotated in their first columns, by halves.
//!
//! The cache keeps the latent and one rotated key per token; attention absorbs `kv_b_proj`
//! (see [`LatentOps`]), so keys and values are never expanded. `kv_a_proj_with_mqa` yields both the
//! latent and the shared key; its rows are split at load.

use baton_device::{Backend, HostLatent, Indexer, LatentOps, MoeOps, Result as DeviceResult, RopeLayout, Rotary};

use super::decoder::{Decoder, Layer, Step, rope};
use super::feed_forward::{FeedForward, FeedForwardScratch, feed_forward_specs};
use super::{Projection, Sizes, Specs, StepAdapters};
use crate::LoadError;
use crate::checkpoint::Role;
use crate::config::{DeepseekConfig, IndexerConfig, ModelConfig};
use crate::loader::Loader;
use crate::split::Split;

/// Epsilon of the norms on the latents: the released code leaves them at their class's default,
/// whatever `rms_norm_eps` says.
const LATENT_NORM_EPS: f32 = 1e-6;

pub(super) struct DeepseekLayer<B: LatentOps + MoeOps> {
    query: Query<B>,
    /// `[rank, hidden]`.
    latent: Projection<B>,
    /// `[rank]`.
    latent_norm: B::Vector,
    /// `[rope, hidden]`.
    rope_key: Projection<B>,
    kv_b: B::Latent,
    indexer: Option<LayerIndexer<B>>,
    /// `[hidden, heads * v]`.
    o: Projection<B>,
    feed_forward: FeedForward<B>,
}

struct LayerIndexer<B: Backend> {
    /// `[index_heads * index_dim, q_rank]`.
    q: Projection<B>,
    /// `[index_dim, hidden]`.
    k: Projection<B>,
    /// Weight and bias, `[index_dim]` each.
    k_norm: [B::Vector; 2],
    /// `[index_heads, hidden]`.
    weights: B::Linear,
}

enum Query<B: Backend> {
    /// `[heads * (nope + rope), hidden]`.
    Direct(Projection<B>),
    /// `a [q_rank, hidden]`, `norm [q_rank]`, `b [heads * (nope + rope), q_rank]`.
    Latent { a: Projection<B>, norm: B::Vector, b: Projection<B> },
}

pub(super) struct Shared<B: Backend> {
    scale: f32,
    rope: B::Rope,
    q_rope: RopeLayout,
    k_rope: RopeLayout,
    /// `[rows, q_rank]`.
    q_latent: Option<B::Tensor>,
    /// `[rows, heads * (nope + rope)]`.
    q: B::Tensor,
    /// `[rows, rank]`.
    latent: B::Tensor,
    /// `[rows, rope]`.
    rope_key: B::Tensor,
    /// `[rows, heads * v]`.
    context: B::Tensor,
    indexer: Option<IndexerScratch<B>>,
    feed_forward: FeedForwardScratch<B>,
}

struct IndexerScratch<B: Backend> {
    q_rope: RopeLayout,
    k_rope: RopeLayout,
    top_k: usize,
    /// `[rows, index_heads * index_dim]`.
    q: B::Tensor,
    /// `[rows, index_dim]`.
    k: B::Tensor,
    /// `[rows, index_heads]`.
    weights: B::Tensor,
}

/// Names and shapes of a layer's tensors.
pub(super) fn layer_specs(config: &ModelConfig, own: &DeepseekConfig, layer: usize, specs: &mut Specs) {
    let (hidden, heads) = (config.hidden_size, config.num_heads);
    let attention = format!("model.layers.{layer}.self_attn");
    let part = |name: &str| format!("{attention}.{name}");
    let query = heads * (own.qk_nope_head_dim + own.qk_rope_head_dim);
    match own.q_lora_rank {
        None => specs.shared(part("q_proj"), query, hidden, Split::Outputs(heads)),
        Some(rank) => {
            specs.linear(part("q_a_proj"), rank, hidden);
            specs.norm(part("q_a_layernorm"), rank);
            specs.shared(part("q_b_proj"), query, rank, Split::Outputs(heads));
        }
    }
    specs.linear(part("kv_a_proj_with_mqa"), own.kv_lora_rank + own.qk_rope_head_dim, hidden);
    specs.norm(part("kv_a_layernorm"), own.kv_lora_rank);
    let kv_b = heads * (own.qk_nope_head_dim + own.v_head_dim);
    specs.add(
        format!("{}.weight", part("kv_b_proj")),
        vec![kv_b, own.kv_lora_rank],
        Role::Float,
        Split::Outputs(heads),
    );
    if let (Some(indexer), Some(rank)) = (&own.indexer, own.q_lora_rank) {
        specs.linear(part("indexer.wq_b"), indexer.heads * indexer.head_dim, rank);
        specs.linear(part("indexer.wk"), indexer.head_dim, hidden);
        specs.norm(part("indexer.k_norm"), indexer.head_dim);
        specs.vector(part("indexer.k_norm.bias"), indexer.head_dim);
        specs.matrix(part("indexer.weights_proj"), indexer.heads, hidden, Role::Router);
    }
    specs.shared(part("o_proj"), hidden, heads * own.v_head_dim, Split::Inputs(heads));
    if own.bias {
        if let Some(rank) = own.q_lora_rank {
            specs.vector(part("q_a_proj.bias"), rank);
        }
        specs.vector(part("kv_a_proj_with_mqa.bias"), own.kv_lora_rank + own.qk_rope_head_dim);
        specs.vector(part("o_proj.bias"), hidden);
    }
    feed_forward_specs(config, layer, specs);
}

pub(super) fn build<B: LatentOps + MoeOps>(
    config: &ModelConfig,
    own: &DeepseekConfig,
    sizes: Sizes,
    loader: &mut Loader<'_, B>,
) -> Result<Decoder<B, DeepseekLayer<B>>, LoadError> {
    let heads = loader.backend.world().share(config.num_heads).len();
    let shared = Shared::new(config, own, (sizes, heads), loader.backend)?;
    Decoder::build(config, sizes, loader, shared, |loader, layer| {
        let attention = format!("model.layers.{layer}.self_attn");
        let part = |name: &str| format!("{attention}.{name}");
        let query = match own.q_lora_rank {
            None => Query::Direct(loader.projection(&part("q_proj"))?),
            Some(_) => Query::Latent {
                a: loader.projection(&part("q_a_proj"))?,
                norm: loader.norm(&part("q_a_layernorm"), config.norm_offset)?,
                b: loader.projection(&part("q_b_proj"))?,
            },
        };
        let heights = [own.kv_lora_rank, own.qk_rope_head_dim].map(|height| (height, Split::Whole));
        let [latent, rope_key] = loader.split_projection(&part("kv_a_proj_with_mqa"), heights)?;
        Ok(DeepseekLayer {
            query,
            latent,
            latent_norm: loader.norm(&part("kv_a_layernorm"), config.norm_offset)?,
            rope_key,
            kv_b: loader.latent(&part("kv_b_proj"), |kv_b, format| HostLatent {
                kv_b,
                heads,
                nope: own.qk_nope_head_dim,
                rope: own.qk_rope_head_dim,
                v: own.v_head_dim,
                rank: own.kv_lora_rank,
                format,
            })?,
            indexer: match own.indexer {
                None => None,
                Some(_) => Some(LayerIndexer {
                    q: loader.projection(&part("indexer.wq_b"))?,
                    k: loader.projection(&part("indexer.wk"))?,
                    k_norm: [loader.norm(&part("indexer.k_norm"), 0.0)?, loader.vector(&part("indexer.k_norm.bias"))?],
                    weights: loader.linear(&part("indexer.weights_proj"))?,
                }),
            },
            o: loader.projection(&part("o_proj"))?,
            feed_forward: FeedForward::load(loader, config, layer)?,
        })
    })
}

impl<B: Backend> Shared<B> {
    /// For a rank that has so many heads.
    fn new(
        config: &ModelConfig,
        own: &DeepseekConfig,
        (sizes, heads): (Sizes, usize),
        backend: &B,
    ) -> DeviceResult<Self> {
        let (nope, rope_dim) = (own.qk_nope_head_dim, own.qk_rope_head_dim);
        let head_dim = nope + rope_dim;
        let layout = RopeLayout { heads, head_dim, offset: nope, dim: rope_dim, interleaved: own.rope_interleaved };
        let activation = |cols: usize| backend.tensor(sizes.rows, cols);
        Ok(Self {
            // yarn stretches the softmax as well (the factor is 1 without it).
            scale: (head_dim as f32).sqrt().recip() * config.rope.softmax_factor(),
            rope: rope(backend, &config.rope, sizes)?,
            q_rope: layout,
            k_rope: RopeLayout { heads: 1, head_dim: rope_dim, offset: 0, ..layout },
            q_latent: own.q_lora_rank.map(activation).transpose()?,
            q: activation(heads * head_dim)?,
            latent: activation(own.kv_lora_rank)?,
            rope_key: activation(rope_dim)?,
            context: activation(heads * own.v_head_dim)?,
            indexer: own
                .indexer
                .as_ref()
                .map(|indexer| IndexerScratch::new(indexer, rope_dim, activation))
                .transpose()?,
            feed_forward: FeedForwardScratch::new(backend, config, sizes)?,
        })
    }
}

impl<B: Backend> IndexerScratch<B> {
    fn new(
        indexer: &IndexerConfig,
        rope_dim: usize,
        activation: impl Fn(usize) -> DeviceResult<B::Tensor>,
    ) -> DeviceResult<Self> {
        let &IndexerConfig { heads, head_dim, top_k } = indexer;
        let q_rope = RopeLayout { heads, head_dim, offset: 0, dim: rope_dim, interleaved: false };
        Ok(Self {
            q_rope,
            k_rope: RopeLayout { heads: 1, ..q_rope },
            top_k,
            q: activation(heads * head_dim)?,
            k: activation(head_dim)?,
            weights: activation(heads)?,
        })
    }
}

impl<B: LatentOps> LayerIndexer<B> {
    /// Of normed hidden states and of the latents of attention's queries.
    fn forward<'a>(
        &self,
        backend: &B,
        (h, q_latent): (&B::Tensor, &B::Tensor),
        (rope, plan): (&B::Rope, &B::AttentionPlan),
        adapters: &mut StepAdapters<'_, B>,
        scratch: &'a mut IndexerScratch<B>,
    ) -> DeviceResult<Indexer<'a, B>> {
        let IndexerScratch { q_rope, k_rope, top_k, q, k, weights } = scratch;
        self.q.forward(backend, q_latent, adapters, q)?;
        self.k.forward(backend, h, adapters, k)?;
        backend.layer_norm_in_place(k, self.k_norm.each_ref(), LATENT_NORM_EPS)?;
        backend.rope(q, *q_rope, rope, plan)?;
        backend.rope(k, *k_rope, rope, plan)?;
        backend.linear(h, &self.weights, weights)?;
        Ok(Indexer { q, k, weights, top_k: *top_k })
    }
}

impl<B: LatentOps + MoeOps> Layer<B> for DeepseekLayer<B> {
    type Shared = Shared<B>;

    fn attention(
        &self,
        backend: &B,
        h: &B::Tensor,
        step: &mut Step<'_, '_, B>,
        shared: &mut Shared<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        let Shared { scale, rope, q_rope, k_rope, q_latent, q, latent, rope_key, context, indexer, .. } = shared;
        let [of_latent, of_key] = [(&self.latent, &mut *latent), (&self.rope_key, &mut *rope_key)];
        match (&self.query, &mut *q_latent) {
            (Query::Latent { a, norm, b }, Some(q_latent)) => {
                let group = [(a, &mut *q_latent), of_latent, of_key];
                Projection::forward_group(backend, h, step.adapters, group)?;
                backend.rms_norm_in_place(q_latent, norm, LATENT_NORM_EPS)?;
                b.forward(backend, q_latent, step.adapters, q)?;
            }
            (Query::Direct(weight), _) => {
                let group = [(weight, &mut *q), of_latent, of_key];
                Projection::forward_group(backend, h, step.adapters, group)?;
            }
            (Query::Latent { .. }, None) => unreachable!("allocated where q_lora_rank is set"),
        }
        let rotary = Rotary {
            norms: [None, Some(&self.latent_norm)],
            eps: LATENT_NORM_EPS,
            layouts: [*q_rope, *k_rope],
            table: rope,
        };
        let (kv_b, Step { layer, plan, cache, adapters }) = (&self.kv_b, step);
        match (&self.indexer, indexer, q_latent) {
            (None, ..) => {
                let (q, latent, key) = (q, latent, rope_key);
                backend.rotary_latent_attention(q, latent, key, &rotary, kv_b, cache, *layer, plan, *scale, context)?;
            }
            (Some(own), Some(scratch), Some(q_latent)) => {
                let indexer = own.forward(backend, (h, q_latent), (rope, plan), adapters, scratch)?;
                backend.norm_and_rotate(q, latent, rope_key, &rotary, plan)?;
                backend.indexed_attention(q, latent, rope_key, &indexer, kv_b, cache, *layer, plan, *scale, context)?;
            }
            (Some(_), ..) => unreachable!("allocated where there is an indexer, whose queries come from latents"),
        }
        self.o.forward(backend, context, adapters, out)
    }

    fn feed_forward(
        &self,
        backend: &B,
        h: &B::Tensor,
        adapters: &mut StepAdapters<'_, B>,
        shared: &mut Shared<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        self.feed_forward.forward(backend, h, adapters, &mut shared.feed_forward, out)
    }
}
