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
//! Tensors have the names of the released files.

mod attention;
mod experts;

use baton_device::{Backend, CompressedOps, DType, HostTensor, Mixing, Result as DeviceResult, TokenIds};

use self::attention::{Attention, AttentionScratch};
use self::experts::{Experts, ExpertsScratch};
use super::{Model, Sizes, Specs, StepAdapters};
use crate::LoadError;
use crate::checkpoint::Role;
use crate::config::{DeepseekV4Config, ModelConfig};
use crate::loader::Loader;
use crate::split::Split;

const EMBEDDING: &str = "embed";
pub(super) const EMBEDDING_WEIGHT: &str = "embed.weight";
const NORM: &str = "norm";
const HEAD: &str = "head";
pub(super) const HEAD_WEIGHT: &str = "head.weight";

pub(super) struct DeepseekV4<B: CompressedOps> {
    /// `[vocab, hidden]`.
    embedding: B::Linear,
    layers: Vec<Layer<B>>,
    /// Joins the streams behind the last layer.
    joint: Joint<B>,
    norm: B::Vector,
    /// `[vocab, hidden]`.
    head: B::Linear,
    attention: AttentionScratch<B>,
    experts: ExpertsScratch<B>,
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

/// Names and shapes of all tensors.
pub(super) fn specs(config: &ModelConfig, own: &DeepseekV4Config, specs: &mut Specs) {
    let (hidden, streams) = (config.hidden_size, own.streams);
    specs.matrix(EMBEDDING.into(), config.vocab_size, hidden, Role::Float);
    specs.norm(NORM.into(), hidden);
    specs.linear(HEAD.into(), config.vocab_size, hidden);
    joint_specs("hc_head", [streams, streams * hidden, 1], specs);
    for (i, layer) in own.layers.iter().enumerate() {
        let part = |name: &str| format!("layers.{i}.{name}");
        for half in ["attn", "ffn"] {
            joint_specs(&part(&format!("hc_{half}")), [(2 + streams) * streams, streams * hidden, 3], specs);
            specs.norm(part(&format!("{half}_norm")), hidden);
        }
        attention::specs(config, own, layer, &part("attn"), specs);
        experts::specs(config, layer, &part("ffn"), specs);
    }
}

fn joint_specs(prefix: &str, [outputs, inputs, scales]: [usize; 3], specs: &mut Specs) {
    specs.add(format!("{prefix}_fn"), vec![outputs, inputs], Role::Router, Split::Whole);
    specs.vector(format!("{prefix}_base"), outputs);
    specs.vector(format!("{prefix}_scale"), scales);
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
        attention: AttentionScratch::new(config, own, sizes, backend)?,
        experts: ExpertsScratch::new(config, own, sizes, backend)?,
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

impl<B: CompressedOps> Model<B> for DeepseekV4<B> {
    fn forward(
        &mut self,
        backend: &B,
        ids: TokenIds<'_, B::Chosen>,
        plan: &B::AttentionPlan,
        cache: &mut B::KvCache,
        _: &mut StepAdapters<'_, B>,
    ) -> DeviceResult<()> {
        let Self { embedding, layers, joint, norm, streams, weights, last_weights, h, delta, .. } = self;
        backend.embed(ids, embedding, h)?;
        backend.fill_streams(h, &mut streams.values)?;
        for (i, layer) in layers.iter().enumerate() {
            let Layer { joints, norms, .. } = layer;
            streams.join(backend, &joints[0], &norms[0], weights, h)?;
            layer.attention.forward(backend, h, (i, plan), cache, &mut self.attention, delta)?;
            backend.mix_streams(delta, weights, &mut streams.values)?;
            streams.join(backend, &joints[1], &norms[1], weights, h)?;
            layer.experts.forward(backend, ids, h, &mut self.experts, delta)?;
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
