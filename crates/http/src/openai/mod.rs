//! The wire types of the OpenAI-compatible endpoints: requests as they are read, replies as they are written.
//!
//! Nothing here knows of axum, the engine or the tokenizer's work; a request that leaves this module is within every
//! range that does not depend on the model.

pub(crate) mod chat;
pub(crate) mod chat_request;
pub(crate) mod completion;
pub(crate) mod embedding;
pub(crate) mod list;
pub(crate) mod list_params;
pub(crate) mod messages;
pub(crate) mod metadata;
pub(crate) mod models;
pub(crate) mod params;
pub(crate) mod rerank;
pub(crate) mod shared;
pub(crate) mod structured;
pub(crate) mod thinking;
pub(crate) mod tokens;
pub(crate) mod tools;
