//! Llama, and its near copies Qwen2 (biases on q, k, v) and Qwen3 (a norm on each query and key head):
//! grouped-query attention and a dense feed-forward network.

use baton_device::{AttentionParams, Backend, Result as DeviceResult, RopeLayout};

use super::decoder::{Decoder, Layer, Mlp, MlpScratch, Step, mlp_specs, rope};
use super::{Sizes, Specs};
use crate::LoadError;
use crate::config::{LlamaConfig, ModelConfig};
use crate::loader::Loader;

pub(super) struct LlamaLayer<B: Backend> {
    /// `[heads * head_dim, hidden]`.
    q: B::Linear,
    /// `[kv_heads * head_dim, hidden]`.
    k: B::Linear,
    /// `[kv_heads * head_dim, hidden]`.
    v: B::Linear,
    /// `[hidden, heads * head_dim]`.
    o: B::Linear,
    /// `[head_dim]` each, of queries and keys (Qwen3).
    qk_norm: Option<[B::Vector; 2]>,
    mlp: Mlp<B>,
}

pub(super) struct Shared<B: Backend> {
    params: AttentionParams,
    eps: f32,
    rope: B::Rope,
    /// `[rows, heads * head_dim]`.
    q: B::Tensor,
    /// `[rows, kv_heads * head_dim]`.
    k: B::Tensor,
    /// `[rows, kv_heads * head_dim]`.
    v: B::Tensor,
    /// `[rows, heads * head_dim]`.
    context: B::Tensor,
    mlp: MlpScratch<B>,
}

pub(super) fn layer_specs(config: &ModelConfig, own: &LlamaConfig, layer: usize, specs: &mut Specs) {
    let (hidden, head_dim) = (config.hidden_size, own.head_dim);
    let attention = format!("model.layers.{layer}.self_attn");
    for (name, heads) in [("q_proj", config.num_heads), ("k_proj", own.num_kv_heads), ("v_proj", own.num_kv_heads)] {
        specs.linear(format!("{attention}.{name}"), heads * head_dim, hidden);
        if own.qkv_bias {
            specs.vector(format!("{attention}.{name}.bias"), heads * head_dim);
        }
    }
    specs.linear(format!("{attention}.o_proj"), hidden, config.num_heads * head_dim);
    if own.qk_norm {
        specs.norm(format!("{attention}.q_norm"), head_dim);
        specs.norm(format!("{attention}.k_norm"), head_dim);
    }
    mlp_specs(&mlp(layer), hidden, config.intermediate_size, specs);
}

fn mlp(layer: usize) -> String {
    format!("model.layers.{layer}.mlp")
}

pub(super) fn build<B: Backend>(
    config: &ModelConfig,
    own: &LlamaConfig,
    sizes: Sizes,
    loader: &mut Loader<'_, B>,
) -> Result<Decoder<B, LlamaLayer<B>>, LoadError> {
    let backend = loader.backend;
    let LlamaConfig { num_kv_heads, head_dim, .. } = *own;
    let activation = |heads: usize| backend.tensor(sizes.rows, heads * head_dim);
    let shared = Shared {
        params: AttentionParams {
            heads: config.num_heads,
            kv_heads: num_kv_heads,
            head_dim,
            scale: (head_dim as f32).sqrt().recip(),
        },
        eps: config.rms_norm_eps,
        rope: rope(backend, config, sizes)?,
        q: activation(config.num_heads)?,
        k: activation(num_kv_heads)?,
        v: activation(num_kv_heads)?,
        context: activation(config.num_heads)?,
        mlp: MlpScratch::new(backend, sizes.rows, config.intermediate_size)?,
    };
    Decoder::build(config, sizes, loader, shared, |loader, layer| {
        let attention = format!("model.layers.{layer}.self_attn");
        let part = |name: &str| format!("{attention}.{name}");
        let qk_norm =
            if own.qk_norm { Some([loader.norm(&part("q_norm"))?, loader.norm(&part("k_norm"))?]) } else { None };
        Ok(LlamaLayer {
            q: loader.linear(&part("q_proj"))?,
            k: loader.linear(&part("k_proj"))?,
            v: loader.linear(&part("v_proj"))?,
            o: loader.linear(&part("o_proj"))?,
            qk_norm,
            mlp: Mlp::load(loader, &mlp(layer))?,
        })
    })
}

impl<B: Backend> Layer<B> for LlamaLayer<B> {
    type Shared = Shared<B>;

    fn attention(
        &self,
        backend: &B,
        h: &B::Tensor,
        step: &mut Step<'_, B>,
        shared: &mut Shared<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        let Shared { params, eps, rope, q, k, v, context, .. } = shared;
        backend.linear(h, &self.q, q)?;
        backend.linear(h, &self.k, k)?;
        backend.linear(h, &self.v, v)?;
        if let Some([q_norm, k_norm]) = &self.qk_norm {
            backend.rms_norm_in_place(q, q_norm, *eps)?;
            backend.rms_norm_in_place(k, k_norm, *eps)?;
        }
        let head_dim = params.head_dim;
        let layout = |heads| RopeLayout { heads, head_dim, offset: 0, dim: head_dim, interleaved: false };
        backend.rope(q, layout(params.heads), rope, step.plan)?;
        backend.rope(k, layout(params.kv_heads), rope, step.plan)?;
        backend.paged_attention(q, k, v, step.cache, step.layer, step.plan, params, context)?;
        backend.linear(context, &self.o, out)
    }

    fn feed_forward(
        &self,
        backend: &B,
        h: &B::Tensor,
        shared: &mut Shared<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        self.mlp.forward(backend, h, &mut shared.mlp, out)
    }
}
