//! Encoders: models that read a whole text at once and answer with an embedding of it, or with the score of a pair.
//!
//! BERT and RoBERTa in all their sizes, on candle-transformers and the CPU. [`Encoder::load`] makes one from a checkpoint
//! whose files a [`Source`] gives, as sentence-transformers would: its pooling, its normalisation, its longest text. A
//! [`Worker`] computes the requests of many tenants in turn, and batches what is alike in length.
//!
//! Results are those of the text alone up to the rounding of float32: batch mates may change the last bits, since matrix
//! products come from a library that promises no order. Nothing here knows tokenizers, HTTP or an async runtime.

mod backlog;
mod config;
mod encoder;
mod error;
mod network;
mod pooling;
mod source;
mod weights;
mod worker;

pub use baton_fairness::{Share, Tenant};
pub use config::{Architecture, Family, Task};
pub use encoder::{Encoder, EncoderSpec, Input, LoadOptions};
pub use error::{LoadError, RunError, SubmitError};
pub use pooling::Pooling;
pub use source::{Source, TensorInfo};
pub use worker::{EncoderHandle, EncoderStats, Limits, Reply, Worker};
