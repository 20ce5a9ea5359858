//! What each token id stands for, worked out once from the tokenizer's vocabulary and decoder.

use std::collections::HashSet;

use tokenizers::Tokenizer;

use crate::library;

/// How the tokens of an output become its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decoding {
    /// Every token is a run of bytes; the text is their concatenation, read as UTF-8 (GPT-2 and its descendants).
    Bytes,
    /// Every token is text, but for tokens like `<0xE2>`, which are one byte each (SentencePiece with byte fallback).
    /// A run of byte tokens that is not UTF-8 becomes one U+FFFD a byte.
    ByteFallback {
        /// How many spaces are taken off the beginning of the text (the dummy prefix).
        strip_start: usize,
    },
    /// Another decoder: only the `tokenizers` crate knows, see `detokenize::Window`.
    Other,
}

/// One entry of the vocabulary.
#[derive(Debug, Clone, Default)]
pub(crate) struct Token {
    /// The bytes it adds to a text.
    pub(crate) bytes: Box<[u8]>,
    /// It is one byte of a byte-fallback vocabulary.
    pub(crate) byte_fallback: bool,
    /// Left out when special tokens are skipped.
    pub(crate) special: bool,
    /// Sent whatever is skipped: the reasoning markers, which are looked for in the text.
    pub(crate) keep: bool,
}

/// The tokens by id, and the rule that joins them.
#[derive(Debug)]
pub(crate) struct Vocab {
    pub(crate) decoding: Decoding,
    tokens: Vec<Token>,
}

/// Ids reach no further than this, four times the largest vocabularies in use: a larger one is a broken file, and would
/// make a table of that size.
pub(crate) const MAX_TOKEN_ID: u32 = 1 << 20;

impl Vocab {
    /// Reads the vocabulary; the error is the id that is out of range.
    pub(crate) fn new(tokenizer: &Tokenizer, special: &HashSet<u32>, keep: &HashSet<u32>) -> Result<Self, u32> {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or_default();
        let (decoding, replaced) = classify(&decoder);
        let vocab = tokenizer.get_vocab(true);
        let highest = vocab.values().copied().max();
        if let Some(id) = highest.filter(|&id| id > MAX_TOKEN_ID) {
            return Err(id);
        }
        let mut tokens = vec![Token::default(); highest.map_or(0, |id| id as usize + 1)];
        for &id in vocab.values() {
            // Two strings may share an id; the tokenizer says which one decoding gives.
            let Some(text) = tokenizer.id_to_token(id) else { continue };
            let (bytes, byte_fallback) = match decoding {
                Decoding::Bytes => (byte_level(&text).unwrap_or_else(|| text.into_bytes()), false),
                Decoding::ByteFallback { .. } => match fallback_byte(&text) {
                    Some(byte) => (vec![byte], true),
                    None => {
                        let text = replaced.iter().fold(text, |text, (from, to)| text.replace(from, to));
                        (text.into_bytes(), false)
                    }
                },
                Decoding::Other => (library::decode(tokenizer, &[id]).into_bytes(), false),
            };
            tokens[id as usize] = Token {
                bytes: bytes.into_boxed_slice(),
                byte_fallback,
                special: special.contains(&id),
                keep: keep.contains(&id),
            };
        }
        Ok(Self { decoding, tokens })
    }

    /// Highest id + 1.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(crate) fn get(&self, id: u32) -> Option<&Token> {
        self.tokens.get(id as usize)
    }

    /// Whether the token contributes to the text at all.
    pub(crate) fn is_shown(&self, id: u32, skip_special_tokens: bool) -> bool {
        self.get(id).is_some_and(|t| !skip_special_tokens || !t.special || t.keep)
    }
}

/// Recognises the decoders whose rule we know, by the `decoder` object of tokenizer.json. For byte fallback also the
/// replacements made in each token.
fn classify(decoder: &serde_json::Value) -> (Decoding, Vec<(String, String)>) {
    let of_type = |d: &serde_json::Value, name: &str| d["type"] == name;
    let single = [decoder.clone()];
    let steps = decoder["decoders"].as_array().map_or(&single[..], Vec::as_slice);
    let steps: Vec<_> = steps.iter().filter(|d| !of_type(d, "Fuse")).collect();
    if let [only] = steps[..]
        && of_type(only, "ByteLevel")
    {
        return (Decoding::Bytes, Vec::new());
    }
    let at = steps.iter().position(|d| of_type(d, "ByteFallback"));
    let fused = decoder["decoders"].as_array().is_some_and(|d| d.iter().any(|d| of_type(d, "Fuse")));
    if let Some(at) = at {
        let replaced: Option<Vec<_>> = steps[..at]
            .iter()
            .map(|d| {
                let (from, to) = (d["pattern"]["String"].as_str()?, d["content"].as_str()?);
                of_type(d, "Replace").then(|| (from.to_owned(), to.to_owned()))
            })
            .collect();
        let strip_start = match steps[at + 1..] {
            [] => Some(0),
            [d] if fused && of_type(d, "Strip") && d["content"] == " " && d["stop"] == 0 => d["start"].as_u64(),
            _ => None,
        };
        if let (Some(replaced), Some(strip_start)) = (replaced, strip_start) {
            return (Decoding::ByteFallback { strip_start: strip_start as usize }, replaced);
        }
    }
    (Decoding::Other, Vec::new())
}

/// The bytes of a byte-level token, or none if a character is outside the alphabet (an added token's plain text).
fn byte_level(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte_of_char).collect()
}

/// GPT-2's alphabet (`bytes_to_unicode`): printable Latin-1 bytes are themselves, the other 68 follow from U+0100.
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The character of a byte, the inverse of [`byte_of_char`].
pub(crate) fn char_of_byte(byte: u8) -> char {
    let code = match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u32::from(byte),
        0..=0x20 => 0x100 + u32::from(byte),
        0x7F..=0xA0 => 0x121 + u32::from(byte - 0x7F),
        0xAD => 0x143,
    };
    char::from_u32(code).expect("below the surrogates")
}

/// The byte of a token like `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_level_alphabet_is_a_bijection_on_bytes() {
        let mut seen: Vec<u8> = (0..=0x200).filter_map(char::from_u32).filter_map(byte_of_char).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert!((0..=255).all(|byte| byte_of_char(char_of_byte(byte)) == Some(byte)));
        assert_eq!(byte_level("Ġé"), Some(vec![b' ', 0xE9]));
    }

    #[test]
    fn byte_fallback_tokens_are_two_hexadecimal_digits() {
        assert_eq!(fallback_byte("<0xE2>"), Some(0xE2));
        for not in ["<0xE>", "<0x0E2>", "0xE2", "<0xZZ>", "<|x|>", "<0xé>"] {
            assert_eq!(fallback_byte(not), None, "{not}");
        }
    }
}
