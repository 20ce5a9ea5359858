//! `config.json`: which encoder it is, and how large.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::LoadError;

pub(crate) const FILE: &str = "config.json";

/// What an encoder computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// An embedding of each text.
    Embed,
    /// The score of each pair of texts.
    Score,
}

/// Encoders that share their tensors and formulas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Two types of tokens, positions from 0.
    Bert,
    /// One type of tokens, positions from the padding token's on.
    Roberta,
}

/// A class of transformers that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Architecture {
    /// As in `architectures`.
    pub name: &'static str,
    /// As in `model_type`.
    pub model_type: &'static str,
    /// Its formulas.
    pub family: Family,
    /// What it computes.
    pub task: Task,
}

const fn architecture(name: &'static str, model_type: &'static str, family: Family, task: Task) -> Architecture {
    Architecture { name, model_type, family, task }
}

impl Architecture {
    /// All that are served. A head that predicts masked tokens is left aside.
    pub const ALL: [Self; 9] = [
        architecture("BertModel", "bert", Family::Bert, Task::Embed),
        architecture("BertForMaskedLM", "bert", Family::Bert, Task::Embed),
        architecture("BertForSequenceClassification", "bert", Family::Bert, Task::Score),
        architecture("RobertaModel", "roberta", Family::Roberta, Task::Embed),
        architecture("RobertaForMaskedLM", "roberta", Family::Roberta, Task::Embed),
        architecture("RobertaForSequenceClassification", "roberta", Family::Roberta, Task::Score),
        architecture("XLMRobertaModel", "xlm-roberta", Family::Roberta, Task::Embed),
        architecture("XLMRobertaForMaskedLM", "xlm-roberta", Family::Roberta, Task::Embed),
        architecture("XLMRobertaForSequenceClassification", "xlm-roberta", Family::Roberta, Task::Score),
    ];

    /// The encoder that a `config.json` describes; `None` if it describes something else, or is none.
    pub fn of(config: &[u8]) -> Option<Self> {
        let config: Map<String, Value> = serde_json::from_slice(config).ok()?;
        let model_type = config.get("model_type").and_then(Value::as_str);
        match config.get("architectures").and_then(Value::as_array) {
            Some(names) => Self::ALL.into_iter().find(|a| names.len() == 1 && names[0] == a.name),
            // The first of a type is the model without a head.
            None => Self::ALL.into_iter().find(|a| model_type == Some(a.model_type)),
        }
    }
}

/// What happens to the score that a head computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScoreActivation {
    Identity,
    Sigmoid,
}

/// Activation of the feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HiddenActivation {
    Gelu,
    GeluTanh,
    Relu,
}

/// A config within every range.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub intermediate_size: usize,
    pub activation: HiddenActivation,
    /// Rows of the table of positions.
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub layer_norm_eps: f64,
    pub pad_token_id: u32,
    pub score_activation: ScoreActivation,
}

// Far above any published model; their products stay far below 2^63.
const WIDTH: RangeInclusive<u64> = 1..=1 << 16;
const LAYERS: RangeInclusive<u64> = 1..=256;
const HEADS: RangeInclusive<u64> = 1..=256;
const VOCAB: RangeInclusive<u64> = 1..=1 << 22;
const POSITIONS: RangeInclusive<u64> = 1..=1 << 20;

impl Config {
    /// Reads the file.
    pub fn parse(json: &[u8]) -> Result<Self, LoadError> {
        let map: Map<String, Value> =
            serde_json::from_slice(json).map_err(|e| LoadError::config(FILE, format!("it is no JSON object: {e}")))?;
        let architecture = Architecture::of(json).ok_or_else(|| {
            let names: Vec<_> = Architecture::ALL.iter().map(|a| a.name).collect();
            LoadError::config(FILE, format!("architectures must be one of {}", names.join(", ")))
        })?;
        let mut fields = Fields { map: &map, reasons: Vec::new() };
        let pad = match architecture.family {
            Family::Bert => 0,
            Family::Roberta => 1,
        };
        let config = Self {
            architecture,
            vocab_size: fields.size("vocab_size", None, VOCAB),
            hidden_size: fields.size("hidden_size", None, WIDTH),
            num_layers: fields.size("num_hidden_layers", None, LAYERS),
            num_heads: fields.size("num_attention_heads", None, HEADS),
            intermediate_size: fields.size("intermediate_size", None, WIDTH),
            activation: fields.activation(),
            max_position_embeddings: fields.size("max_position_embeddings", None, POSITIONS),
            type_vocab_size: fields.size("type_vocab_size", Some(2), 1..=16),
            layer_norm_eps: fields.epsilon(),
            pad_token_id: fields.size("pad_token_id", Some(pad), 0..=(1 << 22) - 1) as u32,
            score_activation: fields.score_activation(),
        };
        fields.only("position_embedding_type", &["absolute".into()]);
        fields.only("is_decoder", &[false.into()]);
        fields.only("add_cross_attention", &[false.into()]);
        fields.only("quantization_config", &[]);
        if architecture.task == Task::Score {
            fields.one_label();
        }
        if !config.hidden_size.is_multiple_of(config.num_heads) {
            fields.reasons.push("hidden_size must be a multiple of num_attention_heads".into());
        }
        if config.pad_token_id as usize >= config.vocab_size {
            fields.reasons.push("pad_token_id must be below vocab_size".into());
        }
        if config.positions() == 0 {
            fields.reasons.push("max_position_embeddings leaves no room for a text".into());
        }
        match fields.reasons.is_empty() {
            true => Ok(config),
            false => Err(LoadError::Config { file: FILE.into(), reasons: fields.reasons }),
        }
    }

