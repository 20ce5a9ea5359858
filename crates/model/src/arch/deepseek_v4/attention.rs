//! Attention of DeepSeek-V4: one vector of a token is key and value of all heads at once, and what heads give is rotated back by the
//! position that values were rotated by. A layer reads its window alone, or all entries that it pools of many tokens each as well, or
//! those that its indexer chooses among entries of few tokens.

use baton_device::{
    Backend, CompressedOps, Entries, HostRope, Pooling, Reads, Result as DeviceResult, RopeLayout, WindowedParams,
};

use super::super::{Sizes, Specs};
use super::ones;
use crate::LoadError;
use crate::checkpoint::Role;
use crate::config::{DeepseekV4Config, ModelConfig, RopeConfig, V4Attention, V4Layer};
use crate::loader::Loader;
use crate::split::Split;

pub(super) struct Attention<B: Backend> {
    /// `[q_rank, hidden]`.
    q_a: B::Linear,
    q_norm: B::Vector,
    /// `[heads * head_dim, q_rank]`.
    q_b: B::Linear,
    /// `[head_dim, hidden]`.
    kv: B::Linear,
    kv_norm: B::Vector,
    sink: B::Vector,
    pool: Option<Pool<B>>,
    /// For each group of heads `[o_rank, heads / groups * head_dim]`.
    o_a: Vec<B::Linear>,
    /// `[hidden, groups * o_rank]`.
    o_b: B::Linear,
}

struct Pool<B: Backend> {
    attended: Compressor<B>,
    indexer: Option<Indexer<B>>,
}

/// What pools entries.
struct Compressor<B: Backend> {
    /// `[series * width, hidden]`.
    values: B::Linear,
    /// `[series * width, hidden]`.
    gates: B::Linear,
    /// `[rate, series * width]`.
    bias: B::Vector,
    norm: B::Vector,
}

struct Indexer<B: Backend> {
    /// `[index_heads * index_dim, q_rank]`.
    q: B::Linear,
    /// `[index_heads, hidden]`.
    weights: B::Linear,
    compressor: Compressor<B>,
}

/// What the layers share: sizes, rotary tables, activations.
pub(super) struct AttentionScratch<B: Backend> {
    eps: f32,
    window: usize,
    scale: f32,
    /// Of layers that pool nothing, and of those that do.
    ropes: [Rotation<B>; 2],
    q_rope: RopeLayout,
    kv_rope: RopeLayout,
    /// `[head_dim]`.
    ones: B::Vector,
    /// `[rows, q_rank]`.
    q_latent: B::Tensor,
    /// `[rows, heads * head_dim]`.
    q: B::Tensor,
    /// `[rows, head_dim]`.
    kv: B::Tensor,
    /// `[rows, heads * head_dim]`.
    context: B::Tensor,
    /// `[rows, groups * o_rank]`.
    o_latent: B::Tensor,
    /// Values and gates of layers with one series and of those with two, `[rows, series * head_dim]` each.
    pooled: [Option<[B::Tensor; 2]>; 2],
    indexer: Option<IndexerScratch<B>>,
}

/// Angles, and the same backwards.
struct Rotation<B: Backend> {
    forth: B::Rope,
    back: B::Rope,
}

struct IndexerScratch<B: Backend> {
    top_k: usize,
    q_rope: RopeLayout,
    k_rope: RopeLayout,
    /// `[rows, index_heads * index_dim]`.
    q: B::Tensor,
    /// `[rows, index_heads]`.
    weights: B::Tensor,
    /// `[rows, 2 * index_dim]`.
    values: B::Tensor,
    /// `[rows, 2 * index_dim]`.
    gates: B::Tensor,
}

