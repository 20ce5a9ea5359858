//! Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`.
//!
//! A request is translated into a chat, and runs as one. Thinking is what the model's template and markers make of it: blocks
//! carry a signature that says nothing, and any signature is accepted back. Prompts are cached by themselves:
//! `cache_control` is accepted everywhere without effect, and `input_tokens` counts the whole prompt. Errors have
//! Anthropic's form on these routes, whoever raises them.

mod errors;
mod messages;
mod reply;
mod request;

pub(crate) use errors::{ROUTES, layer};
pub(crate) use reply::MessageFormat;
pub(crate) use request::{MessageRequest, their_name};
