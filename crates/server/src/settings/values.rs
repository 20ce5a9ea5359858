//! Kinds of values that settings have, each with its words and what they stand for.

use std::{fmt, path::PathBuf};

use anyhow::{Context, Result, ensure};
use baton_device::{BlockFormat, DType, KvDtype};
use baton_encoder::Pooling;
use baton_http::{Origin, OriginError};
use baton_model::Quantization;
use baton_text::{TextModel, ToolSyntax};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A secret: shown nowhere.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(#[serde(serialize_with = "redact")] pub String);

fn redact<S: serde::Serializer>(_: &str, s: S) -> std::result::Result<S::Ok, S::Error> {
    s.serialize_str("[redacted]")
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl std::str::FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(Secret(s.to_owned()))
    }
}

/// Precision in which weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// As the checkpoint stores them.
    Auto,
    Float32,
    Bfloat16,
    Float16,
}

impl Dtype {
    /// The float type asked for, if one is.
    pub fn stored(self) -> Option<DType> {
        match self {
            Dtype::Auto => None,
            Dtype::Float32 => Some(DType::F32),
            Dtype::Bfloat16 => Some(DType::BF16),
            Dtype::Float16 => Some(DType::F16),
        }
    }
}

/// How the KV cache keeps its elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    /// float32, whatever the weights, where the device can: other dtypes change results, so they are asked for.
    Auto,
    Float32,
    Bfloat16,
    Float16,
    /// Signed bytes with one scale for each head of each position.
    Int8,
}

impl KvCacheDtype {
    /// The dtype that a cache is kept in; `None` for the widest that the device has.
    pub fn dtype(self) -> Option<KvDtype> {
        match self {
            KvCacheDtype::Auto => None,
            KvCacheDtype::Float32 => Some(KvDtype::F32),
            KvCacheDtype::Bfloat16 => Some(KvDtype::BF16),
            KvCacheDtype::Float16 => Some(KvDtype::F16),
            KvCacheDtype::Int8 => Some(KvDtype::Int8),
        }
    }
}

/// Weight formats made at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(non_camel_case_types)] // the formats' own names
pub enum Quantize {
    /// 8-bit integers in blocks of 32 with an f16 scale.
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 4-bit integers in blocks of 32 with an f16 scale.
    #[value(name = "q4_0")]
    #[serde(rename = "q4_0")]
    Q4_0,
    /// 4-bit integers in blocks of 256 with a scale and a minimum per 32; q8_0 where these do not divide the rows.
    #[value(name = "q4_k")]
    #[serde(rename = "q4_k")]
    Q4_K,
    /// 8-bit integers with one scale per output row; more is lost than with q8_0.
    Int8,
}

impl From<Quantize> for Quantization {
    fn from(quantize: Quantize) -> Self {
        match quantize {
            Quantize::Q8_0 => BlockFormat::Q8_0.into(),
            Quantize::Q4_0 => BlockFormat::Q4_0.into(),
            Quantize::Q4_K => BlockFormat::Q4_K.into(),
            Quantize::Int8 => Quantization::Int8,
        }
    }
}

/// Whether the checkpoint's generation_config.json supplies defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GenerationConfigUse {
    Auto,
    None,
}

/// How the model writes calls of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum ToolCallParser {
    /// As its chat template writes them.
    Auto,
    /// Not at all.
    None,
    DeepseekV3,
    DeepseekV31,
    Hermes,
    Llama3Json,
    Mistral,
}

impl ToolCallParser {
    /// The syntax that is asked for, if one is.
    pub(super) fn syntax(self) -> Option<ToolSyntax> {
        match self {
            ToolCallParser::Auto | ToolCallParser::None => None,
            ToolCallParser::DeepseekV3 => Some(ToolSyntax::DeepseekV3),
            ToolCallParser::DeepseekV31 => Some(ToolSyntax::DeepseekV31),
            ToolCallParser::Hermes => Some(ToolSyntax::Hermes),
            ToolCallParser::Llama3Json => Some(ToolSyntax::Llama3Json),
            ToolCallParser::Mistral => Some(ToolSyntax::Mistral),
        }
    }

    /// The text model with calls written so.
    pub fn applied(self, text: TextModel) -> Result<TextModel> {
        match self {
            ToolCallParser::Auto => Ok(text),
            parser => text.with_tool_syntax(parser.syntax()).context("--tool-call-parser"),
        }
    }
}

/// What becomes of a model whose hand-off is not proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HandoffPolicy {
    /// It is not served: damaged files end the start, and `/ready` waits until golden cases have passed.
    Require,
    /// It is served, and the log and metrics say so.
    Warn,
    /// Nobody looks.
    Off,
}

/// An origin whose pages may use the service; it is shown as it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct AllowedOrigin {
    text: String,
    #[serde(skip)]
    pub origin: Origin,
}

impl std::str::FromStr for AllowedOrigin {
    type Err = OriginError;

    fn from_str(text: &str) -> std::result::Result<Self, OriginError> {
        Ok(Self { text: text.to_owned(), origin: text.parse()? })
    }
}

/// Who finds a cached prompt beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrefixCacheScope {
    /// Who sends the key that it was computed for.
    Key,
    /// Everybody.
    Shared,
}

/// One vector of many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolingType {
    /// Their mean.
    Mean,
    /// The first token's.
    Cls,
    /// The largest value of each component.
    Max,
    /// The last token's.
    Last,
}

impl From<PoolingType> for Pooling {
    fn from(pooling: PoolingType) -> Self {
        match pooling {
            PoolingType::Mean => Pooling::Mean,
            PoolingType::Cls => Pooling::Cls,
            PoolingType::Max => Pooling::Max,
            PoolingType::Last => Pooling::Last,
        }
    }
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// An adapter to serve from the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LoraModule {
    pub name: String,
    pub path: PathBuf,
    /// The served model that it changes, if that is stated.
    pub base_model_name: Option<String>,
}

/// As vLLM writes it in JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LoraModuleObject {
    name: String,
    path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_model_name: Option<String>,
}

impl std::str::FromStr for LoraModule {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let LoraModuleObject { name, path, base_model_name } = if text.starts_with('{') {
            serde_json::from_str(text).context("an object with name and path is taken")?
        } else {
            let (name, path) = text.split_once('=').context("NAME=PATH is taken")?;
            LoraModuleObject { name: name.to_owned(), path: path.into(), base_model_name: None }
        };
        ensure!(!name.is_empty() && !path.as_os_str().is_empty(), "name and path must not be empty");
        Ok(Self { name, path, base_model_name })
    }
}

impl TryFrom<String> for LoraModule {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse().map_err(|error: anyhow::Error| format!("{error:#}"))
    }
}

impl From<LoraModule> for String {
    fn from(LoraModule { name, path, base_model_name }: LoraModule) -> Self {
        serde_json::to_string(&LoraModuleObject { name, path, base_model_name }).expect("strings serialize")
    }
}
