//! The OpenAI-compatible HTTP service.
//!
//! A request enters through [`serve`]'s accept loop and the layers in `routes`, becomes a checked request in
//! `openai`, a generation in `generate`, and leaves as one JSON object or as server-sent events. Invariants: every
//! refusal is an OpenAI error object; nothing of a request is kept or logged but its id, route, counts and times, and
//! the name of an adapter that an admin loads; a client that leaves ends its work in the engine, because everything of
//! a request is owned by its response.
//!
//! Absent on purpose: any knowledge of models, devices and files. The service is given an engine, a text model and a
//! way to load adapters, perhaps long after it began to answer probes.

mod access;
mod adapters;
mod admission;
mod auth;
mod error;
mod extract;
mod fields;
mod generate;
mod json;
mod metrics;
mod openai;
mod routes;
mod serve;
mod service;
mod sse;

pub use adapters::{AdapterRefusal, Adapters};
pub use auth::ApiKey;
pub use routes::router;
pub use serve::serve;
pub use service::{Defaults, ModelCard, Service, ServiceConfig};
