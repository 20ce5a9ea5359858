//! What all decoders share: embedding, pre-norm residual layers, final norm, head; and the gated
//! feed-forward network.
//!
//! ```text
//! residual = embed(ids)
//! for each layer:
//!     residual += attention(norm(residual))
//!     residual += feed_forward(norm(residual))
//! logits = head(norm(residual))
//! ```
//!
//! Additions are fused into the norm that follows them.

use baton_device::{Backend, HostRope, Result as DeviceResult};

use super::{Model, Sizes, Specs};
use crate::LoadError;
use crate::checkpoint::Role;
use crate::config::ModelConfig;
use crate::loader::Loader;

const EMBEDDING: &str = "model.embed_tokens";
pub(super) const EMBEDDING_WEIGHT: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm";
const HEAD: &str = "lm_head";

/// What attention sees of a step.
pub(crate) struct Step<'a, B: Backend> {
    pub(crate) layer: usize,
    pub(crate) plan: &'a B::AttentionPlan,
    pub(crate) cache: &'a mut B::KvCache,
}

/// The two halves of a decoder layer. Both read normed hidden states `h` and write what is added to the
/// residual stream, all `[rows, hidden]`.
pub(crate) trait Layer<B: Backend>: Send {
    /// What the layers share: sizes, rotary table, activations.
    type Shared: Send;

    fn attention(
        &self,
        backend: &B,
        h: &B::Tensor,
        step: &mut Step<'_, B>,
        shared: &mut Self::Shared,
        out: &mut B::Tensor,
    ) -> DeviceResult<()>;

    fn feed_forward(
        &self,
        backend: &B,
        h: &B::Tensor,
        shared: &mut Self::Shared,
        out: &mut B::Tensor,
    ) -> DeviceResult<()>;
}

/// A decoder made of layers of one kind.
pub(crate) struct Decoder<B: Backend, L: Layer<B>> {
    eps: f32,
    /// `[vocab, hidden]`; also the head if `head` is `None`.
    embedding: B::Linear,
    layers: Vec<Normed<B, L>>,
    norm: B::Vector,
    /// `[vocab, hidden]`.
    head: Option<B::Linear>,
    shared: L::Shared,
    /// `[rows, hidden]`.
    residual: B::Tensor,
    /// Normed, `[rows, hidden]`.
    h: B::Tensor,
    /// What a half layer adds, `[rows, hidden]`.
    delta: B::Tensor,
    /// Rows whose logits are wanted, `[logit_rows, hidden]`.
    gathered: B::Tensor,
    /// `[logit_rows, vocab]`.
    logits: B::Tensor,
}

struct Normed<B: Backend, L> {
    input_norm: B::Vector,
    post_attention_norm: B::Vector,
    layer: L,
}

/// The tensors outside the layers, and the layers' norms.
pub(super) fn outer_specs(config: &ModelConfig, specs: &mut Specs) {
    specs.matrix(EMBEDDING.into(), config.vocab_size, config.hidden_size, Role::Float);
    specs.norm(NORM.into(), config.hidden_size);
    if !config.tie_word_embeddings {
        specs.linear(HEAD.into(), config.vocab_size, config.hidden_size);
    }
    for layer in 0..config.num_layers {
        specs.norm(format!("model.layers.{layer}.input_layernorm"), config.hidden_size);
        specs.norm(format!("model.layers.{layer}.post_attention_layernorm"), config.hidden_size);
    }
}

impl<B: Backend, L: Layer<B>> Decoder<B, L> {
    /// Loads everything; `layer` loads one layer by its number.
    pub(super) fn build<'a>(
        config: &ModelConfig,
        sizes: Sizes,
        loader: &mut Loader<'a, B>,
        shared: L::Shared,
        mut layer: impl FnMut(&mut Loader<'a, B>, usize) -> Result<L, LoadError>,
    ) -> Result<Self, LoadError> {
        // The largest tensors first: while one is prepared it takes memory twice.
        let embedding = loader.linear(EMBEDDING)?;
        let head = if config.tie_word_embeddings { None } else { Some(loader.linear(HEAD)?) };
        let layers = (0..config.num_layers)
            .map(|i| {
                Ok(Normed {
                    input_norm: loader.norm(&format!("model.layers.{i}.input_layernorm"))?,
                    post_attention_norm: loader.norm(&format!("model.layers.{i}.post_attention_layernorm"))?,
                    layer: layer(loader, i)?,
                })
            })
            .collect::<Result<_, LoadError>>()?;
        let norm = loader.norm(NORM)?;
        let backend = loader.backend;
        Ok(Self {
            eps: config.rms_norm_eps,
            embedding,
            layers,
            norm,
            head,
            shared,
            residual: backend.tensor(sizes.rows, config.hidden_size)?,
            h: backend.tensor(sizes.rows, config.hidden_size)?,
            delta: backend.tensor(sizes.rows, config.hidden_size)?,
            gathered: backend.tensor(sizes.logit_rows, config.hidden_size)?,
            logits: backend.tensor(sizes.logit_rows, config.vocab_size)?,
        })
    }
}

