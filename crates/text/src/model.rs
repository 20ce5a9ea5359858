//! [`TextModel`]: one checkpoint's tokenizer, chat template and reasoning markers.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use chrono::NaiveDateTime;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::config::TextConfig;
use crate::convert::Converted;
use crate::template::{ChatInput, ChatTemplate};
use crate::vocab::{MAX_TOKEN_ID, Vocab};
use crate::{Detokenizer, ReasoningMarkers, TextError, ToolSyntax, library, sentencepiece, tiktoken};

/// Raw files of a checkpoint that concern text.
#[derive(Debug, Clone, Copy)]
pub struct TextFiles<'a> {
    /// The vocabulary.
    pub tokenizer: TokenizerFile<'a>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<&'a [u8]>,
    /// `special_tokens_map.json`: consulted for what tokenizer_config.json does not name.
    pub special_tokens_map: Option<&'a [u8]>,
    /// `chat_template.jinja`: wins over the template in tokenizer_config.json.
    pub chat_template_jinja: Option<&'a [u8]>,
}

/// A file that has a vocabulary.
#[derive(Debug, Clone, Copy)]
pub enum TokenizerFile<'a> {
    /// `tokenizer.json`.
    Json(&'a [u8]),
    /// `tokenizer.model` of SentencePiece.
    SentencePiece(&'a [u8]),
    /// Ranks of tiktoken.
    Tiktoken {
        /// Name of the file, which tells how text is split.
        name: &'a str,
        /// Its content.
        ranks: &'a [u8],
    },
}

impl<'a> TokenizerFile<'a> {
    /// What [`TokenizerFile::choose`] looks for, for messages.
    pub const NAMES: &'static str = "tokenizer.json, tokenizer.model, tiktoken.model or a file *.tiktoken";

    /// Of a checkpoint's files the one that has the vocabulary: what needs no conversion first.
    pub fn choose(names: &[String]) -> Option<&str> {
        let named = |name: &str| names.iter().find(|n| *n == name);
        let known = ["tokenizer.json", "tokenizer.model", "tiktoken.model"].into_iter().find_map(named);
        known.or_else(|| names.iter().filter(|n| n.ends_with(".tiktoken")).min()).map(String::as_str)
    }

    /// The file of that name. Two libraries write a `tokenizer.model`; they differ in the first byte.
    pub fn new(name: &'a str, content: &'a [u8]) -> Self {
        match name {
            "tokenizer.json" => TokenizerFile::Json(content),
            "tokenizer.model" if content.first() == Some(&b'\n') => TokenizerFile::SentencePiece(content),
            _ => TokenizerFile::Tiktoken { name, ranks: content },
        }
    }
}

/// Text before and behind one checkpoint. Immutable: share it in an [`Arc`].
pub struct TextModel {
    pub(crate) tokenizer: Arc<Tokenizer>,
    vocab: Arc<Vocab>,
    /// Ids written before and after a text, where the tokenizer's class does that instead of tokenizer.json.
    pub(crate) around: Option<(Option<u32>, Option<u32>)>,
    eos: Option<u32>,
    template: Option<ChatTemplate>,
    tool_template: Option<ChatTemplate>,
    /// The words between quotes in the template.
    template_words: HashSet<String>,
    markers: Option<ReasoningMarkers>,
    syntax: Option<ToolSyntax>,
    /// Ids of its markers that are tokens.
    tool_tokens: Arc<[u32]>,
    controls: HashSet<u32>,
}

impl TextModel {
    /// Reads the files and compiles the template.
    ///
    /// # Errors
    /// A [`TextError`] that names the file, or the template's line, that cannot be read.
    pub fn new(files: &TextFiles) -> Result<Self, TextError> {
        let mut config = TextConfig::new(files)?;
        let (tokenizer, add_bos) = match files.tokenizer {
            TokenizerFile::Json(json) => (library::read("tokenizer.json", json)?, None),
            TokenizerFile::SentencePiece(file) => {
                let converted = sentencepiece::convert(file, &config, config.added()?);
                converted_tokenizer("tokenizer.model", converted, &mut config)?
            }
            TokenizerFile::Tiktoken { name, ranks } => {
                let converted = tiktoken::convert(name, ranks, &config.class, config.added()?);
                converted_tokenizer(name, converted, &mut config)?
            }
        };

        let named = |name: &str| config.token(name).and_then(|token| tokenizer.token_to_id(token));
        let eos = named("eos_token");
        let around = config
            .add_bos_eos(add_bos)
            .map(|(bos, eos_too)| (named("bos_token").filter(|_| bos), eos.filter(|_| eos_too)));

        let added = tokenizer.get_added_tokens_decoder();
        // A token that has a name such as eos_token is special even where tokenizer.json does not say so.
        let named_ids = config.special.iter().filter_map(|(_, token)| tokenizer.token_to_id(token));
        let flagged = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id);
        let special: HashSet<u32> = flagged.chain(named_ids).collect();
        let thinks = config.template.as_deref().is_some_and(|t| t.contains(CLOSE));
        let markers = reasoning_markers(&tokenizer).filter(|_| thinks);
        let keep = markers.iter().flat_map(|m| [m.open_id, m.close_id]).collect();
        // Added tokens in brackets are no text, special or not: calls of tools are written with such tokens.
        let bracketed = |text: &str| {
            text.len() > 2
                && (text.starts_with('<') && text.ends_with('>') || text.starts_with('[') && text.ends_with(']'))
        };
        let bracketed = added.iter().filter(|(_, token)| bracketed(&token.content)).map(|(&id, _)| id);
        let controls = bracketed.chain(special.iter().copied()).collect();
        let vocab = Vocab::new(&tokenizer, &special, &keep)
            .map_err(|id| TextError::Tokenizer(format!("token id {id} is above {MAX_TOKEN_ID}")))?;

        let compile =
            |source: &Option<String>| source.as_ref().map(|s| ChatTemplate::new(s, config.special.clone())).transpose();
        let template_words = config.template.as_deref().map(quoted_words).unwrap_or_default();
        let syntax = config.tool_template.as_deref().or(config.template.as_deref());
        let syntax = syntax.and_then(|t| ToolSyntax::detect(t, |token| tokenizer.token_to_id(token).is_some()));
        let model = Self {
            template_words,
            vocab: Arc::new(vocab),
            around,
            eos,
            template: compile(&config.template)?,
            tool_template: compile(&config.tool_template)?,
            markers,
            syntax: None,
            tool_tokens: Arc::default(),
            controls,
            tokenizer: Arc::new(tokenizer),
        };
        model.with_tool_syntax(syntax)
    }

    /// The model with calls of tools written so, whatever its template says; `None`: it calls none.
    ///
    /// # Errors
    /// [`TextError::ToolSyntax`] if it lacks a token for that.
    pub fn with_tool_syntax(self, syntax: Option<ToolSyntax>) -> Result<Self, TextError> {
        let missing = syntax.and_then(|s| Some((s, s.missing_token(|token| self.token_id(token).is_some())?)));
        if let Some((syntax, token)) = missing {
            return Err(TextError::ToolSyntax { syntax: syntax.name(), token });
        }
        let markers = syntax.into_iter().flat_map(ToolSyntax::markers);
        let tool_tokens = markers.filter_map(|marker| self.token_id(marker)).collect();
        Ok(Self { syntax, tool_tokens, ..self })
    }

    /// Ids of a text. `add_special_tokens`: with BOS and EOS where transformers' `tokenizer.encode(text)` writes them.
    /// Text of a special token becomes that token.
    ///
    /// # Errors
    /// [`TextError::Encode`] if the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let own_rule = add_special_tokens && self.around.is_none();
        let ids = library::encode(&self.tokenizer, text, own_rule)?;
        let (bos, eos) = self.around.filter(|_| add_special_tokens).unwrap_or_default();
        Ok(bos.into_iter().chain(ids).chain(eos).collect())
    }

    /// Ids of a rendered chat: the template has written BOS, so none is added.
    ///
    /// # Errors
    /// As [`TextModel::encode`].
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>, TextError> {
        self.encode(rendered, false)
    }

    /// Text of finished ids. Ids outside the vocabulary have none; reasoning markers are never skipped.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let ids: Vec<u32> = ids.iter().copied().filter(|&id| self.vocab.is_shown(id, skip_special_tokens)).collect();
        library::decode(&self.tokenizer, &ids)
    }

    /// A detokenizer for one output.
    pub fn detokenizer(&self, skip_special_tokens: bool) -> Detokenizer {
        Detokenizer::new(self.vocab.clone(), self.tokenizer.clone(), skip_special_tokens)
    }

    /// A detokenizer for an output in which tools may be called: the markers of calls are never skipped.
    pub fn tool_detokenizer(&self, skip_special_tokens: bool) -> Detokenizer {
        self.detokenizer(skip_special_tokens).keeping(self.tool_tokens.clone())
    }

    /// Highest id + 1, to be checked against the rows of the embedding.
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// Id of a token by its text in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// A token as the vocabulary writes it; `None` for an id outside of it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The exact bytes that a token stands for, perhaps part of a character; empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.vocab.get(id).map(|token| token.bytes.to_vec()).unwrap_or_default()
    }

    /// Whether a token is left out when special tokens are skipped.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocab.get(id).is_some_and(|token| token.special)
    }

    /// Whether a token stands for itself rather than for a text: special ones, reasoning markers, those that frame calls of
    /// tools.
    pub fn is_control(&self, id: u32) -> bool {
        self.controls.contains(&id)
    }

    /// A token's text in the vocabulary; empty for an id outside.
    pub fn token_text(&self, id: u32) -> String {
        self.tokenizer.id_to_token(id).unwrap_or_default()
    }

    /// The token that ends an output, as the tokenizer's files name it.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos
    }

    /// Whether chats can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Whether the chat template compares or writes this word as a string of its own.
    pub fn chat_template_has(&self, word: &str) -> bool {
        self.template_words.contains(word)
    }

    /// Renders a chat to the prompt's text. `now` is the wall-clock time that a template may write into it.
    ///
    /// # Errors
    /// [`TextError::NoChatTemplate`], or what the template says or fails on; see [`TextError`].
    pub fn render_chat(&self, chat: &ChatInput, now: NaiveDateTime) -> Result<String, TextError> {
        self.template(chat.has_tools()).ok_or(TextError::NoChatTemplate)?.render(chat, now)
    }

    /// How the model calls tools, of which its template tells it.
    ///
    /// # Errors
    /// [`TextError::NoToolSyntax`] or [`TextError::ToolsNotShown`] if it cannot be made to.
    pub fn tool_syntax(&self) -> Result<ToolSyntax, TextError> {
        let syntax = self.syntax.ok_or(TextError::NoToolSyntax)?;
        let shown = self.template(true).is_some_and(ChatTemplate::shows_tools);
        shown.then_some(syntax).ok_or(TextError::ToolsNotShown)
    }

    fn template(&self, for_tools: bool) -> Option<&ChatTemplate> {
        self.tool_template.as_ref().filter(|_| for_tools).or(self.template.as_ref())
    }

    /// The tokens around reasoning: `Some` if the vocabulary has `<think>` and `</think>` and the chat template knows
    /// of them, which tells thinking models from those that only share a thinking model's vocabulary.
    pub fn reasoning_markers(&self) -> Option<ReasoningMarkers> {
        self.markers.clone()
    }

    /// Whether what follows a rendered prompt begins inside reasoning: the template has opened it, or the message that
    /// is being continued has. Elsewhere in the prompt markers mean nothing, they may be a user's words.
    pub fn prompt_opens_reasoning(&self, chat: &ChatInput, rendered: &str) -> bool {
        let Some(markers) = &self.markers else { return false };
        let continued = chat.continued_text().filter(|_| chat.continue_final_message).unwrap_or_default();
        let open_in_message = match (continued.rfind(&markers.open), continued.rfind(&markers.close)) {
            (Some(open), Some(close)) => open > close,
            (open, _) => open.is_some(),
        };
        open_in_message || rendered.trim_end().ends_with(&markers.open)
    }
}

