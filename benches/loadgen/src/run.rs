//! Sends calls at their times, no more than so many at once, and keeps what each gave.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};

use crate::{CallError, Client, Mode, Reply};

/// A call to be made.
#[derive(Debug, Clone)]
pub struct Planned {
    /// When it arrives, from the start of the run.
    pub at: Duration,
    /// Its JSON body.
    pub body: Value,
    /// Prompt tokens asked for, counted where the server gives no usage.
    pub prompt_len: u64,
}

/// The calls of a run, in order of arrival, and how they are sent.
#[derive(Debug, Clone)]
pub struct Load {
    /// Where to, `/v1/completions`.
    pub path: String,
    /// What.
    pub calls: Vec<Planned>,
    /// Calls in flight at most; those that arrive beyond wait their turn.
    pub max_concurrency: Option<usize>,
    /// How the replies come back.
    pub mode: Mode,
}

/// A call that ended.
#[derive(Debug)]
pub struct Call {
    /// From the start of the run to its arrival.
    pub at: Duration,
    /// From the start of the run to its sending.
    pub sent: Duration,
    /// Prompt tokens asked for.
    pub prompt_len: u64,
    /// What it gave.
    pub result: Result<Reply, CallError>,
}

/// What a run gave.
#[derive(Debug)]
pub struct Run {
    /// The calls that ended, in order of arrival.
    pub calls: Vec<Call>,
    /// Calls that had not ended when the run was stopped.
    pub unfinished: usize,
    /// Wall time of the whole run.
    pub duration: Duration,
}

/// Counts that move while a run goes on.
#[derive(Debug, Default)]
pub struct Live {
    /// Calls sent.
    pub sent: AtomicU64,
    /// Calls that ended well.
    pub completed: AtomicU64,
    /// Calls that did not.
    pub failed: AtomicU64,
    /// Chunks that carried text.
    pub chunks: AtomicU64,
}

/// Makes the calls of `load`, until all have ended or `stop` is ready, which drops those in flight.
pub async fn run(client: &Client, load: Load, live: &Arc<Live>, stop: impl Future<Output = ()>) -> Run {
    let Load { path, calls, max_concurrency, mode } = load;
    let planned = calls.len();
    let permits = Arc::new(Semaphore::new(max_concurrency.unwrap_or(Semaphore::MAX_PERMITS)));
    let (done, mut ended) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    let start = Instant::now();
    let all = async {
        for (i, Planned { at, body, prompt_len }) in calls.into_iter().enumerate() {
            tokio::time::sleep_until((start + at).into()).await;
            // Taken here and not in the task: calls are sent in order of arrival.
            let permit = permits.clone().acquire_owned().await.expect("never closed");
            let (client, path, live, done) = (client.clone(), path.clone(), live.clone(), done.clone());
            tasks.spawn(async move {
                let sent = start.elapsed();
                live.sent.fetch_add(1, Relaxed);
                let result = match mode {
                    Mode::Streamed => {
                        client.stream_watched(&path, body, || _ = live.chunks.fetch_add(1, Relaxed)).await
                    }
                    Mode::Whole => client.whole(&path, &body).await,
                };
                let counter = if result.is_ok() { &live.completed } else { &live.failed };
                counter.fetch_add(1, Relaxed);
                drop(permit);
                // Nobody listens once the run was stopped.
                let _ = done.send((i, Call { at, sent, prompt_len, result }));
            });
        }
        while let Some(task) = tasks.join_next().await {
            task.expect("a call does not panic");
        }
    };
    tokio::select! {
        () = all => {}
        () = stop => {}
    }
    let duration = start.elapsed();
    let mut calls = Vec::with_capacity(planned);
    while let Ok(call) = ended.try_recv() {
        calls.push(call);
    }
    calls.sort_by_key(|(i, _)| *i);
    let calls: Vec<Call> = calls.into_iter().map(|(_, call)| call).collect();
    Run { unfinished: planned - calls.len(), calls, duration }
}
