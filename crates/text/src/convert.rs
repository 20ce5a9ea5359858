//! The parts of a `tokenizer.json` that vocabularies of other forms are written in, so that one reader does the rest.
//!
//! Invariant: what is written here has every id of the vocabulary where the vocabulary has it.

use std::collections::HashMap;

use serde_json::{Value, json};

/// A vocabulary of another form, converted.
#[derive(Debug)]
pub(crate) struct Converted {
    /// `tokenizer.json`.
    pub(crate) tokenizer: Value,
    /// Tokens by the names that `tokenizer_config.json` would give them: `bos_token`, ….
    pub(crate) named: Vec<(&'static str, String)>,
    /// Whether BOS is written before a text if `tokenizer_config.json` does not say.
    pub(crate) add_bos: bool,
}

/// Longest piece that is looked at for how it is merged, in bytes: SentencePiece's own trainer makes none above 16
/// characters, and a byte-level one that is longer is found whole.
const MAX_MERGED: usize = 256;

/// Every way to build a piece from two others: (piece, left, right). `id_of` knows the pieces that may be parts.
pub(crate) fn splits<'a>(
    pieces: impl Iterator<Item = (u32, &'a str)>,
    id_of: impl Fn(&str) -> Option<u32>,
) -> Vec<(u32, u32, u32)> {
    let mut splits = Vec::new();
    for (id, piece) in pieces.filter(|(_, piece)| piece.len() <= MAX_MERGED) {
        for (cut, _) in piece.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (id_of(&piece[..cut]), id_of(&piece[cut..])) {
                splits.push((id, left, right));
            }
        }
    }
    splits
}

/// SentencePiece's merges: the best score first; of one piece's ways that of the latest parts first, as transformers
/// converts.
pub(crate) fn sort_by_score(splits: &mut [(u32, u32, u32)], score: impl Fn(u32) -> f32) {
    splits.sort_by(|a, b| score(b.0).total_cmp(&score(a.0)).then(a.0.cmp(&b.0)).then((b.1, b.2).cmp(&(a.1, a.2))));
}

/// A BPE model over spaces written as `▁`, in which a character that is no piece becomes bytes.
pub(crate) fn piece_bpe(
    vocab: &HashMap<&str, u32>,
    merges: impl Iterator<Item = (impl AsRef<str>, impl AsRef<str>)>,
    unknown: Option<&str>,
    byte_fallback: bool,
) -> Value {
    let merges: Vec<Value> = merges.map(|(left, right)| json!([left.as_ref(), right.as_ref()])).collect();
    json!({
        "type": "BPE", "vocab": vocab, "merges": merges, "unk_token": unknown, "fuse_unk": true,
        "byte_fallback": byte_fallback, "ignore_merges": false,
    })
}

/// Where SentencePiece's dummy prefix, a space before the text, is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prefix {
    /// Nowhere.
    None,
    /// Before each text between special tokens.
    Each,
    /// Before the text unless it begins with a space or a special token: what transformers calls not `legacy`.
    First,
}

/// A tokenizer of SentencePiece's kind: `normalizers`, then spaces as `▁`, then `model` on the whole text. Decoding
/// takes up to `strip` spaces off the beginning.
pub(crate) fn piece_tokenizer(mut normalizers: Vec<Value>, prefix: Prefix, strip: u32, model: Value) -> Value {
    let mut pre_tokenizer = Value::Null;
    match prefix {
        Prefix::First => {
            pre_tokenizer = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
        }
        Prefix::Each => normalizers.extend([json!({"type": "Prepend", "prepend": "▁"}), replace(" ", "▁")]),
        Prefix::None => normalizers.push(replace(" ", "▁")),
    }
    let normalizer = match normalizers.len() {
        0 => Value::Null,
        1 => normalizers.remove(0),
        _ => json!({"type": "Sequence", "normalizers": normalizers}),
    };
    let mut decoders = vec![replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if strip > 0 {
        decoders.push(json!({"type": "Strip", "content": " ", "start": strip, "stop": 0}));
    }
    json!({
        "version": "1.0",
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    })
}

fn replace(from: &str, to: &str) -> Value {
    json!({"type": "Replace", "pattern": {"String": from}, "content": to})
}

/// How byte-level vocabularies split text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Splitting<'a> {
    /// Each pattern cuts what the one before left whole.
    pub(crate) patterns: &'a [&'a str],
    /// Unicode is normalised to NFC first.
    pub(crate) nfc: bool,
    /// A piece that is a token is never built from merges.
    pub(crate) ignore_merges: bool,
}

/// A tokenizer of GPT-2's kind, over bytes written as characters.
pub(crate) fn byte_level_tokenizer(
    vocab: &HashMap<impl AsRef<str>, u32>,
    merges: Vec<Value>,
    splitting: Splitting<'_>,
) -> Value {
    let vocab: serde_json::Map<String, Value> =
        vocab.iter().map(|(token, id)| (token.as_ref().to_owned(), json!(id))).collect();
    let mut steps: Vec<Value> = splitting
        .patterns
        .iter()
        .map(|p| json!({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": false}))
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    steps.push(bytes.clone());
    json!({
        "version": "1.0",
        "normalizer": if splitting.nfc { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": bytes,
        "decoder": bytes,
        "model": {
            "type": "BPE", "vocab": vocab, "merges": merges, "unk_token": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": splitting.ignore_merges,
        },
    })
}

/// An entry of `added_tokens`: found in a text before anything else is done to it.
pub(crate) fn added_token(id: u32, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "special": special,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    })
}
