//! `tokenizer_config.json` and `special_tokens_map.json`: named special tokens, BOS and EOS rules, the template's text.

use serde_json::{Map, Value};

use crate::convert::added_token;
use crate::vocab::MAX_TOKEN_ID;
use crate::{TextError, TextFiles};

/// What the two files say, the first before the second.
pub(crate) struct TextConfig {
    /// Named special tokens: `bos_token`, `eos_token`, ….
    pub(crate) special: Vec<(String, String)>,
    /// `tokenizer_class` of transformers, empty if not stated.
    pub(crate) class: String,
    /// Whether text after a special token also gets SentencePiece's dummy prefix.
    pub(crate) legacy: Option<bool>,
    /// Whether there is a dummy prefix at all.
    pub(crate) add_prefix_space: Option<bool>,
    added_tokens_decoder: Option<Value>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    /// Source of the default chat template.
    pub(crate) template: Option<String>,
    /// Source of the template for requests with tools, where the checkpoint has one of its own.
    pub(crate) tool_template: Option<String>,
}

/// The special tokens that templates know by name.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Tokenizer classes of transformers that write BOS and EOS by `add_bos_token` and `add_eos_token`, whatever
/// tokenizer.json says. Others, `PreTrainedTokenizerFast` among them, ignore the two settings.
const CLASSES_WITH_BOS: [&str; 6] = [
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
];

impl TextConfig {
    pub(crate) fn new(files: &TextFiles) -> Result<Self, TextError> {
        let config = object("tokenizer_config.json", files.tokenizer_config)?;
        let map = object("special_tokens_map.json", files.special_tokens_map)?;
        let special = NAMES
            .iter()
            .filter_map(|&name| {
                let token = token_text(config.get(name)).or_else(|| token_text(map.get(name)))?;
                Some((name.to_owned(), token.to_owned()))
            })
            .collect();
        let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default().to_owned();
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        let (mut template, mut tool_template) = templates(config.get("chat_template"))?;
        if let Some(file) = files.chat_template_jinja {
            let text = std::str::from_utf8(file)
                .map_err(|_| TextError::File { file: "chat_template.jinja", reason: "not UTF-8".into() })?;
            (template, tool_template) = (Some(text.to_owned()), None);
        }
        Ok(Self {
            special,
            class,
            legacy: flag("legacy"),
            add_prefix_space: flag("add_prefix_space"),
            added_tokens_decoder: config.get("added_tokens_decoder").cloned(),
            add_bos_token: flag("add_bos_token"),
            add_eos_token: flag("add_eos_token"),
            template,
            tool_template,
        })
    }

    /// Names tokens that have no name yet.
    pub(crate) fn name_tokens(&mut self, named: Vec<(&'static str, String)>) {
        for (name, token) in named {
            if self.token(name).is_none() {
                self.special.push((name.to_owned(), token));
            }
        }
    }

    /// Whether to write BOS before a text and EOS after it; `None` where that is tokenizer.json's to say. `converted`:
    /// there is none, and this is what is usual for BOS.
    pub(crate) fn add_bos_eos(&self, converted: Option<bool>) -> Option<(bool, bool)> {
        let usual = converted.or(CLASSES_WITH_BOS.contains(&self.class.as_str()).then_some(true))?;
        Some((self.add_bos_token.unwrap_or(usual), self.add_eos_token.unwrap_or(false)))
    }

    /// `added_tokens_decoder`: each as an entry of tokenizer.json's `added_tokens`, by id. For a vocabulary that is
    /// converted; tokenizer.json has its own.
    pub(crate) fn added(&self) -> Result<Vec<(u32, Value)>, TextError> {
        let entries = match &self.added_tokens_decoder {
            None | Some(Value::Null) => Some(Vec::new()),
            Some(Value::Object(tokens)) => tokens.iter().map(|(id, token)| added_entry(id, token)).collect(),
            Some(_) => None,
        };
        let mut entries = entries.ok_or_else(|| TextError::File {
            file: "tokenizer_config.json",
            reason: format!(
                "added_tokens_decoder is not an object of tokens with content, by ids up to {MAX_TOKEN_ID}"
            ),
        })?;
        entries.sort_by_key(|(id, _)| *id);
        Ok(entries)
    }

    /// Text of a named special token.
    pub(crate) fn token(&self, name: &str) -> Option<&str> {
        self.special.iter().find(|(n, _)| n == name).map(|(_, token)| token.as_str())
    }
}

fn object(file: &'static str, bytes: Option<&[u8]>) -> Result<Map<String, Value>, TextError> {
    let Some(bytes) = bytes else { return Ok(Map::new()) };
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(TextError::File { file, reason: "not a JSON object".into() }),
        Err(error) => Err(TextError::File { file, reason: error.to_string() }),
    }
}

fn added_entry(id: &str, token: &Value) -> Option<(u32, Value)> {
    let id = id.parse().ok().filter(|id| *id <= MAX_TOKEN_ID)?;
    let mut entry = added_token(id, token_text(Some(token)).filter(|content| !content.is_empty())?, false);
    for flag in ["special", "single_word", "lstrip", "rstrip", "normalized"] {
        if let Some(value) = token.get(flag).and_then(Value::as_bool) {
            entry[flag] = value.into();
        }
    }
    Some((id, entry))
}

/// A token written as a string or as an object with `content`.
fn token_text(value: Option<&Value>) -> Option<&str> {
    match value? {
        Value::String(text) => Some(text),
        Value::Object(token) => token.get("content")?.as_str(),
        _ => None,
    }
}

/// The default template and the one for tools, from a string or a list of `{name, template}`.
fn templates(value: Option<&Value>) -> Result<(Option<String>, Option<String>), TextError> {
    let wrong = || TextError::File {
        file: "tokenizer_config.json",
        reason: "chat_template is neither a string nor a list of {name, template}".into(),
    };
    match value {
        None | Some(Value::Null) => Ok((None, None)),
        Some(Value::String(text)) => Ok((Some(text.clone()), None)),
        Some(Value::Array(list)) => {
            let (mut default, mut tool_use) = (None, None);
            for item in list {
                let name = item["name"].as_str().ok_or_else(wrong)?;
                let text = item["template"].as_str().ok_or_else(wrong)?.to_owned();
                match name {
                    "default" => default = Some(text),
                    "tool_use" => tool_use = Some(text),
                    _ => {}
                }
            }
            Ok((default, tool_use))
        }
        Some(_) => Err(wrong()),
    }
}