impl<B: Backend, L: Layer<B>> Model<B> for Decoder<B, L> {
    fn forward(
        &mut self,
        backend: &B,
        ids: &[u32],
        plan: &B::AttentionPlan,
        cache: &mut B::KvCache,
    ) -> DeviceResult<()> {
        let Self { eps, embedding, layers, norm, shared, residual, h, delta, .. } = self;
        backend.embed(ids, embedding, residual)?;
        for (i, Normed { input_norm, post_attention_norm, layer }) in layers.iter().enumerate() {
            if i == 0 {
                backend.rms_norm(residual, input_norm, *eps, h)?;
            } else {
                backend.add_rms_norm(delta, residual, input_norm, *eps, h)?;
            }
            let mut step = Step { layer: i, plan, cache: &mut *cache };
            layer.attention(backend, h, &mut step, shared, delta)?;
            backend.add_rms_norm(delta, residual, post_attention_norm, *eps, h)?;
            layer.feed_forward(backend, h, shared, delta)?;
        }
        backend.add_rms_norm(delta, residual, norm, *eps, h)
    }

    fn logits(&mut self, backend: &B, rows: &[u32]) -> DeviceResult<&B::Tensor> {
        backend.gather_rows(&self.h, rows, &mut self.gathered)?;
        backend.linear(&self.gathered, self.head.as_ref().unwrap_or(&self.embedding), &mut self.logits)?;
        Ok(&self.logits)
    }
}

/// The rotary table of a model.
pub(super) fn rope<B: Backend>(backend: &B, config: &ModelConfig, sizes: Sizes) -> DeviceResult<B::Rope> {
    backend.rope_table(&HostRope {
        inv_freq: config.rope.inv_freq(),
        scale: config.rope.attention_factor(),
        max_positions: sizes.positions,
    })
}

/// `down(silu(gate(x)) ⊙ up(x))`.
pub(super) struct Mlp<B: Backend> {
    gate: B::Linear,
    up: B::Linear,
    down: B::Linear,
}

/// Activations of [`Mlp`], `[rows, width]` each.
pub(super) struct MlpScratch<B: Backend> {
    gate: B::Tensor,
    up: B::Tensor,
    product: B::Tensor,
}

/// The tensors of [`Mlp`].
pub(super) fn mlp_specs(prefix: &str, hidden: usize, width: usize, specs: &mut Specs) {
    specs.linear(format!("{prefix}.gate_proj"), width, hidden);
    specs.linear(format!("{prefix}.up_proj"), width, hidden);
    specs.linear(format!("{prefix}.down_proj"), hidden, width);
}

impl<B: Backend> Mlp<B> {
    pub(super) fn load(loader: &mut Loader<'_, B>, prefix: &str) -> Result<Self, LoadError> {
        Ok(Self {
            gate: loader.linear(&format!("{prefix}.gate_proj"))?,
            up: loader.linear(&format!("{prefix}.up_proj"))?,
            down: loader.linear(&format!("{prefix}.down_proj"))?,
        })
    }

    pub(super) fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        scratch: &mut MlpScratch<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        backend.linear(x, &self.gate, &mut scratch.gate)?;
        backend.linear(x, &self.up, &mut scratch.up)?;
        backend.silu_mul(&scratch.gate, &scratch.up, &mut scratch.product)?;
        backend.linear(&scratch.product, &self.down, out)
    }
}

impl<B: Backend> MlpScratch<B> {
    pub(super) fn new(backend: &B, rows: usize, width: usize) -> DeviceResult<Self> {
        let tensor = || backend.tensor(rows, width);
        Ok(Self { gate: tensor()?, up: tensor()?, product: tensor()? })
    }
}
