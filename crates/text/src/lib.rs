//! Text on both sides of a model: tokenizer, chat template, detokenisation, stop strings, reasoning, calls of tools.
//!
//! The crate is given bytes and values: it opens no file, asks no clock and knows nothing of the engine or of HTTP.
//! Before the model, [`TextModel`] renders a chat with the checkpoint's template and encodes it; behind it, each
//! output runs through a [`Detokenizer`], a [`StopMatcher`], for a thinking model a [`ReasoningSplitter`], and where
//! tools may be called a [`ToolSplitter`]. Each of them takes pieces of any size and yields the same joined text however its input was cut. For an
//! encoder, which answers with numbers, [`TextModel::part`] and [`TextModel::input`] are all.

mod config;
mod convert;
mod detokenize;
mod error;
mod gguf;
mod input;
mod json;
mod library;
mod model;
mod pycompat;
mod reasoning;
mod sandbox;
mod sentencepiece;
mod stop;
mod template;
mod tiktoken;
mod tools;
mod vocab;

#[cfg(test)]
mod testing;

pub use detokenize::Detokenizer;
pub use error::TextError;
pub use gguf::GgufVocab;
pub use input::{EncoderInput, TextPart};
pub use model::{TextFiles, TextModel, TokenizerFile};
pub use reasoning::{ReasoningMarkers, ReasoningSplitter, Segment};
pub use stop::{StopMatcher, StopOutcome};
pub use template::{ChatInput, MAX_RENDERED_BYTES, MAX_TEMPLATE_BYTES};
pub use tools::{ToolSplitter, ToolSyntax};
