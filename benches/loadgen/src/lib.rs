//! A load generator for OpenAI-compatible servers: a client that streams one call and times its
//! tokens, and a closed loop that keeps a number of calls in flight.
//!
//! Invariant: a call counts as served only if its stream ended with a finish reason and `[DONE]`;
//! a clean close alone is an error, because a server that dies looks like that.

mod client;
mod local;
mod report;
mod sse;

pub use client::{Client, Reply, Target};
pub use local::LocalServer;
pub use report::{Quantiles, Report};

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Instant,
};

use serde_json::Value;

/// How a reply comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As server-sent events, each token timed.
    Streamed,
    /// In one piece; its first token is its last.
    Whole,
}

/// Sends `bodies` to `path`, `concurrency` at a time, each worker taking the next when its last one
/// ended. Replies come in the order of `bodies`.
pub async fn closed_loop(target: &Target, path: &str, bodies: Vec<Value>, concurrency: usize, mode: Mode) -> Report {
    let total = bodies.len();
    let queue: Arc<Mutex<VecDeque<(usize, Value)>>> = Arc::new(Mutex::new(bodies.into_iter().enumerate().collect()));
    let start = Instant::now();
    let workers: Vec<_> = (0..concurrency.max(1))
        .map(|_| {
            let (queue, client, path) = (queue.clone(), Client::new(target.clone()), path.to_owned());
            tokio::spawn(async move {
                let mut replies = Vec::new();
                loop {
                    let Some((i, body)) = queue.lock().expect("no holder panics").pop_front() else { break };
                    let reply = match mode {
                        Mode::Streamed => client.stream(&path, body).await,
                        Mode::Whole => client.whole(&path, &body).await,
                    };
                    replies.push((i, reply));
                }
                replies
            })
        })
        .collect();
    let mut replies: Vec<Option<anyhow::Result<Reply>>> = (0..total).map(|_| None).collect();
    for worker in workers {
        for (i, reply) in worker.await.expect("a worker does not panic") {
            replies[i] = Some(reply);
        }
    }
    let replies = replies.into_iter().map(|r| r.expect("every call was taken")).collect();
    Report::new(concurrency, start.elapsed(), replies)
}
