//! DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437): multi-head latent attention, and experts behind
//! the first layers. The two differ in how experts are chosen, which is in the config.
//!
//! The cache keeps the latent and one rotated key per token; attention absorbs `kv_b_proj`
//! (see [`LatentOps`]), so keys and values are never expanded. `kv_a_proj_with_mqa` yields both the
//! latent and the shared key; its rows are split at load.

use baton_device::{Backend, HostLatent, LatentOps, MoeOps, Result as DeviceResult, RopeLayout, Rotary};

use super::decoder::{Decoder, Layer, Step, rope};
use super::feed_forward::{FeedForward, FeedForwardScratch, feed_forward_specs};
use super::{Projection, Sizes, Specs, StepAdapters};
use crate::LoadError;
use crate::checkpoint::Role;
use crate::config::{DeepseekConfig, ModelConfig};
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
    /// `[hidden, heads * v]`.
    o: Projection<B>,
    feed_forward: FeedForward<B>,
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
    feed_forward: FeedForwardScratch<B>,
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
            feed_forward: FeedForwardScratch::new(backend, config, sizes)?,
        })
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
        let Shared { scale, rope, q_rope, k_rope, q_latent, q, latent, rope_key, context, .. } = shared;
        let [of_latent, of_key] = [(&self.latent, &mut *latent), (&self.rope_key, &mut *rope_key)];
        match (&self.query, q_latent) {
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
        backend.rotary_latent_attention(q, latent, rope_key, &rotary, kv_b, cache, *layer, plan, *scale, context)?;
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