/// Names and shapes of a layer's tensors.
pub(super) fn specs(config: &ModelConfig, own: &DeepseekV4Config, layer: &V4Layer, attention: &str, specs: &mut Specs) {
    let (hidden, heads, head_dim) = (config.hidden_size, config.num_heads, own.head_dim);
    let part = |name: &str| format!("{attention}.{name}");
    specs.linear(part("wq_a"), own.q_lora_rank, hidden);
    specs.norm(part("q_norm"), own.q_lora_rank);
    specs.linear(part("wq_b"), heads * head_dim, own.q_lora_rank);
    specs.linear(part("wkv"), head_dim, hidden);
    specs.norm(part("kv_norm"), head_dim);
    specs.vector(part("attn_sink"), heads);
    specs.linear(part("wo_a"), own.o_groups * own.o_lora_rank, heads * head_dim / own.o_groups);
    specs.linear(part("wo_b"), hidden, own.o_groups * own.o_lora_rank);
    // What weighs or chooses is kept as stored, as routers are.
    let mut compressor = |prefix: String, rate: usize, series: usize, width: usize| {
        for name in ["wkv", "wgate"] {
            specs.matrix(format!("{prefix}.{name}"), series * width, hidden, Role::Router);
        }
        specs.add(format!("{prefix}.ape"), vec![rate, series * width], Role::Vector, Split::Whole);
        specs.norm(format!("{prefix}.norm"), width);
    };
    match layer.attention {
        V4Attention::Window => {}
        V4Attention::Heavy { rate } => compressor(part("compressor"), rate, 1, head_dim),
        V4Attention::Sparse { rate } => {
            let indexer = own.indexer.as_ref().expect("parsed where a layer is sparse");
            compressor(part("compressor"), rate, 2, head_dim);
            compressor(part("indexer.compressor"), rate, 2, indexer.head_dim);
            specs.linear(part("indexer.wq_b"), indexer.heads * indexer.head_dim, own.q_lora_rank);
            specs.matrix(part("indexer.weights_proj"), indexer.heads, hidden, Role::Router);
        }
    }
}

impl<B: Backend> Attention<B> {
    pub(super) fn load(
        loader: &mut Loader<'_, B>,
        own: &DeepseekV4Config,
        layer: &V4Layer,
        attention: &str,
    ) -> Result<Self, LoadError> {
        let part = |name: &str| format!("{attention}.{name}");
        let indexer = |loader: &mut Loader<'_, B>| {
            Ok::<_, LoadError>(Indexer {
                q: loader.linear(&part("indexer.wq_b"))?,
                weights: loader.linear(&part("indexer.weights_proj"))?,
                compressor: Compressor::load(loader, &part("indexer.compressor"))?,
            })
        };
        Ok(Self {
            q_a: loader.linear(&part("wq_a"))?,
            q_norm: loader.norm(&part("q_norm"), 0.0)?,
            q_b: loader.linear(&part("wq_b"))?,
            kv: loader.linear(&part("wkv"))?,
            kv_norm: loader.norm(&part("kv_norm"), 0.0)?,
            sink: loader.vector(&part("attn_sink"))?,
            pool: match layer.attention {
                V4Attention::Window => None,
                kind => Some(Pool {
                    attended: Compressor::load(loader, &part("compressor"))?,
                    indexer: match kind {
                        V4Attention::Sparse { .. } => Some(indexer(loader)?),
                        _ => None,
                    },
                }),
            },
            o_a: loader.split_rows(&part("wo_a"), own.o_groups)?,
            o_b: loader.linear(&part("wo_b"))?,
        })
    }
}

impl<B: Backend> Compressor<B> {
    fn load(loader: &mut Loader<'_, B>, prefix: &str) -> Result<Self, LoadError> {
        Ok(Self {
            values: loader.linear(&format!("{prefix}.wkv"))?,
            gates: loader.linear(&format!("{prefix}.wgate"))?,
            bias: loader.vector(&format!("{prefix}.ape"))?,
            norm: loader.norm(&format!("{prefix}.norm"), 0.0)?,
        })
    }
}

impl<B: Backend> Rotation<B> {
    fn new(backend: &B, config: &RopeConfig, sizes: Sizes) -> DeviceResult<Self> {
        let table = |sign: f32| {
            let inv_freq = config.inv_freq().into_iter().map(|frequency| sign * frequency).collect();
            backend.rope_table(&HostRope { inv_freq, scale: config.attention_factor(), max_positions: sizes.positions })
        };
        Ok(Self { forth: table(1.0)?, back: table(-1.0)? })
    }
}

