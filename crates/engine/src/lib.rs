//! Continuous batching over a paged cache: requests in, token streams out.
//!
//! [`spawn`] moves a [`Runner`] onto a thread of its own and returns an [`EngineHandle`]. Clients submit
//! [`Request`]s there and read [`OutputEvent`]s from an [`OutputStream`]; they never wait for each
//! other, and the engine never waits for them.

mod block;
mod block_manager;
mod cached;
mod constrain;
mod core;
mod engine;
mod handle;
mod intake;
mod rebuild;
mod request;
mod scheduler;
mod sequence;
mod shared;
mod speculate;
mod stats;
mod streams;
mod timeline;
mod watchdog;

pub mod sim;

pub use baton_fairness::{Share, Tenant};
pub use baton_model::{Adapter, Passing, RunError, RunSpec, Runner, SampledToken, SamplingParams};
pub use engine::{Engine, spawn, spawn_rebuildable};
pub use handle::{EngineConfig, EngineHandle, OutputStream};
pub use rebuild::Rebuild;
pub use request::{
    CacheScope, EngineFailure, FinishReason, HiddenStates, OutputEvent, PositionScore, PromptScores, Request,
    RequestId, SubmitError, Timings, Usage,
};
pub use shared::SharedRunner;
pub use speculate::{DraftMethod, SpeculationConfig, SpeculationStats};
pub use stats::{BlockStats, DeviceFailures, EngineStats, FinishedCounts, StepTokens};
pub use timeline::{RecordedSteps, StepRecord, StepRecording};
