//! `handoff.json` as values. The format is described in `models/HANDOFF.md`.
//!
//! Invariant: a [`Manifest`] that was parsed fulfils every rule of the format; what it says of files is still only a claim.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::strict::{self, shown};
use crate::{Digest, Feature, MANIFEST, PrecisionClass, rules};

/// What `format` says.
pub const FORMAT: &str = "baton-handoff";
/// The version that is read.
pub const VERSION: u32 = 1;
/// Longest manifest that is read, in bytes.
pub const MAX_MANIFEST: u64 = 64 << 20;

/// Why a manifest is refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// More than is ever needed.
    #[error("{name} has {bytes} bytes; at most {limit} are read")]
    TooLarge {
        /// The manifest or its signature.
        name: String,
        /// Its length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Not JSON, or not of the types of the format: a field too many, too few, or twice.
    #[error("{MANIFEST} cannot be read: {reason}")]
    Json {
        /// What is wrong, and where.
        reason: String,
    },
    /// Another format.
    #[error("{MANIFEST} has the format \"{found}\"; only {FORMAT:?} is read")]
    Format {
        /// What it calls itself.
        found: String,
    },
    /// Another version of the format.
    #[error("{MANIFEST} has version {found} of its format; only version {VERSION} is read")]
    Version {
        /// The version.
        found: u64,
    },
    /// Rules of the format are broken.
    #[error("{MANIFEST} is refused: {}{}", problems.join("; "), and_more(*more))]
    Invalid {
        /// What is wrong, rule by rule.
        problems: Vec<String>,
        /// How many further ones there are.
        more: usize,
    },
}

fn and_more(more: usize) -> String {
    if more == 0 { String::new() } else { format!("; and {more} more") }
}

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
    #[serde(deserialize_with = "strict::distinct")]
    pub files: BTreeMap<String, FileEntry>,
    /// Every tensor by name, if the trainer digested them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "strict::distinct")]
    pub tensors: BTreeMap<String, TensorEntry>,
    /// How the weights were made.
    pub trained: Trained,
    /// How the golden values were computed.
    pub computed: Computed,
    /// Features that a device must have.
    #[serde(default)]
    pub requires: Vec<Feature>,
    /// How far a device may be from the golden values, by class of its precision.
    #[serde(default, deserialize_with = "strict::distinct")]
    pub tolerances: BTreeMap<PrecisionClass, Tolerances>,
    /// The golden cases.
    pub cases: Vec<Case>,
}

impl Manifest {
    /// Reads a whole `handoff.json`.
    ///
    /// # Errors
    /// The version first, then what is no JSON of the format, then every rule that is broken.
    pub fn parse(json: &[u8]) -> Result<Self, ManifestError> {
        let refused = |reason: &dyn ToString| ManifestError::Json { reason: shown(&reason.to_string()) };
        let bytes = json.len() as u64;
        if bytes > MAX_MANIFEST {
            return Err(ManifestError::TooLarge { name: MANIFEST.into(), bytes, limit: MAX_MANIFEST });
        }
        strict::bound_values(json).map_err(|e| refused(&e))?;
        let head: Head = serde_json::from_slice(json).map_err(|e| refused(&e))?;
        if head.format != FORMAT {
            return Err(ManifestError::Format { found: shown(&head.format) });
        }
        if head.version != u64::from(VERSION) {
            return Err(ManifestError::Version { found: head.version });
        }
        let manifest = serde_json::from_slice(json).map_err(|e| refused(&e))?;
        rules::check(&manifest)?;
        Ok(manifest)
    }

    /// The generation that files give: SHA-256 of what `sha256sum` prints for them in byte order of their names.
    pub fn generation_of(files: &BTreeMap<String, FileEntry>) -> Digest {
        let mut hasher = Sha256::new();
        for (name, file) in files {
            hasher.update(format!("{}  {name}\n", file.sha256));
        }
        Digest(hasher.finalize().into())
    }

    /// Length of all files together.
    pub fn total_bytes(&self) -> u64 {
        self.files.values().fold(0, |sum, file| sum.saturating_add(file.bytes))
    }
}

/// What every version has.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u64,
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
    #[serde(default, deserialize_with = "strict::object")]
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
    /// Difference that 99 of 100 log-probabilities keep to, of tokens to which the trainer gives 1 % or more, in nats.
    pub p99_abs_logprob_diff: f64,
    /// Mean Kullback-Leibler divergence of the device's distribution from the trainer's, in nats.
    pub kl: f64,
    /// Part of the positions with room for it at which the best token must be the trainer's, 0 to 1.
    pub top1_agreement: f64,
    /// Largest ratio of the device's perplexity on the golden text to the trainer's, or of the trainer's to the device's.
    pub perplexity_ratio: f64,
}

impl Tolerances {
    /// All of them with their names.
    pub(crate) fn values(&self) -> [(&'static str, f64); 6] {
        [
            ("max_abs_logprob_diff", self.max_abs_logprob_diff),
            ("mean_abs_logprob_diff", self.mean_abs_logprob_diff),
            ("p99_abs_logprob_diff", self.p99_abs_logprob_diff),
            ("kl", self.kl),
            ("top1_agreement", self.top1_agreement),
            ("perplexity_ratio", self.perplexity_ratio),
        ]
    }
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
    #[serde(default, deserialize_with = "strict::distinct")]
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
    #[serde(deserialize_with = "strict::array")]
    pub messages: Vec<Value>,
    /// As the chat API takes them.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "strict::array")]
    pub tools: Vec<Value>,
    /// Further variables of the template.
    #[serde(default, skip_serializing_if = "Map::is_empty", deserialize_with = "strict::object")]
    pub template_kwargs: Map<String, Value>,
    /// Whether the prompt ends where the model is to answer.
    #[serde(default = "yes")]
    pub add_generation_prompt: bool,
}

fn yes() -> bool {
    true
}