impl fmt::Debug for TextModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let template = self.template.is_some();
        f.debug_struct("TextModel").field("vocab_size", &self.vocab.len()).field("chat_template", &template).finish()
    }
}

/// The tokenizer of a converted vocabulary, and whether BOS is usual; `config` gets the names that it lacks.
fn converted_tokenizer(
    file: &str,
    converted: Result<Converted, String>,
    config: &mut TextConfig,
) -> Result<(Tokenizer, Option<bool>), TextError> {
    let refused = |reason: String| TextError::Tokenizer(format!("{file}: {reason}"));
    let Converted { tokenizer: json, named, add_bos } = converted.map_err(refused)?;
    let tokenizer = library::read(file, json.to_string().as_bytes())?;
    let mut added = json["added_tokens"].as_array().into_iter().flatten();
    let placed = |token: &Value| token["content"].as_str().and_then(|text| tokenizer.token_to_id(text));
    // The library would give a token that its model lacks the next free id.
    debug_assert!(added.all(|token| placed(token).map(u64::from) == token["id"].as_u64()));
    config.name_tokens(named);
    Ok((tokenizer, Some(add_bos)))
}

/// What stands between two quotes and is one short word.
fn quoted_words(template: &str) -> HashSet<String> {
    let is_word = |text: &&str| (1..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric());
    template.split(['"', '\'']).filter(is_word).map(str::to_owned).collect()
}

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

fn reasoning_markers(tokenizer: &Tokenizer) -> Option<ReasoningMarkers> {
    let (open_id, close_id) = (tokenizer.token_to_id(OPEN)?, tokenizer.token_to_id(CLOSE)?);
    Some(ReasoningMarkers { open: OPEN.into(), close: CLOSE.into(), open_id, close_id })
}
