//! A load generator for OpenAI-compatible servers: a client that streams one call and times its
//! tokens, workloads, arrival schedules, and a loop that keeps a number of calls in flight.
//!
//! Invariant: a call counts as served only if its stream ended with a finish reason and `[DONE]`;
//! a clean close alone is an error, because a server that dies looks like that.

mod client;
pub mod evaluation;
mod local;
mod machine;
pub mod plot;
mod report;
mod run;
mod schedule;
mod sse;
pub mod sweep;
mod table;
mod workload;

pub use client::{CallError, Client, Reply, Target};
pub use local::{LocalServer, free_port, resident_mib};
pub use machine::processor;
pub use report::{Objectives, Quantiles, Report, median};
pub use run::{Call, Live, Load, Planned, Run, run};
pub use schedule::arrivals;
pub use workload::{Endpoint, Form, Prompt, Random, Request, read_requests};

use std::{sync::Arc, time::Duration};

use serde_json::Value;

/// How a reply comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As server-sent events, each token timed.
    Streamed,
    /// In one piece; its first token is its last.
    Whole,
}

/// Sends `bodies` to `path`, `concurrency` at a time, the next when one ended. Replies come in the
/// order of `bodies`.
pub async fn closed_loop(target: &Target, path: &str, bodies: Vec<Value>, concurrency: usize, mode: Mode) -> Report {
    let max_concurrency = Some(concurrency.max(1));
    let calls = bodies.into_iter().map(|body| Planned { at: Duration::ZERO, body, prompt_len: 0 }).collect();
    let load = Load { path: path.to_owned(), calls, max_concurrency, mode };
    let run = run(&Client::new(target.clone()), load, &Arc::default(), std::future::pending()).await;
    Report::new(run, max_concurrency, Objectives::default())
}
