//! The tokenizer of a SentencePiece `tokenizer.model`, written as the `tokenizer.json` that means the same.
//!
//! The file is a protocol buffer (`sentencepiece_model.proto`): pieces with scores and kinds, a model type, and rules for
//! spaces and Unicode. `prost` reads it; the few fields in use are declared here, because the crates that declare them
//! all need a protobuf compiler or C++ to build. Text between special tokens encodes as with the original library;
//! special tokens, and text beside them, as in transformers.

use std::collections::{BTreeMap, HashMap};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use prost::Message;
use serde_json::{Value, json};

use crate::config::TextConfig;
use crate::convert::{Converted, Prefix, added_token, piece_bpe, piece_tokenizer, sort_by_score, splits};

/// A `tokenizer.model`.
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerSpec>,
    #[prost(message, optional, tag = "5")]
    denormalizer: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, tag = "1")]
    piece: String,
    #[prost(float, tag = "2")]
    score: f32,
    #[prost(int32, optional, tag = "3", default = "1")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
    #[prost(bool, tag = "24")]
    treat_whitespace_as_suffix: bool,
    #[prost(bool, tag = "35")]
    byte_fallback: bool,
    #[prost(int32, optional, tag = "40", default = "0")]
    unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41", default = "1")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42", default = "2")]
    eos_id: Option<i32>,
    #[prost(int32, optional, tag = "43", default = "-1")]
    pad_id: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", tag = "2")]
    charsmap: Vec<u8>,
    #[prost(bool, optional, tag = "3", default = "true")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    escape_whitespaces: Option<bool>,
}

/// Longest file that is read, three times the largest in use: an empty piece takes two bytes here and eighty in memory.
const MAX_BYTES: usize = 16 << 20;

const UNIGRAM: i32 = 1;
const BPE: i32 = 2;

/// Kinds of pieces, as GGUF files number them too.
pub(crate) const NORMAL: i32 = 1;
pub(crate) const UNKNOWN: i32 = 2;
pub(crate) const CONTROL: i32 = 3;
pub(crate) const USER_DEFINED: i32 = 4;
pub(crate) const UNUSED: i32 = 5;

/// Converts a file; the error says why it is not read.
pub(crate) fn convert(file: &[u8], config: &TextConfig, added: Vec<(u32, Value)>) -> Result<Converted, String> {
    if file.len() > MAX_BYTES {
        return Err(format!("it has {} bytes; at most {MAX_BYTES} are read", file.len()));
    }
    let ModelProto { mut pieces, trainer, normalizer, denormalizer } =
        ModelProto::decode(file).map_err(|e| format!("it is not a SentencePiece model: {e}"))?;
    let trainer = trainer.unwrap_or_default();
    let normalizer = normalizer.unwrap_or_default();
    if pieces.is_empty() {
        return Err("it has no pieces".into());
    }
    if trainer.treat_whitespace_as_suffix || !normalizer.escape_whitespaces() {
        return Err("it writes spaces after words, or as spaces; only '▁' before words is read".into());
    }
    if denormalizer.is_some_and(|d| !d.charsmap.is_empty()) {
        return Err("it has a denormalizer, which is not read".into());
    }
    if pieces.iter().any(|p| p.score.is_nan()) {
        return Err("a score is not a number".into());
    }

    for (id, token) in &added {
        // On a piece, or right after the last one.
        let at = *id as usize;
        if at > pieces.len() {
            return Err(format!("added_tokens_decoder has id {at}; there are ids up to {}", pieces.len() - 1));
        }
        if at == pieces.len() {
            pieces.push(Piece::default());
        }
        let kind = if pieces[at].kind() == UNKNOWN { UNKNOWN } else { USER_DEFINED };
        let piece = token["content"].as_str().unwrap_or_default().to_owned();
        pieces[at] = Piece { piece, score: 0.0, kind: Some(kind) };
    }
    let named = [
        ("unk_token", trainer.unk_id()),
        ("bos_token", trainer.bos_id()),
        ("eos_token", trainer.eos_id()),
        ("pad_token", trainer.pad_id()),
    ];
    let piece_of = |id: i32| usize::try_from(id).ok().and_then(|id| pieces.get(id)).map(|p| p.piece.clone());
    let named: Vec<_> = named.into_iter().filter_map(|(name, id)| Some((name, piece_of(id)?))).collect();

    let mut seen = HashMap::with_capacity(pieces.len());
    for (piece, id) in pieces.iter().zip(0u32..) {
        if piece.piece.is_empty() {
            return Err(format!("the piece of id {id} is empty"));
        }
        if let Some(first) = seen.insert(piece.piece.as_str(), id) {
            return Err(format!("ids {first} and {id} have the same piece"));
        }
    }
    let mut tokens: BTreeMap<u32, Value> = BTreeMap::new();
    for (piece, id) in pieces.iter().zip(0..) {
        let special = matches!(piece.kind(), CONTROL | UNKNOWN);
        if special || piece.kind() == USER_DEFINED {
            tokens.insert(id, added_token(id, &piece.piece, special));
        }
    }
    tokens.extend(added);

    let unknown = pieces.iter().position(|p| p.kind() == UNKNOWN);
    let model = match trainer.model_type() {
        UNIGRAM => unigram(&pieces, unknown, trainer.byte_fallback)?,
        BPE => bpe(&pieces, unknown, trainer.byte_fallback),
        other => return Err(format!("its model type is {other}; unigram (1) and BPE (2) are read")),
    };
    let prefix = match config.add_prefix_space.unwrap_or(normalizer.add_dummy_prefix()) {
        false => Prefix::None,
        true if config.legacy == Some(false) => Prefix::First,
        true => Prefix::Each,
    };
    let remove_extra = normalizer.remove_extra_whitespaces();
    let strip = if remove_extra { u32::MAX } else { u32::from(prefix != Prefix::None) };
    let steps = normalizers(&normalizer.charsmap, remove_extra)?;
    let mut tokenizer = piece_tokenizer(steps, prefix, strip, model);
    tokenizer["added_tokens"] = tokens.into_values().collect();
    let add_bos = named.iter().any(|(name, _)| *name == "bos_token");
    Ok(Converted { tokenizer, named, add_bos })
}

