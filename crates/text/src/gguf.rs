//! The tokenizer of a GGUF file, written as the `tokenizer.json` that it was made from.
//!
//! A file has the tokens with their types, and merges (byte-level BPE) or scores (SentencePiece BPE); what
//! splits text before that it only names (`tokenizer.ggml.pre`, llama.cpp's `llama-vocab.cpp`). The one reader
//! of tokenizers does the rest.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::convert::{
    Prefix, Splitting, added_token, byte_level_tokenizer, piece_bpe, piece_tokenizer, sort_by_score, splits,
};
use crate::sentencepiece::{CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};
use crate::{TextError, TextFiles, TextModel, TokenizerFile};

/// What a GGUF file says of its vocabulary, by the keys `tokenizer.ggml.*`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufVocab {
    /// `model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// `pre`: how text is split before BPE.
    pub pre: Option<String>,
    /// `tokens`, by id.
    pub tokens: Vec<String>,
    /// `scores`: what SentencePiece merges first, highest first; empty where there are merges.
    pub scores: Vec<f32>,
    /// `token_type` of each token: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. May be empty.
    pub token_types: Vec<i32>,
    /// `merges`, each two tokens with a space between.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `add_bos_token`; what is usual for the kind of vocabulary if `None`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`; false if `None`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix` (SentencePiece); true if `None`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
pub(crate) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(crate) const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const CJK: &str = "[一-龥ࠀ-一가-\u{d7ff}]+";

/// How byte-level vocabularies split text: each pattern cuts what the one before left whole.
struct Split {
    /// `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// Unicode is normalised to NFC first.
    nfc: bool,
    /// A piece that is a token is never built from merges.
    ignore_merges: bool,
    /// Whether BOS is written if the file does not say.
    add_bos: bool,
}

