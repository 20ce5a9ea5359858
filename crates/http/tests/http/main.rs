//! The service through real sockets: engine on the mock runner, tokenizer and template of the bundled model.

mod adapters;
mod admin;
mod generations;
mod handoff;
mod harness;
mod lifecycle;
mod operations;
mod refusals;
mod replies;
mod shadow;
mod structured;
mod tools;
