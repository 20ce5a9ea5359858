//! What a GGUF file says of its tokenizer, as plain values: the text crate makes a tokenizer of them.

use super::{open_whole, parse, refuse};
use crate::LoadError;
use crate::checkpoint::Files;
use crate::checkpoint::gguf::Value;
use crate::config::ConfigError;

/// What a GGUF file says of its tokenizer, as plain values; `None` or empty where it says nothing. Nothing but
/// the types is checked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufTokenizer {
    /// `tokenizer.ggml.model`: `gpt2`, `llama`, ….
    pub model: String,
    /// `tokenizer.ggml.pre`.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

impl GgufTokenizer {
    /// Reads a file's metadata; `None` if `files` are not GGUF.
    ///
    /// # Errors
    /// As for loading, and if a key has a value of another type than these.
    pub fn read(files: &Files) -> Result<Option<Self>, LoadError> {
        let Files::Gguf(path) = files else { return Ok(None) };
        let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
        let (_, bytes) = open_whole(files, &name)?;
        let metadata = parse(&name, &bytes)?.metadata;
        let get = |key: &'static str| Key { key, value: metadata.get(key) };
        Ok(Some(Self {
            model: get("tokenizer.ggml.model").text()?.unwrap_or_default(),
            pre: get("tokenizer.ggml.pre").text()?,
            tokens: get("tokenizer.ggml.tokens").list(text)?,
            scores: get("tokenizer.ggml.scores").list(|v| match v {
                Value::Float(v) => Some(v as f32),
                _ => None,
            })?,
            token_types: get("tokenizer.ggml.token_type").list(|v| i32::try_from(v.unsigned()?).ok())?,
            merges: get("tokenizer.ggml.merges").list(text)?,
            bos: get("tokenizer.ggml.bos_token_id").id()?,
            eos: get("tokenizer.ggml.eos_token_id").id()?,
            add_bos: get("tokenizer.ggml.add_bos_token").flag()?,
            add_eos: get("tokenizer.ggml.add_eos_token").flag()?,
            add_space_prefix: get("tokenizer.ggml.add_space_prefix").flag()?,
            chat_template: get("tokenizer.chat_template").text()?,
        }))
    }
}

/// A key of the metadata on its way to a plain value.
struct Key<'a> {
    key: &'static str,
    value: Option<&'a Value<'a>>,
}

impl<'a> Key<'a> {
    fn read<T>(self, what: &str, get: impl FnOnce(&Value<'a>) -> Option<T>) -> Result<Option<T>, ConfigError> {
        self.value.map(|v| get(v).ok_or_else(|| refuse(format!("{} is not {what}", self.key)))).transpose()
    }

    fn text(self) -> Result<Option<String>, ConfigError> {
        self.read("a string", |v| text(*v))
    }

    fn id(self) -> Result<Option<u32>, ConfigError> {
        self.read("a token id", |v| u32::try_from(v.unsigned()?).ok())
    }

    fn flag(self) -> Result<Option<bool>, ConfigError> {
        self.read("a flag", |v| match v {
            Value::Bool(v) => Some(*v),
            _ => None,
        })
    }

    fn list<T>(self, item: impl Fn(Value<'a>) -> Option<T>) -> Result<Vec<T>, ConfigError> {
        let list = self.read("a list of the right type", |v| match v {
            Value::Array(array) => array.iter().map(item).collect(),
            _ => None,
        })?;
        Ok(list.unwrap_or_default())
    }
}

fn text(value: Value<'_>) -> Option<String> {
    match value {
        Value::Text(text) => Some(text.to_owned()),
        _ => None,
    }
}
