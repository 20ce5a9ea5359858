//! The OpenAI-compatible HTTP service.
//!
//! A request enters through [`serve`]'s accept loop and the layers in `routes`, becomes a checked request in
//! `openai` (other dialects, in `anthropic` and `responses`, translate theirs into a chat), choices of a generation in
//! `generate`, and leaves as one JSON object or as server-sent events. Invariants: every refusal is an error object, of
//! OpenAI's form but where a dialect has its own; nothing of a request is logged but its id, route, counts and times,
//! the name of its key, and that of an adapter that an admin loads; nothing of it is kept but what it asks for, in the [`Store`]; a
//! client that leaves ends its work in the engine, because everything of a request is owned by its response, unless it
//! asked for a response in the background.
//!
//! Absent on purpose: any knowledge of models, devices and the files of either, and of how a hand-off is judged. The
//! service is given generations, each an engine, a text model and a way to load adapters, the first perhaps long after
//! it began to answer probes, or an encoder instead; whoever gives them says which serves, and is told what a rollout
//! is judged by.

mod access;
mod adapters;
mod admission;
mod anthropic;
mod auth;
mod batches;
mod browsers;
mod cors;
mod dialect;
mod encoder;
mod error;
mod extract;
mod fields;
mod files;
mod generate;
mod generation;
mod generations;
mod handoff;
mod headers;
mod json;
mod keys;
mod limits;
mod metrics;
mod observed;
mod openai;
mod openapi;
mod page;
mod places;
mod pooled;
mod responses;
mod rollout;
mod routes;
mod scoring;
mod seldom;
mod serve;
mod service;
mod shadow;
mod slow;
mod sse;
mod stall;
mod store;
mod summary;
mod timeline;
mod tls;
mod trace_context;
mod usage;

pub use adapters::{AdapterRefusal, Adapters};
pub use browsers::{HostName, HostNameError};
pub use cors::{Origin, OriginError};
pub use encoder::{
    EncoderEngine, EncoderFailure, EncoderRefusal, EncoderReply, EncoderSpec, EncoderStats, EncoderTask, NewEncoder,
};
pub use generation::{Defaults, ModelCard, NewGeneration, Retired};
pub use generations::{Traffic, TransitionError};
pub use handoff::{Admission, HandoffState, Parity};
pub use keys::{ApiKey, ListedKey, Scopes};
pub use limits::KeyLimits;
pub use metrics::OutsideCounter;
pub use observed::{GenerationStats, Latencies, Observed, ShadowStats};
pub use pooled::{DecoderEmbeddings, DecoderPooling};
pub use rollout::{COMMANDS, RolloutControl, RolloutRefusal};
pub use routes::{Surface, router};
pub use serve::serve;
pub use service::{ConnectionLimits, Service, ServiceConfig};
pub use store::{Store, StoreLimits};
pub use summary::{Asked, Known, RequestObserver, RequestSummary};
pub use tls::{Tls, TlsError};
pub use trace_context::TraceContext;
pub use usage::OTHER as OTHER_KEYS;
