//! The thread that computes, and the handle through which it is asked.
//!
//! One batch is computed at a time; the library spreads it over all cores. Invariant: every request that was taken up gets
//! exactly one reply, unless its client has left.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use baton_fairness::Share;
use parking_lot::{Condvar, Mutex};

use crate::backlog::{Backlog, BatchLimits};
use crate::encoder::{Encoder, EncoderSpec, Input};
use crate::error::{RunError, SubmitError};

/// Tokens of a batch: matrix products gain little from more, and others wait for its end.
const BATCH_TOKENS: usize = 1024;
/// Elements of the attention weights of a batch, per layer: 128 MiB.
const BATCH_ATTENTION: usize = 1 << 25;

/// Who waits for a result.
pub trait Reply: Send {
    /// Whether somebody still does.
    fn wanted(&self) -> bool;
    /// Takes the result: one vector per input, in their order.
    fn send(self: Box<Self>, result: Result<Vec<Vec<f32>>, RunError>);
}

/// How much may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests.
    pub requests: usize,
    /// Tokens of all their inputs. A request that finds nothing waiting is taken up whatever its size.
    pub tokens: usize,
}

/// Counts so far, and what is under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncoderStats {
    /// Requests without a result yet.
    pub requests: usize,
    /// Tokens of inputs that wait.
    pub waiting_tokens: usize,
    /// Inputs that were computed.
    pub inputs: u64,
    /// Tokens of these.
    pub tokens: u64,
    /// Batches that they were computed in.
    pub batches: u64,
    /// Requests that failed in the computation.
    pub failed: u64,
    /// Whether requests are taken up.
    pub alive: bool,
}

struct Owner {
    reply: Box<dyn Reply>,
    deadline: Option<Instant>,
}

#[derive(Default)]
struct State {
    backlog: Backlog<Owner>,
    stats: EncoderStats,
    closed: bool,
}

struct Shared {
    encoder: Encoder,
    limits: Limits,
    state: Mutex<State>,
    /// Something waits, or the end has come.
    changed: Condvar,
}

/// Asks the worker. Clones ask the same one.
#[derive(Clone)]
pub struct EncoderHandle(Arc<Shared>);

/// The thread; it ends when this is dropped, after the batch that it computes.
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Panics
    /// If the system gives no thread.
    pub fn start(encoder: Encoder, limits: Limits) -> (EncoderHandle, Self) {
        let state = Mutex::new(State::default());
        let shared = Arc::new(Shared { encoder, limits, state, changed: Condvar::new() });
        let thread = thread::Builder::new().name("encoder".into()).spawn({
            let shared = shared.clone();
            move || shared.work()
        });
        let thread = Some(thread.expect("the system gives a thread"));
        (EncoderHandle(shared.clone()), Self { shared, thread })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // Panics of the computation are caught inside.
            let _ = thread.join();
        }
    }
}

impl EncoderHandle {
    /// What the encoder takes and gives.
    pub fn spec(&self) -> &EncoderSpec {
        self.0.encoder.spec()
    }

    /// Has inputs computed, at least one, when it is this share's turn. `deadline`: when the first of them must have begun.
    ///
    /// # Errors
    /// An input that cannot be computed, or too much that waits.
    pub fn submit(
        &self,
        inputs: Vec<Input>,
        share: Share,
        deadline: Option<Instant>,
        reply: Box<dyn Reply>,
    ) -> Result<(), SubmitError> {
        if inputs.is_empty() {
            return Err(SubmitError::Empty { index: 0 });
        }
        self.0.encoder.check(&inputs)?;
        let tokens: usize = inputs.iter().map(|input| input.ids.len()).sum();
        let mut state = self.0.state.lock();
        if state.closed {
            return Err(SubmitError::Stopped);
        }
        let (requests, waiting) = (state.backlog.len(), state.backlog.tokens());
        if requests >= self.0.limits.requests || (waiting > 0 && waiting + tokens > self.0.limits.tokens) {
            return Err(SubmitError::QueueFull);
        }
        state.backlog.push(inputs, share, Owner { reply, deadline });
        drop(state);
        self.0.changed.notify_all();
        Ok(())
    }

    /// Counts so far.
    pub fn stats(&self) -> EncoderStats {
        let state = self.0.state.lock();
        let (requests, waiting_tokens) = (state.backlog.len(), state.backlog.tokens());
        EncoderStats { requests, waiting_tokens, alive: !state.closed, ..state.stats }
    }
}

impl Shared {
    fn work(&self) {
        let limits = BatchLimits { tokens: BATCH_TOKENS, attention: BATCH_ATTENTION, heads: self.encoder.heads() };
        loop {
            let (batch, expired) = {
                let mut state = self.state.lock();
                while !state.closed && state.backlog.tokens() == 0 {
                    self.changed.wait(&mut state);
                }
                if state.closed {
                    break;
                }
                state.backlog.remove(|owner, _| !owner.reply.wanted());
                let now = Instant::now();
                let late = |owner: &Owner, untouched| untouched && owner.deadline.is_some_and(|at| at < now);
                let expired = state.backlog.remove(late);
                (state.backlog.batch(&limits), expired)
            };
            expired.into_iter().for_each(|owner| owner.reply.send(Err(RunError::Expired)));
            if batch.is_empty() {
                continue;
            }
            let (places, inputs): (Vec<_>, Vec<Input>) = batch.into_iter().unzip();
            let outputs = self.compute(&inputs);
            let mut state = self.state.lock();
            state.stats.batches += 1;
            state.stats.inputs += inputs.len() as u64;
            state.stats.tokens += inputs.iter().map(|input| input.ids.len() as u64).sum::<u64>();
            let done: Vec<_> = places
                .into_iter()
                .zip(outputs)
                .filter_map(|(place, output)| state.backlog.done(place, output))
                .collect();
            state.stats.failed += done.iter().filter(|(_, result)| result.is_err()).count() as u64;
            drop(state);
            done.into_iter().for_each(|(owner, result)| owner.reply.send(result));
        }
        let left = self.state.lock().backlog.remove(|_, _| true);
        left.into_iter().for_each(|owner| owner.reply.send(Err(RunError::Stopped)));
    }

    /// A result per input. Where a batch fails as a whole, each is tried alone, so that none fails for another.
    fn compute(&self, inputs: &[Input]) -> Vec<Result<Vec<f32>, RunError>> {
        let run = |batch: &[&Input]| {
            let run = catch_unwind(AssertUnwindSafe(|| self.encoder.run(batch)));
            run.unwrap_or(Err(RunError::Failed))
        };
        match run(&inputs.iter().collect::<Vec<_>>()) {
            Ok(outputs) => outputs,
            Err(error) if inputs.len() == 1 => vec![Err(error)],
            Err(_) => inputs.iter().map(|input| run(&[input]).and_then(|mut outputs| outputs.remove(0))).collect(),
        }
    }
}
