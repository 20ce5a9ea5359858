//! Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one more layer that guesses the token after
//! next, from the final hidden state of a token and the embedding of the next one.
//!
//! ```text
//! x = eh_proj([enorm(embed(next)), hnorm(hidden)])
//! logits = head(shared_head.norm(layer(x)))
//! ```
//!
//! Embedding and head are the model's own; the copies that checkpoints carry are left unread. The layer has a cache
//! layer of its own behind the others, in the same blocks and positions. Trained positions are one further, which
//! a rotary embedding cannot tell. What it gives are guesses, so its cache may have flaws that a model's must not: the
//! entry of a chunk's last token is made without knowing the next one, and that of a cached block's last token with
//! whatever followed when the block was computed.

use baton_device::{Backend, Result as DeviceResult};

use super::Specs;
use super::decoder::{Layer, Normed};
use crate::LoadError;
use crate::checkpoint::Role;
use crate::config::ModelConfig;
use crate::loader::Loader;

pub(super) struct Mtp<B: Backend, L> {
    /// `[hidden]`.
    embedding_norm: B::Vector,
    /// `[hidden]`.
    hidden_norm: B::Vector,
    /// `eh_proj`, for the embedding and for the hidden state, `[hidden, hidden]` each.
    projections: [B::Linear; 2],
    pub(super) layer: Normed<B, L>,
    /// `[hidden]`.
    pub(super) norm: B::Vector,
}

fn prefix(config: &ModelConfig) -> String {
    format!("model.layers.{}", config.num_layers)
}

/// The module of the projection that every such layer has.
pub(super) fn projection(config: &ModelConfig) -> String {
    format!("{}.eh_proj", prefix(config))
}

/// The tensors beside those of the layer itself.
pub(super) fn specs(config: &ModelConfig, specs: &mut Specs) {
    if config.mtp_layers == 0 {
        return;
    }
    let hidden = config.hidden_size;
    for norm in ["enorm", "hnorm", "shared_head.norm"] {
        specs.norm(format!("{}.{norm}", prefix(config)), hidden);
    }
    specs.matrix(projection(config), hidden, 2 * hidden, Role::Float);
}

impl<B: Backend, L: Layer<B>> Mtp<B, L> {
    /// Loads what is beside `layer`.
    pub(super) fn build(
        config: &ModelConfig,
        loader: &mut Loader<'_, B>,
        layer: Normed<B, L>,
    ) -> Result<Self, LoadError> {
        let mut norm = |name: &str| loader.norm(&format!("{}.{name}", prefix(config)), config.norm_offset);
        Ok(Self {
            embedding_norm: norm("enorm")?,
            hidden_norm: norm("hnorm")?,
            norm: norm("shared_head.norm")?,
            projections: loader.split_columns(&projection(config))?,
            layer,
        })
    }

    /// The layer's input, from `hidden` and from the embeddings in `x`, where it is left. What is in `hidden` and
    /// `scratch` is lost.
    pub(super) fn input(
        &self,
        backend: &B,
        eps: f32,
        x: &mut B::Tensor,
        hidden: &mut B::Tensor,
        scratch: &mut B::Tensor,
    ) -> DeviceResult<()> {
        let [of_embedding, of_hidden] = &self.projections;
        backend.rms_norm(x, &self.embedding_norm, eps, scratch)?;
        backend.linear(scratch, of_embedding, x)?;
        backend.rms_norm(hidden, &self.hidden_norm, eps, scratch)?;
        backend.linear(scratch, of_hidden, hidden)?;
        backend.add(x, hidden)
    }
}
