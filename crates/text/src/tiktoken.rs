//! The tokenizer of a tiktoken file, written as the `tokenizer.json` that means the same.
//!
//! The file has a line for each token: its bytes in base64, and its rank, which is its id and says what is merged first.
//! How text is split before that, and which special tokens follow the ranks, is code in the library that wrote it; so
//! it is known here for a few families, which are told apart by the names that they give their files and classes. (Kimi's
//! also cuts runs of 25,000 characters without a space, or of spaces; that is not done here.)

use std::collections::{BTreeMap, HashMap};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::convert::{Converted, Splitting, added_token, byte_level_tokenizer, splits};
use crate::gguf::{LLAMA3, QWEN2};
use crate::vocab::{MAX_TOKEN_ID, char_of_byte};

const CL100K: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KIMI: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A library's way with tiktoken.
struct Family {
    /// Name of the file.
    file: &'static str,
    /// `tokenizer_class` of checkpoints whose file may have any name.
    class: Option<&'static str>,
    /// Ranks of its own file. One with more is of another family that uses the same name.
    ranks: usize,
    pattern: &'static str,
    /// Unicode is normalised to NFC first.
    nfc: bool,
    /// How many special tokens follow the ranks, and the name of each.
    special: (u32, fn(n: u32, id: u32) -> String),
    /// `bos_token` and `eos_token`, where the family has its own.
    ends: [Option<&'static str>; 2],
}

const FAMILIES: [Family; 5] = [
    Family {
        file: "qwen.tiktoken",
        class: Some("QWenTokenizer"),
        ranks: 151_643,
        pattern: QWEN2,
        nfc: true,
        special: (208, qwen),
        ends: [None, Some("<|endoftext|>")],
    },
    Family {
        file: "tiktoken.model",
        class: Some("TikTokenTokenizer"),
        ranks: 163_584,
        pattern: KIMI,
        nfc: false,
        special: (256, |_, id| format!("<|reserved_token_{id}|>")),
        ends: [None, None],
    },
    Family {
        file: "tokenizer.model",
        class: None,
        ranks: 128_000,
        pattern: LLAMA3,
        nfc: false,
        special: (256, llama3),
        ends: [Some("<|begin_of_text|>"), Some("<|end_of_text|>")],
    },
    Family {
        file: "cl100k_base.tiktoken",
        class: None,
        ranks: 100_256,
        pattern: CL100K,
        nfc: false,
        special: (1, |_, _| "<|endoftext|>".into()),
        ends: [None, Some("<|endoftext|>")],
    },
    Family {
        file: "o200k_base.tiktoken",
        class: None,
        ranks: 199_998,
        pattern: O200K,
        nfc: false,
        special: (1, |_, _| "<|endoftext|>".into()),
        ends: [None, Some("<|endoftext|>")],
    },
];

/// Of Qwen 1.
fn qwen(n: u32, _: u32) -> String {
    match n {
        0 => "<|endoftext|>".into(),
        1 => "<|im_start|>".into(),
        2 => "<|im_end|>".into(),
        _ => format!("<|extra_{}|>", n - 3),
    }
}

/// Of Llama 3, whose later versions name some of the reserved ones in `added_tokens_decoder`.
fn llama3(n: u32, _: u32) -> String {
    let reserved = match n {
        0 => return "<|begin_of_text|>".into(),
        1 => return "<|end_of_text|>".into(),
        6 => return "<|start_header_id|>".into(),
        7 => return "<|end_header_id|>".into(),
        9 => return "<|eot_id|>".into(),
        2..6 => n - 2,
        8 => 4,
        _ => n - 5,
    };
    format!("<|reserved_special_token_{reserved}|>")
}

/// Converts a file of this name; the error says why it is not read.
pub(crate) fn convert(name: &str, file: &[u8], class: &str, added: Vec<(u32, Value)>) -> Result<Converted, String> {
    let family = family(name, class)?;
    let ranks = ranks(file)?;
    if ranks.len() > family.ranks {
        return Err(format!("it has {} ranks, more than the {} of {}", ranks.len(), family.ranks, family.file));
    }
    let after = ranks.iter().map(|(_, rank)| rank + 1).max().unwrap_or_default();
    let (count, special) = family.special;
    let mut tokens: BTreeMap<u32, Value> =
        (0..count).map(|n| (after + n, added_token(after + n, &special(n, after + n), true))).collect();
    tokens.extend(added);

    let mut vocab: HashMap<&str, u32> = HashMap::with_capacity(ranks.len() + tokens.len());
    for (token, rank) in &ranks {
        if vocab.insert(token, *rank).is_some() {
            return Err(format!("rank {rank} has the bytes of another"));
        }
    }
    let by_id: HashMap<u32, &str> = ranks.iter().map(|(token, rank)| (*rank, token.as_str())).collect();
    if by_id.len() != ranks.len() {
        return Err("a rank occurs twice".into());
    }
    if let Some(byte) = (0..=255).find(|byte| !vocab.contains_key(char_of_byte(*byte).to_string().as_str())) {
        return Err(format!("byte {byte:#04x} has no rank"));
    }
    let mut merges = splits(ranks.iter().map(|(token, rank)| (*rank, token.as_str())), |part| vocab.get(part).copied());
    merges.sort_unstable();
    let merges = merges.iter().map(|(_, left, right)| json!([by_id[left], by_id[right]])).collect();
    for (id, token) in &tokens {
        let content = token["content"].as_str().unwrap_or_default();
        if *id < after || vocab.insert(content, *id).is_some() {
            return Err(format!("the special token of id {id} is another token too"));
        }
    }
    let splitting = Splitting { patterns: &[family.pattern], nfc: family.nfc, ignore_merges: true };
    let mut tokenizer = byte_level_tokenizer(&vocab, merges, splitting);
    tokenizer["added_tokens"] = tokens.into_values().collect();
    let ends = ["bos_token", "eos_token"].into_iter().zip(family.ends);
    let named: Vec<_> = ends.filter_map(|(name, token)| Some((name, token?.to_owned()))).collect();
    let add_bos = family.ends[0].is_some();
    Ok(Converted { tokenizer, named, add_bos })
}

/// The family of a file: that of the class if it has one of its own, else that of the name.
fn family(name: &str, class: &str) -> Result<&'static Family, String> {
    let by_class = FAMILIES.iter().find(|f| f.class == Some(class));
    let general = ["", "PreTrainedTokenizer", "PreTrainedTokenizerFast"].contains(&class);
    let by_name = FAMILIES.iter().find(|f| f.file == name).filter(|_| general);
    by_class.or(by_name).ok_or_else(|| {
        let files: Vec<_> = FAMILIES.iter().map(|f| f.file).collect();
        let classes: Vec<_> = FAMILIES.iter().filter_map(|f| f.class).collect();
        let class: String = class.chars().take(60).collect();
        format!(
            "it does not say how text is split, and tokenizer_class {class:?} is not known; known are the files {} \
             and the classes {}",
            files.join(", "),
            classes.join(", ")
        )
    })
}

/// The tokens, in the alphabet of byte-level BPE, with their ranks.
fn ranks(file: &[u8]) -> Result<Vec<(String, u32)>, String> {
    let text = std::str::from_utf8(file).map_err(|_| "it is not text")?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.is_empty());
    let read = |(number, line): (usize, &str)| {
        let wrong = || format!("line {}: not base64, a space and a rank up to {MAX_TOKEN_ID}", number + 1);
        let (token, rank) = line.split_once(' ').ok_or_else(wrong)?;
        let bytes = BASE64_STANDARD.decode(token).ok().filter(|b| !b.is_empty()).ok_or_else(wrong)?;
        let rank = rank.trim_end().parse().ok().filter(|rank| *rank < MAX_TOKEN_ID).ok_or_else(wrong)?;
        Ok((bytes.into_iter().map(char_of_byte).collect(), rank))
    };
    lines.map(read).collect()
}
