//! The service through real sockets: engine on the mock runner, tokenizer and template of the bundled model.

mod adapters;
mod admin;
mod anthropic;
mod batches;
mod dialect_tools;
mod encoders;
mod faults;
mod generations;
mod handoff;
mod harness;
mod lifecycle;
mod observe;
mod operations;
mod origins;
mod params;
mod refusals;
mod replies;
mod responses;
mod rules;
mod shadow;
mod stored;
mod structured;
mod tokens;
mod tools;
mod wires;
