//! Llama and its near copies up to Gemma: grouped-query attention, over all positions or a window.
//!
//! What tells them apart is in the config: biases (on q, k and v in Qwen2), a norm on each query and key
//! head (Qwen3, Gemma 3), q, k and v in one tensor (Phi-3), windows (Mistral, Phi-3, Gemma), soft-capped
//! scores (Gemma 2), a second rotary base for layers with a window (Gemma 3), experts (Mixtral,
//! Qwen3-MoE).

use baton_device::{AttentionParams, Backend, MoeOps, Result as DeviceResult, RopeLayout, Rotary};

use super::decoder::{Decoder, Layer, Step, rope};
use super::feed_forward::{FeedForward, FeedForwardScratch, feed_forward_specs};
use super::{Projection, Sizes, Specs, StepAdapters};
use crate::LoadError;
use crate::config::{LlamaConfig, ModelConfig};
use crate::loader::Loader;
use crate::split::Split;

const FUSED_QKV: &str = "qkv_proj";

pub(super) struct LlamaLayer<B: MoeOps> {
    params: AttentionParams,
    /// `[heads * head_dim, hidden]`.
    q: Projection<B>,
    /// `[kv_heads * head_dim, hidden]`.
    k: Projection<B>,
    /// `[kv_heads * head_dim, hidden]`.
    v: Projection<B>,
    /// `[hidden, heads * head_dim]`.
    o: Projection<B>,
    /// `[head_dim]` each, of queries and keys.
    qk_norm: Option<[B::Vector; 2]>,
    feed_forward: FeedForward<B>,
}

pub(super) struct Shared<B: Backend> {
    eps: f32,
    rope: B::Rope,
    /// For layers with a window, where it is another.
    window_rope: Option<B::Rope>,
    /// `[rows, heads * head_dim]`.
    q: B::Tensor,
    /// `[rows, kv_heads * head_dim]`.
    k: B::Tensor,
    /// `[rows, kv_heads * head_dim]`.
    v: B::Tensor,
    /// `[rows, heads * head_dim]`.
    context: B::Tensor,
    feed_forward: FeedForwardScratch<B>,
}

/// Names and shapes of a layer's tensors.
pub(super) fn layer_specs(config: &ModelConfig, own: &LlamaConfig, layer: usize, specs: &mut Specs) {
    let (hidden, head_dim) = (config.hidden_size, own.head_dim);
    let attention = format!("model.layers.{layer}.self_attn");
    if config.fused_projections {
        let heads = config.num_heads + 2 * own.num_kv_heads;
        specs.linear(format!("{attention}.{FUSED_QKV}"), heads * head_dim, hidden);
    } else {
        for (name, heads) in [("q_proj", config.num_heads), ("k_proj", own.num_kv_heads), ("v_proj", own.num_kv_heads)]
        {
            specs.shared(format!("{attention}.{name}"), heads * head_dim, hidden, Split::Outputs(heads));
            if own.qkv_bias {
                specs.vector(format!("{attention}.{name}.bias"), heads * head_dim);
            }
        }
    }
    let split = Split::Inputs(config.num_heads);
    specs.shared(format!("{attention}.o_proj"), hidden, config.num_heads * head_dim, split);
    if own.o_bias {
        specs.vector(format!("{attention}.o_proj.bias"), hidden);
    }
    if own.qk_norm {
        specs.norm(format!("{attention}.q_norm"), head_dim);
        specs.norm(format!("{attention}.k_norm"), head_dim);
    }
    feed_forward_specs(config, layer, specs);
}

pub(super) fn build<B: MoeOps>(
    config: &ModelConfig,
    own: &LlamaConfig,
    sizes: Sizes,
    loader: &mut Loader<'_, B>,
) -> Result<Decoder<B, LlamaLayer<B>>, LoadError> {
    let backend = loader.backend;
    let [heads, kv_heads] = [config.num_heads, own.num_kv_heads].map(|heads| backend.world().share(heads).len());
    let head_dim = own.head_dim;
    let activation = |heads: usize| backend.tensor(sizes.rows, heads * head_dim);
    let shared = Shared {
        eps: config.rms_norm_eps,
        rope: rope(backend, &config.rope, sizes)?,
        window_rope: own.window_rope.as_ref().map(|config| rope(backend, config, sizes)).transpose()?,
        q: activation(heads)?,
        k: activation(kv_heads)?,
        v: activation(kv_heads)?,
        context: activation(heads)?,
        feed_forward: FeedForwardScratch::new(backend, config, sizes)?,
    };
    Decoder::build(config, sizes, loader, shared, |loader, layer| {
        let attention = format!("model.layers.{layer}.self_attn");
        let part = |name: &str| format!("{attention}.{name}");
        let [q, k, v] = if config.fused_projections {
            let heads = [config.num_heads, own.num_kv_heads, own.num_kv_heads];
            loader.split_projection(&part(FUSED_QKV), heads.map(|heads| (heads * head_dim, Split::Outputs(heads))))?
        } else {
            [
                loader.projection(&part("q_proj"))?,
                loader.projection(&part("k_proj"))?,
                loader.projection(&part("v_proj"))?,
            ]
        };
        let mut norm = |name: &str| loader.norm(&part(name), config.norm_offset);
        let qk_norm = if own.qk_norm { Some([norm("q_norm")?, norm("k_norm")?]) } else { None };
        let (scale, window, softcap) = (own.scale, own.windows[layer], own.softcap);
        Ok(LlamaLayer {
            params: AttentionParams { heads, kv_heads, head_dim, scale, window, softcap },
            q,
            k,
            v,
            o: loader.projection(&part("o_proj"))?,
            qk_norm,
            feed_forward: FeedForward::load(loader, config, layer)?,
        })
    })
}

impl<B: MoeOps> Layer<B> for LlamaLayer<B> {
    type Shared = Shared<B>;

    fn attention(
        &self,
        backend: &B,
        h: &B::Tensor,
        step: &mut Step<'_, '_, B>,
        shared: &mut Shared<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        let Shared { eps, rope, window_rope, q, k, v, context, .. } = shared;
        let AttentionParams { heads, kv_heads, head_dim, window, .. } = self.params;
        let group = [(&self.q, &mut *q), (&self.k, &mut *k), (&self.v, &mut *v)];
        Projection::forward_group(backend, h, step.adapters, group)?;
        let layout = |heads| RopeLayout { heads, head_dim, offset: 0, dim: head_dim, interleaved: false };
        let rotary = Rotary {
            norms: self.qk_norm.as_ref().map_or([None; 2], |norms| norms.each_ref().map(Some)),
            eps: *eps,
            layouts: [heads, kv_heads].map(layout),
            table: window_rope.as_ref().filter(|_| window.is_some()).unwrap_or(rope),
        };
        let Step { layer, plan, cache, adapters } = step;
        backend.rotary_attention(q, k, v, &rotary, cache, *layer, plan, &self.params, context)?;
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
