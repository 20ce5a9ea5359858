//! `--speculative-config`: JSON, with the keys and method names of vLLM.

use anyhow::{Context, Result, ensure};
use baton_engine::{DraftMethod, SpeculationConfig};
use serde::{Deserialize, Serialize};

/// Drafts of a sequence in a step, at most, that can be asked for.
const MOST: usize = 16;
/// Rows of a step up to which drafts are added, unless said otherwise: on the CPUs measured, 16 rows take twice as long
/// as 8.
const DEFAULT_BATCH: usize = 8;
/// Tokens of prompt lookup, unless said otherwise.
const DEFAULT_LOOKUP: (usize, usize) = (2, 4);

/// A checked configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpeculativeConfig(Object);

/// As vLLM writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Object {
    method: Method,
    num_speculative_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_lookup_max: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_lookup_min: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disable_by_batch_size: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Method {
    Ngram,
    #[serde(alias = "deepseek_mtp")]
    Mtp,
}

impl SpeculativeConfig {
    /// Drafts of a sequence in a step, at most.
    pub fn max_draft_tokens(&self) -> usize {
        self.0.num_speculative_tokens
    }

    /// Whether the model's own module makes the drafts.
    pub fn uses_mtp(&self) -> bool {
        self.0.method == Method::Mtp
    }

    /// For the engine.
    pub fn speculation(&self) -> SpeculationConfig {
        let (min, max) = self.0.lookup();
        SpeculationConfig {
            method: match self.0.method {
                Method::Ngram => DraftMethod::Ngram { min, max },
                Method::Mtp => DraftMethod::Model,
            },
            num_speculative_tokens: self.0.num_speculative_tokens,
            disable_by_batch_size: self.0.disable_by_batch_size.unwrap_or(DEFAULT_BATCH),
        }
    }
}

impl Object {
    /// Least and most tokens of prompt lookup; one that is given bounds the default of the other.
    fn lookup(&self) -> (usize, usize) {
        let (min, max) = DEFAULT_LOOKUP;
        let (given_min, given_max) = (self.prompt_lookup_min, self.prompt_lookup_max);
        (given_min.unwrap_or(min.min(given_max.unwrap_or(max))), given_max.unwrap_or(max.max(given_min.unwrap_or(min))))
    }
}

impl std::str::FromStr for SpeculativeConfig {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let object: Object = serde_json::from_str(text)
            .context("an object is taken, with method (ngram, mtp), num_speculative_tokens and, if wanted, prompt_lookup_max, prompt_lookup_min (ngram), disable_by_batch_size")?;
        ensure!((1..=MOST).contains(&object.num_speculative_tokens), "num_speculative_tokens must be from 1 to {MOST}");
        ensure!(
            object.method == Method::Ngram || object.num_speculative_tokens == 1,
            "num_speculative_tokens must be 1 with mtp, which looks one token ahead"
        );
        let (min, max) = object.lookup();
        ensure!(1 <= min && min <= max, "prompt_lookup_min ({min}) must be from 1 to prompt_lookup_max ({max})");
        let has_lookup = object.prompt_lookup_min.or(object.prompt_lookup_max).is_some();
        ensure!(object.method == Method::Ngram || !has_lookup, "prompt_lookup_max and prompt_lookup_min are for ngram");
        Ok(Self(object))
    }
}

impl TryFrom<String> for SpeculativeConfig {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse().map_err(|error: anyhow::Error| format!("{error:#}"))
    }
}

impl From<SpeculativeConfig> for String {
    fn from(SpeculativeConfig(object): SpeculativeConfig) -> Self {
        serde_json::to_string(&object).expect("strings and numbers serialize")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<SpeculationConfig> {
        Ok(text.parse::<SpeculativeConfig>()?.speculation())
    }

    #[test]
    fn it_is_read_as_vllm_writes_it() {
        let text =
            r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 5, "prompt_lookup_min": 3}"#;
        let expected = SpeculationConfig {
            method: DraftMethod::Ngram { min: 3, max: 5 },
            num_speculative_tokens: 4,
            disable_by_batch_size: DEFAULT_BATCH,
        };
        assert_eq!(parse(text).unwrap(), expected);
        let mtp =
            parse(r#"{"method": "deepseek_mtp", "num_speculative_tokens": 1, "disable_by_batch_size": 8}"#).unwrap();
        assert_eq!((mtp.method, mtp.num_speculative_tokens, mtp.disable_by_batch_size), (DraftMethod::Model, 1, 8));
        let config: SpeculativeConfig = text.parse().unwrap();
        assert_eq!(String::from(config.clone()).parse::<SpeculativeConfig>().unwrap(), config);
    }

    #[test]
    fn what_is_not_known_or_absurd_is_refused_by_name() {
        for (text, named) in [
            (r#"{"method": "eagle", "num_speculative_tokens": 4}"#, "eagle"),
            (r#"{"method": "ngram", "num_speculative_tokens": 4, "model": "x"}"#, "model"),
            (r#"{"method": "ngram"}"#, "num_speculative_tokens"),
            (r#"{"method": "ngram", "num_speculative_tokens": 0}"#, "num_speculative_tokens"),
            (r#"{"method": "ngram", "num_speculative_tokens": 17}"#, "16"),
            (r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 0}"#, "prompt_lookup_max"),
            (r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 0}"#, "prompt_lookup_min"),
            (r#"{"method": "mtp", "num_speculative_tokens": 2}"#, "must be 1 with mtp"),
            (r#"{"method": "mtp", "num_speculative_tokens": 1, "prompt_lookup_max": 3}"#, "for ngram"),
        ] {
            let refusal = format!("{:#}", parse(text).unwrap_err());
            assert!(refusal.contains(named), "{refusal}");
        }
    }
}