    /// Tokens of the longest text that has a position for each.
    pub fn positions(&self) -> usize {
        match self.architecture.family {
            Family::Bert => self.max_position_embeddings,
            Family::Roberta => self.max_position_embeddings.saturating_sub(self.pad_token_id as usize + 1),
        }
    }
}

struct Fields<'a> {
    map: &'a Map<String, Value>,
    reasons: Vec<String>,
}

impl Fields<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// A whole number; if it is refused, one that does no harm until all reasons are known.
    fn size(&mut self, name: &str, default: Option<u64>, range: RangeInclusive<u64>) -> usize {
        let value = match self.get(name) {
            None => default,
            Some(value) => value.as_u64(),
        };
        let value = value.filter(|value| range.contains(value)).unwrap_or_else(|| {
            self.reasons.push(format!("{name} must be a whole number from {} to {}", range.start(), range.end()));
            1
        });
        value as usize
    }

    fn epsilon(&mut self) -> f64 {
        let value = self.get("layer_norm_eps").map_or(Some(1e-12), Value::as_f64);
        value.filter(|value| (0.0..=1.0).contains(value)).unwrap_or_else(|| {
            self.reasons.push("layer_norm_eps must be a number from 0 to 1".into());
            0.0
        })
    }

    fn activation(&mut self) -> HiddenActivation {
        match self.get("hidden_act").map_or(Some("gelu"), Value::as_str) {
            Some("gelu") => HiddenActivation::Gelu,
            Some("gelu_new" | "gelu_pytorch_tanh") => HiddenActivation::GeluTanh,
            Some("relu") => HiddenActivation::Relu,
            _ => {
                let known = "gelu, gelu_new, gelu_pytorch_tanh or relu";
                self.reasons.push(format!("hidden_act must be {known}"));
                HiddenActivation::Gelu
            }
        }
    }

    /// Refuses a field with another value than these, if it is there.
    fn only(&mut self, name: &str, accepted: &[Value]) {
        if self.get(name).is_some_and(|value| !accepted.contains(value)) {
            self.reasons.push(match accepted {
                [] => format!("{name} is not supported"),
                _ => format!("{name} must be {}", accepted[0]),
            });
        }
    }

    /// The head must compute one number: transformers writes the names of its labels, or how many there are.
    fn one_label(&mut self) {
        let labels = match (self.get("id2label"), self.get("num_labels")) {
            (Some(Value::Object(names)), _) => Some(names.len() as u64),
            (_, Some(count)) => count.as_u64(),
            // The default of transformers.
            (None, None) => Some(2),
            _ => None,
        };
        if labels != Some(1) {
            self.reasons
                .push("a model that scores pairs has one label (num_labels); this one sorts into classes".into());
        }
    }

    /// As sentence-transformers reads it: its newer field, its older one, else the sigmoid.
    fn score_activation(&mut self) -> ScoreActivation {
        let newer = self.get("sentence_transformers").and_then(|settings| settings.get("activation_fn"));
        let Some(name) = newer.or_else(|| self.get("sbert_ce_default_activation_function")) else {
            return ScoreActivation::Sigmoid;
        };
        match name.as_str().and_then(|path| path.rsplit('.').next()) {
            Some("Identity") => ScoreActivation::Identity,
            Some("Sigmoid") => ScoreActivation::Sigmoid,
            _ => {
                self.reasons.push("the activation of scores must be Identity or Sigmoid".into());
                ScoreActivation::Sigmoid
            }
        }
    }
}