impl<B: Backend> AttentionScratch<B> {
    pub(super) fn new(config: &ModelConfig, own: &DeepseekV4Config, sizes: Sizes, backend: &B) -> DeviceResult<Self> {
        let (heads, head_dim) = (config.num_heads, own.head_dim);
        let last = |heads, head_dim| {
            let (offset, dim) = (head_dim - own.rope_dim, own.rope_dim);
            RopeLayout { heads, head_dim, offset, dim, interleaved: true }
        };
        let activation = |cols: usize| backend.tensor(sizes.rows, cols);
        let pooled = |series: usize, is_kind: fn(V4Attention) -> bool| {
            let any = own.layers.iter().any(|layer| is_kind(layer.attention));
            let pair = || Ok([activation(series * head_dim)?, activation(series * head_dim)?]);
            any.then(pair).transpose()
        };
        Ok(Self {
            eps: config.rms_norm_eps,
            window: own.window,
            scale: (head_dim as f32).sqrt().recip(),
            ropes: [Rotation::new(backend, &config.rope, sizes)?, Rotation::new(backend, &own.compress_rope, sizes)?],
            q_rope: last(heads, head_dim),
            kv_rope: last(1, head_dim),
            ones: ones(backend, head_dim)?,
            q_latent: activation(own.q_lora_rank)?,
            q: activation(heads * head_dim)?,
            kv: activation(head_dim)?,
            context: activation(heads * head_dim)?,
            o_latent: activation(own.o_groups * own.o_lora_rank)?,
            pooled: [
                pooled(1, |kind| matches!(kind, V4Attention::Heavy { .. }))?,
                pooled(2, |kind| matches!(kind, V4Attention::Sparse { .. }))?,
            ],
            indexer: match &own.indexer {
                None => None,
                Some(indexer) => Some(IndexerScratch {
                    top_k: indexer.top_k,
                    q_rope: last(indexer.heads, indexer.head_dim),
                    k_rope: last(1, indexer.head_dim),
                    q: activation(indexer.heads * indexer.head_dim)?,
                    weights: activation(indexer.heads)?,
                    values: activation(2 * indexer.head_dim)?,
                    gates: activation(2 * indexer.head_dim)?,
                }),
            },
        })
    }
}

impl<B: CompressedOps> Attention<B> {
    pub(super) fn forward(
        &self,
        backend: &B,
        h: &B::Tensor,
        (layer, plan): (usize, &B::AttentionPlan),
        cache: &mut B::KvCache,
        scratch: &mut AttentionScratch<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        let AttentionScratch {
            eps, ropes, q_rope, kv_rope, q_latent, q, kv, context, o_latent, pooled, indexer, ..
        } = scratch;
        let Rotation { forth, back } = &ropes[usize::from(self.pool.is_some())];
        backend.linear_group(h, &mut [(&self.q_a, &mut *q_latent), (&self.kv, &mut *kv)])?;
        backend.rms_norm_in_place(q_latent, &self.q_norm, *eps)?;
        backend.rms_norm_in_place(kv, &self.kv_norm, *eps)?;
        backend.linear(q_latent, &self.q_b, q)?;
        backend.rms_norm_in_place(q, &scratch.ones, *eps)?;
        backend.rope(q, *q_rope, forth, plan)?;
        backend.rope(kv, *kv_rope, forth, plan)?;
        let reads = match &self.pool {
            None => Reads::Window,
            Some(Pool { attended, indexer: own }) => {
                let room = pooled[usize::from(own.is_some())].as_mut().expect("allocated for the layer's kind");
                let rotary = (*eps, *kv_rope, forth);
                attended.forward(backend, h, Entries::Attended, rotary, room.each_mut(), cache, (layer, plan))?;
                match own {
                    None => Reads::All,
                    Some(own) => {
                        let scratch = indexer.as_mut().expect("allocated where a layer has one");
                        let IndexerScratch { top_k, q_rope, k_rope, q, weights, values, gates } = scratch;
                        let (rotary, room) = ((*eps, *k_rope, forth), [values, gates]);
                        own.compressor.forward(backend, h, Entries::Index, rotary, room, cache, (layer, plan))?;
                        backend.linear(q_latent, &own.q, q)?;
                        backend.rope(q, *q_rope, forth, plan)?;
                        backend.linear(h, &own.weights, weights)?;
                        Reads::Chosen { q, weights, top_k: *top_k }
                    }
                }
            }
        };
        let params = WindowedParams { window: scratch.window, scale: scratch.scale, sink: &self.sink, reads };
        backend.windowed_attention(q, kv, &params, cache, layer, plan, context)?;
        backend.rope(context, *q_rope, back, plan)?;
        backend.grouped_linear(context, &self.o_a, o_latent)?;
        backend.linear(o_latent, &self.o_b, out)
    }
}

impl<B: CompressedOps> Compressor<B> {
    #[allow(clippy::too_many_arguments)] // one input, how entries are made, room, and where they lie
    fn forward(
        &self,
        backend: &B,
        h: &B::Tensor,
        entries: Entries,
        (eps, layout, table): (f32, RopeLayout, &B::Rope),
        [values, gates]: [&mut B::Tensor; 2],
        cache: &mut B::KvCache,
        (layer, plan): (usize, &B::AttentionPlan),
    ) -> DeviceResult<()> {
        backend.linear_group(h, &mut [(&self.values, &mut *values), (&self.gates, &mut *gates)])?;
        let pooling = Pooling { values, gates, bias: &self.bias, norm: &self.norm, eps, layout, table };
        backend.pool(&pooling, entries, cache, layer, plan)
    }
}
