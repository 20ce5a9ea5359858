//! From a checked request to events that a reply is made of.
//!
//! One pipeline serves chat and completions, streamed or not: [`submit`] turns prompts and parameters into engine
//! requests, a [`Generation`] merges their outputs, and [`respond`] writes them. Dropping a generation at any point
//! aborts what is left of it in the engine.

mod choice;
mod generation;
mod respond;
mod submit;

pub(crate) use choice::{Delta, Score};
pub(crate) use generation::{Event, Generation};
pub(crate) use respond::{Output, respond};
pub(crate) use submit::{Job, Reasoning, submit};
