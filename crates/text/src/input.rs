//! Texts for an encoder: one or a pair, with the special tokens that the tokenizer's own post-processor writes around them,
//! cut to a length.
//!
//! A text is tokenized once, as a [`TextPart`] that keeps no more of it than an input can hold, however many pairs it is
//! part of.

use tokenizers::utils::truncation::{TruncationDirection, TruncationParams, TruncationStrategy, truncate_encodings};
use tokenizers::{Encoding, PostProcessor};

use crate::{TextError, TextModel, library};

/// What an encoder reads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncoderInput {
    /// Token ids, special tokens included.
    pub ids: Vec<u32>,
    /// Which text of a pair each token is of, as the tokenizer says: 0 or 1. Of the length of `ids`.
    pub type_ids: Vec<u32>,
}

/// The first tokens of a text, without special ones.
#[derive(Clone)]
pub struct TextPart {
    encoding: Encoding,
    /// Of the whole text.
    tokens: usize,
}

impl TextModel {
    /// Tokenizes a text; what is behind its first `keep` tokens is only counted.
    ///
    /// # Errors
    /// [`TextError::Encode`] if the tokenizer cannot represent the text.
    pub fn part(&self, text: &str, keep: usize) -> Result<TextPart, TextError> {
        let encode = || {
            let mut encoding = self.tokenizer.encode_fast(text, false)?;
            let tokens = encoding.len();
            encoding.truncate(keep, 0, TruncationDirection::Right);
            encoding.take_overflowing();
            Ok(TextPart { encoding, tokens })
        };
        library::guarded(encode).map_err(TextError::Encode)
    }

    /// Tokens of a text or pair with its special ones, if nothing is cut.
    pub fn input_len(&self, first: &TextPart, second: Option<&TextPart>) -> usize {
        first.tokens + second.map_or(0, |second| second.tokens) + self.special_tokens(second.is_some())
    }

    /// A text, or a pair of texts, for an encoder. If more than `max_tokens` would come out, the texts are cut at their
    /// ends, the longer one first, and the special tokens stay. The parts have been told to keep as many at least.
    ///
    /// # Errors
    /// [`TextError::Encode`] if `max_tokens` does not hold the special tokens.
    pub fn input(
        &self,
        first: &TextPart,
        second: Option<&TextPart>,
        max_tokens: usize,
    ) -> Result<EncoderInput, TextError> {
        let join = || {
            let special = self.special_tokens(second.is_some());
            if let (Some((bos, eos)), None) = (self.around, second) {
                let room = max_tokens.checked_sub(special).ok_or("no room beside the special tokens")?;
                let ids = first.encoding.get_ids();
                let ids: Vec<u32> = bos.into_iter().chain(ids.iter().copied().take(room)).chain(eos).collect();
                return Ok(EncoderInput { type_ids: vec![0; ids.len()], ids });
            }
            let params = TruncationParams {
                max_length: max_tokens.checked_sub(special).ok_or("no room beside the special tokens")?,
                stride: 0,
                strategy: TruncationStrategy::LongestFirst,
                direction: TruncationDirection::Right,
            };
            let second = second.map(|second| {
                let mut encoding = second.encoding.clone();
                encoding.set_type_ids(vec![1; encoding.len()]);
                encoding
            });
            let (first, second) = truncate_encodings(first.encoding.clone(), second, &params)?;
            let encoding = self.tokenizer.post_process(first, second, true)?;
            Ok(EncoderInput { ids: encoding.get_ids().to_vec(), type_ids: encoding.get_type_ids().to_vec() })
        };
        library::guarded(join).map_err(TextError::Encode)
    }

    fn special_tokens(&self, pair: bool) -> usize {
        match self.around {
            Some((bos, eos)) if !pair => bos.into_iter().chain(eos).count(),
            _ => self.tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(pair)),
        }
    }
}
