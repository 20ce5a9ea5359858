//! From a checked request to events that a reply is made of.
//!
//! One pipeline serves chat and completions, streamed or not: [`submit`] turns prompts and parameters into engine
//! requests, [`Choices`] merge their outputs, and [`respond`] writes them. Dropping the choices at any point aborts what is
//! left of them in the engine.

mod chat;
mod choice;
mod choices;
mod grammar;
mod prompt;
mod respond;
mod submit;
mod tools;

pub(crate) use chat::{RenderedChat, StartedChat, render_chat, start_chat};
pub(crate) use choice::{Delta, Score, Tokens};
pub(crate) use choices::{Choices, Event, engine_failure};
pub(crate) use grammar::compile;
pub(crate) use prompt::{Echo, Encoding, Told, bad_words};
pub(crate) use respond::{Call, Output, respond, stream};
pub(crate) use submit::{Job, Reasoning, refusal, submit};
pub(crate) use tools::ToolCalls;