/// What is done to text before spaces become pieces.
fn normalizers(charsmap: &[u8], remove_extra_whitespaces: bool) -> Result<Vec<Value>, String> {
    let mut steps = Vec::new();
    if !charsmap.is_empty() {
        check_charsmap(charsmap)?;
        let base64 = BASE64_STANDARD.encode(charsmap);
        steps.push(json!({"type": "Precompiled", "precompiled_charsmap": base64}));
    }
    if remove_extra_whitespaces {
        for (pattern, content) in [("^ +| +$", ""), (" {2,}", " ")] {
            steps.push(json!({"type": "Replace", "pattern": {"Regex": pattern}, "content": content}));
        }
    }
    Ok(steps)
}

/// Refuses a table of characters that claims more units than it has bytes for: its reader would reserve them.
pub(crate) fn check_charsmap(charsmap: &[u8]) -> Result<(), String> {
    let claimed = charsmap.first_chunk().map_or(usize::MAX, |len| u32::from_le_bytes(*len) as usize);
    match charsmap.len().checked_sub(4) {
        Some(rest) if claimed <= rest && claimed >= 4 => Ok(()),
        _ => Err("its table of characters is truncated".into()),
    }
}

fn unigram(pieces: &[Piece], unknown: Option<usize>, byte_fallback: bool) -> Result<Value, String> {
    let unknown = unknown.ok_or("it has no unknown piece")?;
    if pieces.iter().any(|p| p.kind() == UNUSED) {
        return Err("it is a unigram model with unused pieces, which are not read".into());
    }
    let vocab: Vec<Value> = pieces.iter().map(|p| json!([p.piece, p.score])).collect();
    Ok(json!({"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": byte_fallback}))
}

fn bpe(pieces: &[Piece], unknown: Option<usize>, byte_fallback: bool) -> Value {
    let used = pieces.iter().zip(0u32..).filter(|(piece, _)| piece.kind() != UNUSED);
    let vocab: HashMap<&str, u32> = used.map(|(piece, id)| (piece.piece.as_str(), id)).collect();
    let normal = |piece: &str| vocab.get(piece).copied().filter(|&id| pieces[id as usize].kind() == NORMAL);
    let whole = pieces.iter().zip(0u32..).filter(|(piece, _)| piece.kind() == NORMAL);
    let mut merges = splits(whole.map(|(piece, id)| (id, piece.piece.as_str())), normal);
    sort_by_score(&mut merges, |id| pieces[id as usize].score);
    let text = |id: u32| pieces[id as usize].piece.as_str();
    let merges = merges.into_iter().map(|(_, left, right)| (text(left), text(right)));
    piece_bpe(&vocab, merges, unknown.map(|id| text(id as u32)), byte_fallback)
}
