//! `handoff.json` as values. The format is described in `models/HANDOFF.md`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Digest, PrecisionClass};

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always `baton-handoff`.
    pub format: String,
    /// Of the format: 1.
    pub version: u32,
    /// What was trained.
    pub model: ModelFacts,
    /// SHA-256 over the lines `<sha256>  <name>\n` of all files in byte order of their names.
    pub generation: Digest,
    /// Every file of the bundle but the manifest and its signature, by name.
    pub files: BTreeMap<String, FileEntry>,
    /// Every tensor by name, if the trainer digested them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tensors: BTreeMap<String, TensorEntry>,
    /// How the weights were made.
    pub trained: Trained,
    /// How the golden values were computed.
    pub computed: Computed,
    /// Features that a device must have.
    #[serde(default)]
    pub requires: Vec<String>,
    /// How far a device may be from the golden values, by class of its precision.
    #[serde(default)]
    pub tolerances: BTreeMap<PrecisionClass, Tolerances>,
    /// The golden cases.
    pub cases: Vec<Case>,
}

/// What was trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFacts {
    /// As the trainer calls it.
    pub name: String,
    /// Its licence, passed through.
    #[serde(default)]
    pub license: Option<String>,
    /// Where it is from, passed through.
    #[serde(default)]
    pub lineage: Map<String, Value>,
}

/// A file of the bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its length.
    pub bytes: u64,
    /// Of its content.
    pub sha256: Digest,
}

/// A tensor of the checkpoint, as its safetensors header describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Element type as stored.
    pub dtype: String,
    /// Shape as stored.
    pub shape: Vec<u64>,
    /// Of its bytes as stored.
    pub sha256: Digest,
}

/// How the weights were made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trained {
    /// `float32`, `bfloat16` or `float16`.
    pub dtype: String,
    /// The format of quantised weights; `None` if they are not.
    #[serde(default)]
    pub quantization: Option<String>,
    /// Passed through.
    #[serde(default)]
    pub framework: Option<String>,
    /// Of the training code, passed through.
    #[serde(default)]
    pub commit: Option<String>,
}

/// How the golden values were computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Computed {
    /// Of the arithmetic: `float32`, `bfloat16` or `float16`.
    pub dtype: String,
    /// Passed through.
    #[serde(default)]
    pub framework: Option<String>,
    /// Passed through.
    #[serde(default)]
    pub device: Option<String>,
}

/// How far a device may be from the golden values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tolerances {
    /// Largest difference of a log-probability, in nats.
    pub max_abs_logprob_diff: f64,
    /// Mean difference of log-probabilities, in nats.
    pub mean_abs_logprob_diff: f64,
    /// Mean Kullback-Leibler divergence of the device's distribution from the trainer's, in nats.
    pub kl: f64,
    /// Part of the positions with room for it at which the best token must be the trainer's, 0 to 1.
    pub top1_agreement: f64,
    /// Largest ratio of the device's perplexity on the golden text to the trainer's.
    pub perplexity_ratio: f64,
}

/// A golden case. Its ids are those of the prompt, and the trainer's greedy continuation behind them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// Distinct from all others.
    pub name: String,
    /// What was rendered to the prompt, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<Chat>,
    /// The prompt's text, unless there are only ids. That of a chat is encoded without further special tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Token ids, at least one.
    pub prompt_ids: Vec<u32>,
    /// What the trainer's model answers greedily.
    #[serde(default)]
    pub greedy_ids: Vec<u32>,
    /// For each greedy id, by how much its log-probability exceeds that of the second-best token, in nats.
    #[serde(default)]
    pub margins: Vec<f64>,
    /// Log-probability of each id but the first, given those before it.
    #[serde(default)]
    pub logprobs: Vec<f64>,
    /// By position, that of the last id seen: the most likely next ids with their log-probabilities, best first.
    #[serde(default)]
    pub top: BTreeMap<u32, Vec<(u32, f64)>>,
}

impl Case {
    /// Prompt and continuation.
    pub fn ids(&self) -> impl Iterator<Item = u32> + Clone + '_ {
        self.prompt_ids.iter().chain(&self.greedy_ids).copied()
    }
}

/// A conversation before it is rendered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chat {
    /// As the chat API takes them.
    pub messages: Vec<Value>,
    /// As the chat API takes them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Value>,
    /// Further variables of the template.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub template_kwargs: Map<String, Value>,
    /// Whether the prompt ends where the model is to answer.
    #[serde(default = "yes")]
    pub add_generation_prompt: bool,
}

fn yes() -> bool {
    true
}
