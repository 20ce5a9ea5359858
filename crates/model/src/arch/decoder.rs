//! What all decoders share: embedding, pre-norm residual layers, final norm, head.
//!
//! ```text
//! residual = embed(ids)
//! for each layer:
//!     residual += attention(norm(residual))
//!     residual += feed_forward(norm(residual))
//! logits = head(norm(residual))
//! ```
//!
//! What a half adds is summed over the ranks first. Additions are fused into the norm that follows them. Gemma also scales the
//! embeddings, norms what each half adds, and caps the logits.

use baton_device::{Backend, HostRope, Result as DeviceResult, TokenIds};

use super::mtp::Mtp;
use super::{Model, Sizes, Specs, StepAdapters};
use crate::LoadError;
use crate::checkpoint::Role;
use crate::config::{ModelConfig, RopeConfig};
use crate::loader::Loader;

const EMBEDDING: &str = "model.embed_tokens";
pub(super) const EMBEDDING_WEIGHT: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm";
const HEAD: &str = "lm_head";
pub(super) const HEAD_WEIGHT: &str = "lm_head.weight";

/// What attention sees of a step.
pub(crate) struct Step<'a, 's, B: Backend> {
    pub(crate) layer: usize,
    pub(crate) plan: &'a B::AttentionPlan,
    pub(crate) cache: &'a mut B::KvCache,
    pub(crate) adapters: &'a mut StepAdapters<'s, B>,
}

/// The two halves of a decoder layer. Both read normed hidden states `h` and write this rank's part of what is added to the
/// residual stream, all `[rows, hidden]`.
pub(crate) trait Layer<B: Backend>: Send {
    /// What the layers share: sizes, rotary table, activations.
    type Shared: Send;

    fn attention(
        &self,
        backend: &B,
        h: &B::Tensor,
        step: &mut Step<'_, '_, B>,
        shared: &mut Self::Shared,
        out: &mut B::Tensor,
    ) -> DeviceResult<()>;

    fn feed_forward(
        &self,
        backend: &B,
        h: &B::Tensor,
        adapters: &mut StepAdapters<'_, B>,
        shared: &mut Self::Shared,
        out: &mut B::Tensor,
    ) -> DeviceResult<()>;
}

/// A decoder made of layers of one kind.
pub(crate) struct Decoder<B: Backend, L: Layer<B>> {
    eps: f32,
    embedding_scale: Option<f32>,
    logit_softcap: Option<f32>,
    /// `[vocab, hidden]`; also the head if `head` is `None`.
    embedding: B::Linear,
    layers: Vec<Normed<B, L>>,
    norm: B::Vector,
    /// `[vocab, hidden]`.
    head: Option<B::Linear>,
    mtp: Option<Mtp<B, L>>,
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

/// A layer with its norms.
pub(super) struct Normed<B: Backend, L> {
    attention_norm: B::Vector,
    feed_forward_norm: B::Vector,
    /// Behind attention and behind the feed-forward network (Gemma).
    post_norms: Option<[B::Vector; 2]>,
    layer: L,
}

/// Norms before attention, before the feed-forward network, and, where there are such, behind each.
fn norm_names(config: &ModelConfig, layer: usize) -> ([String; 2], Option<[String; 2]>) {
    let name = |name: &str| format!("model.layers.{layer}.{name}_layernorm");
    if config.post_norms {
        ([name("input"), name("pre_feedforward")], Some([name("post_attention"), name("post_feedforward")]))
    } else {
        ([name("input"), name("post_attention")], None)
    }
}

/// The tensors outside the layers, and the layers' norms.
pub(super) fn outer_specs(config: &ModelConfig, specs: &mut Specs) {
    specs.matrix(EMBEDDING.into(), config.vocab_size, config.hidden_size, Role::Float);
    specs.norm(NORM.into(), config.hidden_size);
    if !config.tie_word_embeddings {
        specs.linear(HEAD.into(), config.vocab_size, config.hidden_size);
    }
    for layer in 0..config.num_layers + config.mtp_layers {
        let (norms, post_norms) = norm_names(config, layer);
        norms.into_iter().chain(post_norms.into_iter().flatten()).for_each(|name| specs.norm(name, config.hidden_size));
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
        let embedding = loader.table(EMBEDDING)?;
        let head = if config.tie_word_embeddings { None } else { Some(loader.linear(HEAD)?) };
        let mut normed = |loader: &mut Loader<'a, B>, i| {
            let ([attention, feed_forward], post_norms) = norm_names(config, i);
            let mut norm = |name: &String| loader.norm(name, config.norm_offset);
            Ok::<_, LoadError>(Normed {
                attention_norm: norm(&attention)?,
                feed_forward_norm: norm(&feed_forward)?,
                post_norms: match post_norms {
                    None => None,
                    Some([attention, feed_forward]) => Some([norm(&attention)?, norm(&feed_forward)?]),
                },
                layer: layer(loader, i)?,
            })
        };
        let layers = (0..config.num_layers).map(|i| normed(loader, i)).collect::<Result<_, LoadError>>()?;
        let norm = loader.norm(NORM, config.norm_offset)?;
        let mtp = loader.undigested(|loader| {
            let layers = config.num_layers..config.num_layers + config.mtp_layers;
            let mtp = layers.map(|i| {
                let layer = normed(loader, i)?;
                Mtp::build(config, loader, layer)
            });
            mtp.last().transpose()
        })?;
        let backend = loader.backend;
        Ok(Self {
            eps: config.rms_norm_eps,
            embedding_scale: config.embedding_scale,
            logit_softcap: config.logit_softcap,
            embedding,
            layers,
            norm,
            head,
            mtp,
            shared,
            residual: backend.tensor(sizes.rows, config.hidden_size)?,
            h: backend.tensor(sizes.rows, config.hidden_size)?,
            delta: backend.tensor(sizes.rows, config.hidden_size)?,
            gathered: backend.tensor(sizes.logit_rows, config.hidden_size)?,
            logits: backend.tensor(sizes.logit_rows, config.vocab_size)?,
        })
    }
}