const SPLITS: [Split; 7] = [
    Split {
        names: &["llama-bpe", "llama3", "llama-v3"],
        patterns: &[LLAMA3],
        nfc: false,
        ignore_merges: true,
        add_bos: true,
    },
    Split {
        names: &["qwen2", "deepseek-r1-qwen"],
        patterns: &[QWEN2],
        nfc: true,
        ignore_merges: false,
        add_bos: false,
    },
    Split {
        names: &["deepseek-v3"],
        patterns: &[
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
        ],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Split {
        names: &["deepseek-llm"],
        patterns: &[
            r"[\r\n]",
            r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
            "\\s?[!-/:-~！-／：-～‘-‟\u{3000}-。]+",
            r"\s+$",
            CJK,
            r"\p{N}+",
        ],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Split {
        names: &["deepseek-coder"],
        patterns: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Split { names: &["gpt-2"], patterns: &[GPT2], nfc: false, ignore_merges: false, add_bos: false },
    Split {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
];

impl TextModel {
    /// The text model of a GGUF file.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] if the vocabulary is of a kind that is not read, or does not hold together.
    pub fn from_gguf(vocab: &GgufVocab) -> Result<Self, TextError> {
        let (tokenizer, config) = vocab.as_files().map_err(TextError::Tokenizer)?;
        TextModel::new(&TextFiles {
            tokenizer: TokenizerFile::Json(tokenizer.to_string().as_bytes()),
            tokenizer_config: Some(config.to_string().as_bytes()),
            special_tokens_map: None,
            chat_template_jinja: None,
        })
    }
}

impl GgufVocab {
    /// `tokenizer.json` and `tokenizer_config.json`.
    fn as_files(&self) -> Result<(Value, Value), String> {
        let count = self.tokens.len();
        if count == 0 {
            return Err("tokenizer.ggml.tokens is missing or empty".into());
        }
        for (key, len) in [("scores", self.scores.len()), ("token_type", self.token_types.len())] {
            if len != 0 && len != count {
                return Err(format!("tokenizer.ggml.{key} has {len} entries for {count} tokens"));
            }
        }
        // Fillers, for rows of the embedding that no text leads to, are not part of the vocabulary.
        let used = self.tokens.iter().map(String::as_str).zip(0..).filter(|(_, id)| self.kind(*id as usize) != UNUSED);
        let ids: HashMap<&str, u32> = used.collect();
        let (mut tokenizer, add_bos) = match self.model.as_str() {
            "gpt2" => self.byte_level(&ids)?,
            "llama" => self.sentencepiece(&ids)?,
            other => {
                let other: String = other.chars().take(60).collect();
                return Err(format!("tokenizer.ggml.model is {other:?}; supported: gpt2, llama"));
            }
        };
        let added = self.tokens.iter().enumerate().filter_map(|(id, token)| {
            let kind = self.kind(id);
            let special = kind == CONTROL || kind == UNKNOWN;
            (special || kind == USER_DEFINED).then(|| added_token(id as u32, token, special))
        });
        tokenizer["added_tokens"] = added.filter(|token| token["content"] != "").collect();
        let named = |key: &str, id: Option<u32>| match id {
            None => Ok(None),
            Some(id) => match self.tokens.get(id as usize) {
                Some(token) => Ok(Some(token.as_str())),
                None => Err(format!("tokenizer.ggml.{key} is {id}; there are {count} tokens")),
            },
        };
        let (bos, eos) = (named("bos_token_id", self.bos)?, named("eos_token_id", self.eos)?);
        let before = bos.zip(self.bos).filter(|_| self.add_bos.unwrap_or(add_bos));
        let after = eos.zip(self.eos).filter(|_| self.add_eos.unwrap_or(false));
        if before.is_some() || after.is_some() {
            let template = template(before, after);
            tokenizer["post_processor"] = match tokenizer["post_processor"].take() {
                Value::Null => template,
                first => json!({"type": "Sequence", "processors": [first, template]}),
            };
        }
        let config = json!({"bos_token": bos, "eos_token": eos, "chat_template": self.chat_template});
        Ok((tokenizer, config))
    }

    fn kind(&self, id: usize) -> i32 {
        self.token_types.get(id).copied().unwrap_or(NORMAL)
    }

    /// GPT-2's kind, and whether BOS is usually written.
    fn byte_level(&self, ids: &HashMap<&str, u32>) -> Result<(Value, bool), String> {
        let pre = self.pre.as_deref().unwrap_or("default");
        let split = SPLITS.iter().find(|s| s.names.contains(&pre)).ok_or_else(|| {
            let known: Vec<&str> = SPLITS.iter().flat_map(|s| s.names).copied().collect();
            let pre: String = pre.chars().take(60).collect();
            format!("tokenizer.ggml.pre is {pre:?}; supported: {}", known.join(", "))
        })?;
        let merges = self.merges.iter().map(|merge| {
            // A token may itself begin with a space in no byte-level alphabet, so the first one separates.
            let pair = merge.split_once(' ').filter(|(a, b)| ids.contains_key(a) && ids.contains_key(b));
            let pair = pair.filter(|(a, b)| ids.contains_key(format!("{a}{b}").as_str()));
            pair.map(|(a, b)| json!([a, b])).ok_or("tokenizer.ggml.merges names tokens that are not there")
        });
        let merges: Vec<Value> = merges.collect::<Result<_, _>>()?;
        let splitting = Splitting { patterns: split.patterns, nfc: split.nfc, ignore_merges: split.ignore_merges };
        Ok((byte_level_tokenizer(ids, merges, splitting), split.add_bos))
    }

    /// SentencePiece's BPE: merges are the ways to build a piece from two others, by the piece's score.
    fn sentencepiece(&self, ids: &HashMap<&str, u32>) -> Result<(Value, bool), String> {
        if self.scores.iter().any(|s| s.is_nan()) || self.scores.is_empty() {
            return Err("tokenizer.ggml.scores is missing or not all numbers".into());
        }
        let normal = |piece: &str| ids.get(piece).copied().filter(|id| self.kind(*id as usize) == NORMAL);
        let whole = self.tokens.iter().map(String::as_str).zip(0..).filter(|(_, id)| self.kind(*id as usize) == NORMAL);
        let mut merges = splits(whole.map(|(piece, id)| (id, piece)), normal);
        sort_by_score(&mut merges, |id| self.scores[id as usize]);
        let token = |id: u32| self.tokens[id as usize].as_str();
        let merges = merges.into_iter().map(|(_, left, right)| (token(left), token(right)));
        let unknown = (0..self.tokens.len()).find(|id| self.kind(*id) == UNKNOWN).map(|id| token(id as u32));
        let prefix = if self.add_space_prefix.unwrap_or(true) { Prefix::Each } else { Prefix::None };
        let model = piece_bpe(ids, merges, unknown, true);
        Ok((piece_tokenizer(Vec::new(), prefix, u32::from(prefix != Prefix::None), model), true))
    }
}

/// A post-processor that writes a token before a text, or after it.
fn template(before: Option<(&str, u32)>, after: Option<(&str, u32)>) -> Value {
    let token = |token: Option<(&str, u32)>, kind: u32| {
        token.map(|(id, _)| json!({"SpecialToken": {"id": id, "type_id": kind}}))
    };
    let whole = |name: &str, kind: u32| {
        let text = Some(json!({"Sequence": {"id": name, "type_id": kind}}));
        [token(before, kind), text, token(after, kind)].into_iter().flatten()
    };
    let special = before.into_iter().chain(after);
    let special: Map<String, Value> =
        special.map(|(text, id)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}))).collect();
    json!({
        "type": "TemplateProcessing",
        "single": whole("A", 0).collect::<Vec<_>>(),
        "pair": whole("A", 0).chain(whole("B", 1)).collect::<Vec<_>>(),
        "special_tokens": special,
    })
}
