//! The network: one of candle's, and the layers behind it that make a score.

use candle_core::{IndexOp, Result, Tensor};
use candle_nn::{Activation, Linear, Module, VarBuilder};
use candle_transformers::models::bert::{self, BertModel};
use candle_transformers::models::xlm_roberta::{self, XLMRobertaModel};

use crate::config::{Config, Family, HiddenActivation};
use crate::weights::{Weights, head};

pub(crate) struct Network {
    body: Body,
    head: Option<Head>,
}

enum Body {
    Bert(BertModel),
    Roberta(XLMRobertaModel),
}

/// `out · tanh(dense · x)` of the first token's vector.
struct Head {
    dense: Linear,
    out: Linear,
}

impl Network {
    /// Builds it from verified weights.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let builder = &weights.builder;
        let inside = if weights.prefix.is_empty() { builder.clone() } else { builder.pp(weights.prefix) };
        let body = match config.architecture.family {
            Family::Bert => Body::Bert(BertModel::load(inside, &bert_config(config))?),
            Family::Roberta => Body::Roberta(XLMRobertaModel::new(&roberta_config(config), inside)?),
        };
        let width = config.hidden_size;
        let layer = |name: &str, out: usize, builder: &VarBuilder| candle_nn::linear(width, out, builder.pp(name));
        let head = match head(config) {
            None => None,
            Some([dense, out]) => Some(Head { dense: layer(dense, width, builder)?, out: layer(out, 1, builder)? }),
        };
        Ok(Self { body, head })
    }

    /// Vectors of all tokens, `[texts, tokens, width]`. Arguments are `[texts, tokens]`; `mask` is 1 for a token and 0 for
    /// padding behind the last one.
    pub fn hidden(&self, ids: &Tensor, type_ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
        match &self.body {
            Body::Bert(model) => model.forward(ids, type_ids, Some(mask)),
            Body::Roberta(model) => model.forward(ids, mask, type_ids, None, None, None),
        }
    }

    /// A score per text, of what [`hidden`](Self::hidden) gave; `None` without a head.
    pub fn scores(&self, hidden: &Tensor) -> Result<Option<Vec<f32>>> {
        let Some(Head { dense, out }) = &self.head else { return Ok(None) };
        let first = hidden.i((.., 0, ..))?.contiguous()?;
        let scores = out.forward(&dense.forward(&first)?.tanh()?)?;
        Ok(Some(scores.flatten_all()?.to_vec1()?))
    }
}

fn bert_config(config: &Config) -> bert::Config {
    bert::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        num_hidden_layers: config.num_layers,
        num_attention_heads: config.num_heads,
        intermediate_size: config.intermediate_size,
        hidden_act: match config.activation {
            HiddenActivation::Gelu => bert::HiddenAct::Gelu,
            HiddenActivation::GeluTanh => bert::HiddenAct::GeluApproximate,
            HiddenActivation::Relu => bert::HiddenAct::Relu,
        },
        max_position_embeddings: config.max_position_embeddings,
        type_vocab_size: config.type_vocab_size,
        layer_norm_eps: config.layer_norm_eps,
        // Names of tensors are settled before.
        model_type: None,
        ..bert::Config::default()
    }
}

fn roberta_config(config: &Config) -> xlm_roberta::Config {
    xlm_roberta::Config {
        hidden_size: config.hidden_size,
        layer_norm_eps: config.layer_norm_eps,
        attention_probs_dropout_prob: 0.0,
        hidden_dropout_prob: 0.0,
        num_attention_heads: config.num_heads,
        position_embedding_type: "absolute".into(),
        intermediate_size: config.intermediate_size,
        hidden_act: match config.activation {
            HiddenActivation::Gelu => Activation::Gelu,
            HiddenActivation::GeluTanh => Activation::NewGelu,
            HiddenActivation::Relu => Activation::Relu,
        },
        num_hidden_layers: config.num_layers,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        type_vocab_size: config.type_vocab_size,
        pad_token_id: config.pad_token_id,
    }
}
