//! DeepSeek-V4: several residual streams (manifold-constrained hyper-connections, arXiv 2512.24880), attention to a window and,
//! in most layers, to entries that are pooled of the tokens before, experts in every layer.
//!
//! ```text
//! streams = embed(ids), n times
//! for each half of each layer:
//!     pre, post, C = weights(streams)
//!     y = half(norm(Σ_i pre_i stream_i))
//!     stream_j = post_j y + Σ_i C[i, j] stream_i
//! logits = head(norm(Σ_i pre_i stream_i))
//! ```
//!
//! A token has one vector that is key and value of all heads at once; what heads give is rotated back by the position that values
//! were rotated by. There are three kinds of layers: those that read the window alone, those that read all entries as well
//! (pooled of many tokens each), and those whose indexer chooses among entries of few tokens. Tensors have the names of the
//! released files.

use baton_device::{
    Activation, Backend, CompressedOps, DType, Entries, HostRope, HostTensor, Mixing, Pooling, Reads,
    Result as DeviceResult, RopeLayout, Routing, Scoring, TokenIds, WindowedParams,
};

use super::{Model, Sizes, Specs, StepAdapters};
use crate::LoadError;
use crate::checkpoint::Role;
use crate::config::{DeepseekV4Config, ModelConfig, MoeConfig, RopeConfig, V4Attention, V4Layer};
use crate::loader::Loader;
use crate::split::Split;

const EMBEDDING: &str = "embed";
pub(super) const EMBEDDING_WEIGHT: &str = "embed.weight";
const NORM: &str = "norm";
const HEAD: &str = "head";
pub(super) const HEAD_WEIGHT: &str = "head.weight";
/// Gate, up and down of an expert.
const PROJECTIONS: [&str; 3] = ["w1", "w3", "w2"];

pub(super) struct DeepseekV4<B: CompressedOps> {
    /// `[vocab, hidden]`.
    embedding: B::Linear,
    layers: Vec<Layer<B>>,
    /// Joins the streams behind the last layer.
    joint: Joint<B>,
    norm: B::Vector,
    /// `[vocab, hidden]`.
    head: B::Linear,
    shared: Shared<B>,
    streams: Streams<B>,
    /// `[rows, (2 + n) * n]`.
    weights: B::Tensor,
    /// Of the joint behind the last layer, `[rows, n]`.
    last_weights: B::Tensor,
    /// What a half layer reads, `[rows, hidden]`; behind the last layer the hidden states.
    h: B::Tensor,
    /// What a half layer adds, `[rows, hidden]`.
    delta: B::Tensor,
    /// Rows whose logits are wanted, `[logit_rows, hidden]`.
    gathered: B::Tensor,
    /// `[logit_rows, vocab]`.
    logits: B::Tensor,
}

struct Layer<B: CompressedOps> {
    joints: [Joint<B>; 2],
    norms: [B::Vector; 2],
    attention: Attention<B>,
    experts: Experts<B>,
}

/// The residual streams of a step's rows, n of them.
struct Streams<B: Backend> {
    count: usize,
    mixing_iterations: usize,
    mixing_eps: f32,
    eps: f32,
    /// `[n * hidden]`.
    ones: B::Vector,
    /// `[rows, n * hidden]`.
    values: B::Tensor,
    /// Each row normed as a whole.
    normed: B::Tensor,
}

/// What joins and mixes the streams around a half layer, or joins them behind all.
struct Joint<B: Backend> {
    /// `[(2 + n) * n, n * hidden]`, or `[n, n * hidden]`.
    weights: B::Linear,
    base: B::Vector,
    scale: B::Vector,
}

