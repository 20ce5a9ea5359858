//! Token ids to text, one at a time.
//!
//! Invariants: the joined output equals [`TextModel::decode`](crate::TextModel::decode) of the same ids (for decoders
//! outside the two families of `vocab::Decoding`, as long as a token's text depends on its near neighbours only);
//! no half character is ever sent; a token costs its own length, not the output's.

use std::fmt;
use std::sync::Arc;

use tokenizers::Tokenizer;

use crate::library;
use crate::vocab::{Decoding, Vocab};

const REPLACEMENT: char = '\u{FFFD}';

/// Turns one output's tokens into text that may be sent at once.
pub struct Detokenizer {
    vocab: Arc<Vocab>,
    skip_special_tokens: bool,
    /// Sent in any case.
    keep: Arc<[u32]>,
    state: State,
}

enum State {
    Bytes {
        /// The beginning of a character: at most three bytes.
        pending: Vec<u8>,
    },
    ByteFallback {
        /// Byte tokens since the last other token. They are text together or not at all, so they wait for its end.
        run: Vec<u8>,
        /// Spaces still to be taken off the beginning.
        strip: usize,
    },
    Other(Window),
}

impl Detokenizer {
    pub(crate) fn new(vocab: Arc<Vocab>, tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        let state = match vocab.decoding {
            Decoding::Bytes => State::Bytes { pending: Vec::new() },
            Decoding::ByteFallback { strip_start } => State::ByteFallback { run: Vec::new(), strip: strip_start },
            Decoding::Other => State::Other(Window { tokenizer, ids: Vec::new(), sent: 0 }),
        };
        Self { vocab, skip_special_tokens, keep: Arc::default(), state }
    }

    /// Never skips these tokens.
    pub(crate) fn keeping(self, keep: Arc<[u32]>) -> Self {
        Self { keep, ..self }
    }

    /// Takes the next token and returns the text that may be sent now, often empty. An id outside the vocabulary has
    /// no text.
    pub fn push(&mut self, id: u32) -> String {
        if !self.vocab.is_shown(id, self.skip_special_tokens) && !self.keep.contains(&id) {
            return String::new();
        }
        let Some(token) = self.vocab.get(id) else { return String::new() };
        match &mut self.state {
            State::Bytes { pending } => {
                pending.extend_from_slice(&token.bytes);
                take_utf8(pending)
            }
            State::ByteFallback { run, .. } if token.byte_fallback => {
                run.extend_from_slice(&token.bytes);
                String::new()
            }
            State::ByteFallback { run, strip } => {
                let mut text = take_run(run);
                text.push_str(&String::from_utf8_lossy(&token.bytes));
                strip_spaces(text, strip)
            }
            State::Other(window) => window.push(id),
        }
    }

    /// The output has ended: sends what was held, an incomplete character as U+FFFD.
    pub fn flush(&mut self) -> String {
        match &mut self.state {
            State::Bytes { pending } => String::from_utf8_lossy(&std::mem::take(pending)).into_owned(),
            State::ByteFallback { run, strip } => strip_spaces(take_run(run), strip),
            State::Other(window) => window.flush(),
        }
    }
}

impl fmt::Debug for Detokenizer {
    // Without the text it holds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detokenizer").field("decoding", &self.vocab.decoding).finish_non_exhaustive()
    }
}

/// Takes all complete characters, with U+FFFD for each maximal sequence that cannot become one, and leaves the
/// beginning of a character (what Python's incremental decoder does with `errors="replace"`).
fn take_utf8(pending: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut rest = &pending[..];
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = after;
                match error.error_len() {
                    Some(len) => {
                        text.push(REPLACEMENT);
                        rest = &rest[len..];
                    }
                    None => break,
                }
            }
        }
    }
    let held = rest.len();
    pending.drain(..pending.len() - held);
    text
}

/// The text of a finished run of byte tokens.
fn take_run(run: &mut Vec<u8>) -> String {
    String::from_utf8(std::mem::take(run)).unwrap_or_else(|e| REPLACEMENT.to_string().repeat(e.as_bytes().len()))
}

/// Takes leading spaces off while some are due; the first other character ends that.
fn strip_spaces(text: String, strip: &mut usize) -> String {
    if *strip == 0 || text.is_empty() {
        return text;
    }
    let spaces = text.bytes().take(*strip).take_while(|&b| b == b' ').count();
    *strip = if spaces == text.len() { *strip - spaces } else { 0 };
    text[spaces..].to_owned()
}

/// Decodes over a short window for decoders whose rule is only known to the `tokenizers` crate: a token's text is
/// what it adds to the decoding of the tokens just before it.
struct Window {
    tokenizer: Arc<Tokenizer>,
    /// The last tokens sent, as context, then those not sent yet.
    ids: Vec<u32>,
    sent: usize,
}

impl Window {
    /// An unfinished character is held for this many tokens at most: no character takes more.
    const MAX_HELD: usize = 16;

    fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        if self.decode(self.ids.len()).ends_with(REPLACEMENT) && self.ids.len() - self.sent < Self::MAX_HELD {
            return String::new();
        }
        self.flush()
    }

    fn flush(&mut self) -> String {
        let before = self.decode(self.sent);
        let now = self.decode(self.ids.len());
        self.ids.drain(..self.sent);
        self.sent = self.ids.len();
        let common = before.char_indices().zip(now.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
        now[common.unwrap_or(before.len()).min(now.len())..].to_owned()
    }

    fn decode(&self, end: usize) -> String {
        library::decode(&self.tokenizer, &self.ids[..end])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn incremental_utf8_equals_lossy_decoding_of_the_whole(
            bytes in prop::collection::vec(prop::sample::select(vec![
                b'a', 0x80, 0xBF, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xED, 0xA0, 0xFF, 0xC0,
            ]), 0..24),
            piece in 1usize..4,
        ) {
            let (mut pending, mut text) = (Vec::new(), String::new());
            for chunk in bytes.chunks(piece) {
                pending.extend_from_slice(chunk);
                text.push_str(&take_utf8(&mut pending));
                prop_assert!(pending.len() <= 3);
            }
            text.push_str(&String::from_utf8_lossy(&pending));
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