impl<B: Backend, L: Layer<B>> Normed<B, L> {
    /// From a normed input in `h` to what the second half adds, in `delta`; the first half is added to `residual`.
    fn forward(
        &self,
        backend: &B,
        eps: f32,
        [residual, h, delta]: [&mut B::Tensor; 3],
        mut step: Step<'_, '_, B>,
        shared: &mut L::Shared,
    ) -> DeviceResult<()> {
        self.layer.attention(backend, h, &mut step, shared, delta)?;
        backend.all_reduce(delta)?;
        if let Some([post_attention, _]) = &self.post_norms {
            backend.rms_norm_in_place(delta, post_attention, eps)?;
        }
        backend.add_rms_norm(delta, residual, &self.feed_forward_norm, eps, h)?;
        self.layer.feed_forward(backend, h, step.adapters, shared, delta)?;
        backend.all_reduce(delta)?;
        if let Some([_, post_feed_forward]) = &self.post_norms {
            backend.rms_norm_in_place(delta, post_feed_forward, eps)?;
        }
        Ok(())
    }
}

impl<B: Backend, L: Layer<B>> Model<B> for Decoder<B, L> {
    fn forward(
        &mut self,
        backend: &B,
        ids: TokenIds<'_, B::Chosen>,
        plan: &B::AttentionPlan,
        cache: &mut B::KvCache,
        adapters: &mut StepAdapters<'_, B>,
    ) -> DeviceResult<()> {
        let Self { eps, embedding, layers, norm, shared, residual, h, delta, .. } = self;
        backend.embed(ids, embedding, residual)?;
        if let Some(factor) = self.embedding_scale {
            backend.scale(residual, factor)?;
        }
        for (i, layer) in layers.iter().enumerate() {
            if i == 0 {
                backend.rms_norm(residual, &layer.attention_norm, *eps, h)?;
            } else {
                backend.add_rms_norm(delta, residual, &layer.attention_norm, *eps, h)?;
            }
            let step = Step { layer: i, plan, cache: &mut *cache, adapters: &mut *adapters };
            layer.forward(backend, *eps, [residual, h, delta], step, shared)?;
        }
        backend.add_rms_norm(delta, residual, norm, *eps, h)
    }

    fn looks_ahead(&self) -> bool {
        self.mtp.is_some()
    }

    fn look_ahead(
        &mut self,
        backend: &B,
        next: &[u32],
        plan: &B::AttentionPlan,
        cache: &mut B::KvCache,
        adapters: &mut StepAdapters<'_, B>,
    ) -> DeviceResult<()> {
        let Self { eps, embedding, layers, mtp, shared, residual, h, delta, .. } = self;
        let mtp = mtp.as_ref().expect("asked for where there is one");
        backend.embed(TokenIds::Known(next), embedding, residual)?;
        mtp.input(backend, *eps, residual, h, delta)?;
        backend.rms_norm(residual, &mtp.layer.attention_norm, *eps, h)?;
        let step = Step { layer: layers.len(), plan, cache, adapters };
        mtp.layer.forward(backend, *eps, [residual, h, delta], step, shared)?;
        backend.add_rms_norm(delta, residual, &mtp.norm, *eps, h)
    }

    fn hidden(&mut self, backend: &B, rows: &[u32]) -> DeviceResult<&B::Tensor> {
        backend.gather_rows(&self.h, rows, &mut self.gathered)?;
        Ok(&self.gathered)
    }

    fn logits(&mut self, backend: &B, rows: &[u32]) -> DeviceResult<&B::Tensor> {
        backend.gather_rows(&self.h, rows, &mut self.gathered)?;
        backend.linear(&self.gathered, self.head.as_ref().unwrap_or(&self.embedding), &mut self.logits)?;
        if let Some(cap) = self.logit_softcap {
            backend.softcap(&mut self.logits, cap)?;
        }
        Ok(&self.logits)
    }
}

/// A rotary table for all positions of a sequence.
pub(super) fn rope<B: Backend>(backend: &B, config: &RopeConfig, sizes: Sizes) -> DeviceResult<B::Rope> {
    backend.rope_table(&HostRope {
        inv_freq: config.inv_freq(),
        scale: config.attention_factor(),
        max_positions: sizes.positions,
    })
}