struct Attention<B: Backend> {
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

struct Experts<B: CompressedOps> {
    /// `[experts, hidden]`.
    router: B::Linear,
    routed: B::Experts,
    /// Whether tokens choose their experts, and not scores.
    by_token: bool,
    /// Gate, up and down of the shared ones as one network.
    shared: [B::Linear; 3],
}

/// What the layers share: sizes, rotary tables, activations.
struct Shared<B: Backend> {
    eps: f32,
    window: usize,
    scale: f32,
    expert_limit: f32,
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
    /// `[rows, experts]`.
    router_logits: B::Tensor,
    /// Gates and ups of the shared experts, and their product, `[rows, width]` each.
    shared_experts: [B::Tensor; 3],
    /// `[rows, hidden]`.
    shared_out: B::Tensor,
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

/// Names and shapes of all tensors.
pub(super) fn specs(config: &ModelConfig, own: &DeepseekV4Config, specs: &mut Specs) {
    let (hidden, streams) = (config.hidden_size, own.streams);
    specs.matrix(EMBEDDING.into(), config.vocab_size, hidden, Role::Float);
    specs.norm(NORM.into(), hidden);
    specs.linear(HEAD.into(), config.vocab_size, hidden);
    joint_specs("hc_head", [streams, streams * hidden, 1], specs);
    let moe = experts_of(config);
    for (i, layer) in own.layers.iter().enumerate() {
        let part = |name: &str| format!("layers.{i}.{name}");
        for half in ["attn", "ffn"] {
            joint_specs(&part(&format!("hc_{half}")), [(2 + streams) * streams, streams * hidden, 3], specs);
            specs.norm(part(&format!("{half}_norm")), hidden);
        }
        attention_specs(config, own, layer, &part("attn"), specs);
        expert_specs(config, moe, layer, &part("ffn"), specs);
    }
}

fn joint_specs(prefix: &str, [outputs, inputs, scales]: [usize; 3], specs: &mut Specs) {
    specs.add(format!("{prefix}_fn"), vec![outputs, inputs], Role::Router, Split::Whole);
    specs.vector(format!("{prefix}_base"), outputs);
    specs.vector(format!("{prefix}_scale"), scales);
}

fn attention_specs(config: &ModelConfig, own: &DeepseekV4Config, layer: &V4Layer, attention: &str, specs: &mut Specs) {
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

fn expert_specs(config: &ModelConfig, moe: &MoeConfig, layer: &V4Layer, block: &str, specs: &mut Specs) {
    let (hidden, width) = (config.hidden_size, moe.intermediate_size);
    specs.matrix(format!("{block}.gate"), moe.num_experts, hidden, Role::Router);
    if layer.hashed {
        specs.add(token_table(block), vec![config.vocab_size, moe.routing.top_k], Role::Table, Split::Whole);
    } else {
        specs.vector(format!("{block}.gate.bias"), moe.num_experts);
    }
    let mut network = |prefix: String, width: usize| {
        let [gate, up, down] = PROJECTIONS.map(|name| format!("{prefix}.{name}"));
        specs.linear(gate, width, hidden);
        specs.linear(up, width, hidden);
        specs.linear(down, hidden, width);
    };
    (0..moe.num_experts).for_each(|expert| network(format!("{block}.experts.{expert}"), width));
    network(format!("{block}.shared_experts"), moe.num_shared_experts * width);
}

fn token_table(block: &str) -> String {
    format!("{block}.gate.tid2eid")
}

fn experts_of(config: &ModelConfig) -> &MoeConfig {
    config.moe.as_ref().expect("every layer has experts")
}

/// Whether a tensor beyond [`specs`] is of the layers that predict further tokens.
pub(super) fn is_of_prediction(name: &str) -> bool {
    name.starts_with("mtp.")
}

pub(super) fn build<B: CompressedOps>(
    config: &ModelConfig,
    own: &DeepseekV4Config,
    sizes: Sizes,
    loader: &mut Loader<'_, B>,
) -> Result<DeepseekV4<B>, LoadError> {
    let embedding = loader.table(EMBEDDING)?;
    let head = loader.linear(HEAD)?;
    let layers = own.layers.iter().enumerate().map(|(i, layer)| {
        let part = |name: &str| format!("layers.{i}.{name}");
        Ok(Layer {
            joints: [Joint::load(loader, &part("hc_attn"))?, Joint::load(loader, &part("hc_ffn"))?],
            norms: [loader.norm(&part("attn_norm"), 0.0)?, loader.norm(&part("ffn_norm"), 0.0)?],
            attention: Attention::load(loader, own, layer, &part("attn"))?,
            experts: Experts::load(loader, (config, own), layer, &part("ffn"))?,
        })
    });
    let layers = layers.collect::<Result<_, LoadError>>()?;
    let (joint, norm) = (Joint::load(loader, "hc_head")?, loader.norm(NORM, 0.0)?);
    let backend = loader.backend;
    let activation = |cols: usize| backend.tensor(sizes.rows, cols);
    let streams = own.streams;
    Ok(DeepseekV4 {
        embedding,
        layers,
        joint,
        norm,
        head,
        shared: Shared::new(config, own, sizes, backend)?,
        streams: Streams {
            count: streams,
            mixing_iterations: own.mixing_iterations,
            mixing_eps: own.mixing_eps,
            eps: config.rms_norm_eps,
            ones: ones(backend, streams * config.hidden_size)?,
            values: activation(streams * config.hidden_size)?,
            normed: activation(streams * config.hidden_size)?,
        },
        weights: activation((2 + streams) * streams)?,
        last_weights: activation(streams)?,
        h: activation(config.hidden_size)?,
        delta: activation(config.hidden_size)?,
        gathered: backend.tensor(sizes.logit_rows, config.hidden_size)?,
        logits: backend.tensor(sizes.logit_rows, config.vocab_size)?,
    })
}

/// The weight of a norm that has none.
fn ones<B: Backend>(backend: &B, len: usize) -> DeviceResult<B::Vector> {
    backend.vector(&HostTensor::new("ones", DType::F32, vec![len], &1_f32.to_le_bytes().repeat(len)))
}

impl<B: Backend> Joint<B> {
    fn load(loader: &mut Loader<'_, B>, prefix: &str) -> Result<Self, LoadError> {
        Ok(Self {
            weights: loader.named_linear(&format!("{prefix}_fn"))?,
            base: loader.vector(&format!("{prefix}_base"))?,
            scale: loader.vector(&format!("{prefix}_scale"))?,
        })
    }
}

impl<B: CompressedOps> Streams<B> {
    /// Joins them to what is read, normed. `weights` become those by which they are mixed then.
    fn join(
        &mut self,
        backend: &B,
        joint: &Joint<B>,
        norm: &B::Vector,
        weights: &mut B::Tensor,
        h: &mut B::Tensor,
    ) -> DeviceResult<()> {
        backend.rms_norm(&self.values, &self.ones, self.eps, &mut self.normed)?;
        backend.linear(&self.normed, &joint.weights, weights)?;
        let Joint { base, scale, .. } = joint;
        let (streams, iterations, eps) = (self.count, self.mixing_iterations, self.mixing_eps);
        backend.stream_weights(&Mixing { streams, base, scale, iterations, eps }, weights)?;
        backend.join_streams(&self.values, weights, h)?;
        backend.rms_norm_in_place(h, norm, self.eps)
    }
}

impl<B: Backend> Attention<B> {
    fn load(
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

impl<B: CompressedOps> Experts<B> {
    fn load(
        loader: &mut Loader<'_, B>,
        (config, own): (&ModelConfig, &DeepseekV4Config),
        layer: &V4Layer,
        block: &str,
    ) -> Result<Self, LoadError> {
        let moe = experts_of(config);
        let (correction_bias, by_token) = match layer.hashed {
            true => (Vec::new(), Some(loader.token_table(&token_table(block), moe.num_experts)?)),
            false => (loader.host_vector(&format!("{block}.gate.bias"))?, None),
        };
        let routing = Routing { scoring: Scoring::SqrtSoftplus { correction_bias }, by_token, ..moe.routing.clone() };
        let [gate, up, down] = PROJECTIONS.map(|name| format!("{block}.shared_experts.{name}"));
        Ok(Self {
            // Without what is named like its bias: that chooses experts and does not weigh them.
            router: loader.named_linear(&format!("{block}.gate.weight"))?,
            routed: loader.experts(
                &format!("{block}.experts"),
                PROJECTIONS,
                moe.num_experts,
                routing,
                Some(own.expert_limit),
            )?,
            by_token: layer.hashed,
            shared: [loader.linear(&gate)?, loader.linear(&up)?, loader.linear(&down)?],
        })
    }

    fn forward(
        &self,
        backend: &B,
        ids: TokenIds<'_, B::Chosen>,
        h: &B::Tensor,
        shared: &mut Shared<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        let Shared { expert_limit: limit, router_logits, shared_experts, shared_out, .. } = shared;
        backend.linear(h, &self.router, router_logits)?;
        if self.by_token {
            backend.fused_moe_by_token(h, router_logits, ids, &self.routed, out)?;
        } else {
            backend.fused_moe(h, router_logits, &self.routed, out)?;
        }
        let ([gate, up, down], [gated, upped, product]) = (&self.shared, shared_experts);
        backend.linear_group(h, &mut [(gate, &mut *gated), (up, &mut *upped)])?;
        backend.clamp(gated, f32::NEG_INFINITY, *limit)?;
        backend.clamp(upped, -*limit, *limit)?;
        backend.gated_activation(Activation::Silu, gated, upped, product)?;
        backend.linear(product, down, shared_out)?;
        backend.add(out, shared_out)
    }
}

impl<B: Backend> Rotation<B> {
    fn new(backend: &B, config: &RopeConfig, sizes: Sizes) -> DeviceResult<Self> {
        let table = |sign: f32| {
            let inv_freq = config.inv_freq().into_iter().map(|frequency| sign * frequency).collect();
            backend.rope_table(&HostRope { inv_freq, scale: 1.0, max_positions: sizes.positions })
        };
        Ok(Self { forth: table(1.0)?, back: table(-1.0)? })
    }
}

impl<B: Backend> Shared<B> {
    fn new(config: &ModelConfig, own: &DeepseekV4Config, sizes: Sizes, backend: &B) -> DeviceResult<Self> {
        let (heads, head_dim, moe) = (config.num_heads, own.head_dim, experts_of(config));
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
        let shared_width = moe.num_shared_experts * moe.intermediate_size;
        Ok(Self {
            eps: config.rms_norm_eps,
            window: own.window,
            scale: (head_dim as f32).sqrt().recip(),
            expert_limit: own.expert_limit,
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
            router_logits: activation(moe.num_experts)?,
            shared_experts: [activation(shared_width)?, activation(shared_width)?, activation(shared_width)?],
            shared_out: activation(config.hidden_size)?,
        })
    }
}

impl<B: CompressedOps> Attention<B> {
    fn forward(
        &self,
        backend: &B,
        h: &B::Tensor,
        (layer, plan): (usize, &B::AttentionPlan),
        cache: &mut B::KvCache,
        shared: &mut Shared<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        let Shared { eps, ropes, q_rope, kv_rope, q_latent, q, kv, context, o_latent, pooled, indexer, .. } = shared;
        let Rotation { forth, back } = &ropes[usize::from(self.pool.is_some())];
        backend.linear_group(h, &mut [(&self.q_a, &mut *q_latent), (&self.kv, &mut *kv)])?;
        backend.rms_norm_in_place(q_latent, &self.q_norm, *eps)?;
        backend.rms_norm_in_place(kv, &self.kv_norm, *eps)?;
        backend.linear(q_latent, &self.q_b, q)?;
        backend.rms_norm_in_place(q, &shared.ones, *eps)?;
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
        let params = WindowedParams { window: shared.window, scale: shared.scale, sink: &self.sink, reads };
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

impl<B: CompressedOps> Model<B> for DeepseekV4<B> {
    fn forward(
        &mut self,
        backend: &B,
        ids: TokenIds<'_, B::Chosen>,
        plan: &B::AttentionPlan,
        cache: &mut B::KvCache,
        _: &mut StepAdapters<'_, B>,
    ) -> DeviceResult<()> {
        let Self { embedding, layers, joint, norm, shared, streams, weights, last_weights, h, delta, .. } = self;
        backend.embed(ids, embedding, h)?;
        backend.fill_streams(h, &mut streams.values)?;
        for (i, Layer { joints, norms, attention, experts }) in layers.iter().enumerate() {
            streams.join(backend, &joints[0], &norms[0], weights, h)?;
            attention.forward(backend, h, (i, plan), cache, shared, delta)?;
            backend.mix_streams(delta, weights, &mut streams.values)?;
            streams.join(backend, &joints[1], &norms[1], weights, h)?;
            experts.forward(backend, ids, h, shared, delta)?;
            backend.mix_streams(delta, weights, &mut streams.values)?;
        }
        streams.join(backend, joint, norm, last_weights, h)
    }

    fn looks_ahead(&self) -> bool {
        false
    }

    fn look_ahead(
        &mut self,
        _: &B,
        _: &[u32],
        _: &B::AttentionPlan,
        _: &mut B::KvCache,
        _: &mut StepAdapters<'_, B>,
    ) -> DeviceResult<()> {
        unreachable!("asked for where a model looks ahead")
    }

    fn hidden(&mut self, backend: &B, rows: &[u32]) -> DeviceResult<&B::Tensor> {
        backend.gather_rows(&self.h, rows, &mut self.gathered)?;
        Ok(&self.gathered)
    }

    fn logits(&mut self, backend: &B, rows: &[u32]) -> DeviceResult<&B::Tensor> {
        backend.gather_rows(&self.h, rows, &mut self.gathered)?;
        backend.linear(&self.gathered, &self.head, &mut self.logits)?;
        Ok(&self.logits)
    }
}
