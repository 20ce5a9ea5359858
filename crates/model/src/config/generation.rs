//! `generation_config.json`: a checkpoint's own defaults for sampling.

use serde::Serialize;

use super::fields::Fields;
use super::{ConfigError, ModelConfig, json_object};

const FILE: &str = "generation_config.json";

/// Defaults that a checkpoint brings; `None` where it says nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct GenerationConfig {
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// `false` means greedy, whatever the temperature.
    pub do_sample: Option<bool>,
    /// At least 0.
    pub temperature: Option<f32>,
    /// 0 for all.
    pub top_k: Option<u32>,
    /// From 0 to 1.
    pub top_p: Option<f32>,
    /// From 0 to 1.
    pub min_p: Option<f32>,
    /// Above 0.
    pub repetition_penalty: Option<f32>,
    /// Longest answer.
    pub max_new_tokens: Option<usize>,
}

impl GenerationConfig {
    /// Reads the file's bytes; without a file, what the model's config says.
    pub fn parse(json: Option<&[u8]>, config: &ModelConfig) -> Result<Self, ConfigError> {
        let Some(json) = json else {
            return Ok(Self { eos_token_ids: config.eos_token_ids.clone(), ..Self::default() });
        };
        let map = json_object(FILE, json)?;
        let mut fields = Fields::new(&map, "");
        // transformers writes -1 or 0 for "all".
        let top_k = if fields.get("top_k").is_some_and(|v| v.as_i64() == Some(-1)) {
            Some(0)
        } else {
            fields.optional_size("top_k", 0..=u32::MAX as usize)
        };
        let mut number = |name, what, low: f64, high: f64| {
            fields.optional_number(name, what, |v| (low..=high).contains(&v)).map(|v| v as f32)
        };
        let generation = Self {
            temperature: number("temperature", "a number from 0 to 100", 0.0, 100.0),
            top_p: number("top_p", "a number from 0 to 1", 0.0, 1.0),
            min_p: number("min_p", "a number from 0 to 1", 0.0, 1.0),
            repetition_penalty: number("repetition_penalty", "a number from 0.01 to 100", 0.01, 100.0),
            eos_token_ids: fields.token_ids("eos_token_id").unwrap_or_else(|| config.eos_token_ids.clone()),
            do_sample: fields.get("do_sample").is_some().then(|| fields.flag("do_sample", false)),
            top_k: top_k.map(|k| k as u32),
            max_new_tokens: fields.optional_size("max_new_tokens", 1..=1 << 24),
        };
        if fields.reasons.is_empty() {
            Ok(generation)
        } else {
            Err(ConfigError { file: FILE, reasons: fields.reasons })
        }
    }
}
