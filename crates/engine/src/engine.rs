//! The engine thread: reads commands at its own pace, takes steps while there is work, sleeps when
//! there is none, and hands events to the streams without ever waiting for a reader: what a stream
//! buffers is bounded by what its request asked for: `max_tokens`, and the scores of its prompt.
//!
//! Invariant: whatever happens to the thread, every accepted request gets its `Finished` event.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use baton_model::Runner;
use crossbeam_channel::{Receiver, unbounded};
use parking_lot::Mutex;
use rand::TryRngCore;
use rand::rngs::OsRng;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use crate::constrain::MaskPool;
use crate::core::Core;
use crate::handle::{Command, EngineConfig, EngineHandle, Gate, Shared};
use crate::scheduler::RequestOutput;
use crate::{EngineFailure, EngineStats, FinishReason, OutputEvent, RequestId, Timings, Usage};

/// Threads that compute masks of grammars, at most: they take cores from the forward pass.
const MAX_MASK_THREADS: usize = 2;

/// The engine thread, to be joined.
pub struct Engine {
    thread: JoinHandle<()>,
}

impl Engine {
    /// Waits for the thread to end: after [`EngineHandle::shutdown`], when the engine gave up on its
    /// runner, or when the last handle and stream are gone.
    pub fn join(self) {
        // The thread catches its own panics; there is nothing to pass on.
        let _ = self.thread.join();
    }
}

/// Starts the engine on its own thread.
///
/// # Panics
/// If the system gives no thread or no random numbers: then there is no engine to report it.
pub fn spawn(runner: Box<dyn Runner>, config: EngineConfig) -> (EngineHandle, Engine) {
    let (sender, commands) = unbounded();
    let mut secret = [0; 32];
    OsRng.try_fill_bytes(&mut secret).expect("the system gives random numbers");
    let spec = runner.spec().clone();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let core = Core::new(runner, &config, secret, MaskPool::new(cores.min(MAX_MASK_THREADS)));
    let shared = Arc::new(Shared {
        spec,
        max_queued: config.max_queued,
        epoch: Instant::now(),
        gate: Mutex::new(Gate::default()),
        left_queue: [const { AtomicU64::new(0) }; 2],
        stats: Mutex::new(EngineStats { alive: true, ..core.stats() }),
        step_started: Mutex::new(None),
        drained: watch::Sender::new(false),
    });
    let mut thread = EngineThread {
        core,
        shared: shared.clone(),
        commands,
        streams: BTreeMap::new(),
        stop: None,
        draining: false,
        dropped_events: 0,
        last_step: Duration::ZERO,
    };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || thread.run());
    (EngineHandle { shared, commands: sender }, Engine { thread: thread.expect("the system gives a thread") })
}

struct EngineThread {
    core: Core,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    /// One per accepted request that has not ended.
    streams: BTreeMap<RequestId, UnboundedSender<OutputEvent>>,
    /// Set when there is to be no further step.
    stop: Option<EngineFailure>,
    draining: bool,
    dropped_events: u64,
    last_step: Duration,
}

impl EngineThread {
    fn run(&mut self) {
        let end = catch_unwind(AssertUnwindSafe(|| self.work()));
        if end.is_err() {
            tracing::error!("the engine thread panicked");
            self.stop = Some(EngineFailure::Panicked);
        }
        self.close(end.is_ok());
    }

    fn now(&self) -> Duration {
        self.shared.epoch.elapsed()
    }

    /// Until told to stop, or nobody can tell anything any more.
    fn work(&mut self) {
        while self.stop.is_none() {
            if self.core.is_idle() {
                self.publish_stats();
                if self.draining {
                    self.shared.drained.send_replace(true);
                }
                match self.commands.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => return,
                }
            }
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command);
            }
            if self.stop.is_none() && !self.core.is_idle() {
                self.step();
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submissions) => {
                for submission in submissions {
                    self.streams.insert(submission.id, submission.events);
                    self.core.add(submission.id, submission.group, submission.request, submission.arrival);
                }
            }
            Command::Abort(id) => {
                let output = self.core.abort(id, self.now());
                self.deliver(output.into_iter().collect());
            }
            Command::Drain => self.draining = true,
            Command::Shutdown => self.stop = Some(EngineFailure::ShuttingDown),
            #[cfg(test)]
            Command::Panic => panic!("as the test commands"),
        }
    }

    fn step(&mut self) {
        let (expired, plan) = self.core.plan(self.now());
        self.deliver(expired);
        if plan.sequences.is_empty() {
            return;
        }
        let (epoch, start) = (self.shared.epoch, Instant::now());
        *self.shared.step_started.lock() = Some(start);
        let outputs = self.core.execute(&plan, &|| epoch.elapsed());
        *self.shared.step_started.lock() = None;
        self.last_step = start.elapsed();
        self.stop = self.core.down().cloned();
        self.deliver(outputs);
    }

    /// Statistics first: whoever sees its request finished sees it counted as well.
    fn deliver(&mut self, outputs: Vec<RequestOutput>) {
        self.publish_stats();
        for RequestOutput { id, event } in outputs {
            let finished = matches!(event, OutputEvent::Finished { .. });
            let stream = self.streams.get(&id).expect("only requests that have not ended have output");
            if stream.send(event).is_err() {
                self.dropped_events += 1;
            }
            if finished {
                self.streams.remove(&id);
            }
        }
    }

    fn publish_stats(&self) {
        for (shared, left_queue) in self.shared.left_queue.iter().zip(self.core.left_queue()) {
            shared.store(left_queue, Ordering::Release);
        }
        *self.shared.stats.lock() = EngineStats {
            alive: self.stop.is_none(),
            dropped_events: self.dropped_events,
            last_step: self.last_step,
            ..self.core.stats()
        };
    }

    /// Lets nothing in any more and ends what is left. `sound`: whether the core can be asked to.
    fn close(&mut self, sound: bool) {
        let failure = self.stop.get_or_insert(EngineFailure::ShuttingDown).clone();
        self.shared.gate.lock().down = true;
        for command in self.commands.try_iter().collect::<Vec<_>>() {
            if let Command::Submit(submissions) = command {
                for submission in submissions {
                    self.streams.insert(submission.id, submission.events);
                    if sound {
                        self.core.add(submission.id, submission.group, submission.request, submission.arrival);
                    }
                }
            }
        }
        if sound {
            let outputs = self.core.fail_all(&failure, self.now());
            self.deliver(outputs);
        } else {
            self.shared.stats.lock().alive = false;
            for stream in std::mem::take(&mut self.streams).into_values() {
                let reason = FinishReason::Error(failure.clone());
                let (usage, timings) = (Usage::default(), Timings::default());
                // A client that has left needs no news.
                let _ = stream.send(OutputEvent::Finished { reason, usage, timings });
            }
        }
        *self.shared.step_started.lock() = None;
        self.shared.drained.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use baton_model::{RunSpec, SamplingParams};

    use super::*;
    use crate::sim::{MockModel, MockRunner};
    use crate::{Request, SubmitError};

    #[test]
    fn a_panic_of_the_engine_itself_still_ends_every_request() {
        let spec = RunSpec {
            vocab_size: 10,
            max_model_len: 100,
            block_size: 4,
            num_blocks: 100,
            max_step_tokens: 16,
            max_step_sequences: 2,
            max_draft_tokens: 0,
        };
        let runner = MockRunner::new(spec, MockModel::Hash { seed: 1, vocab_size: 10, end: None });
        let control = runner.control();
        control.hang();
        let (handle, engine) = spawn(Box::new(runner), EngineConfig::default());
        let request = || Request::new(vec![1, 2, 3], SamplingParams::default(), 90);
        let mut streams = vec![handle.submit(request()).unwrap()];
        while handle.stats().step_under_way.is_none() {
            std::thread::yield_now();
        }
        streams.extend((0..3).map(|_| handle.submit(request()).unwrap()));
        handle.commands.send(Command::Panic).unwrap();
        // Behind the panic in the channel, so the thread never gets to read it as usual.
        streams.push(handle.submit(request()).unwrap());
        control.release();
        for mut stream in streams {
            let last = std::iter::from_fn(|| stream.blocking_next()).last();
            let panicked = FinishReason::Error(EngineFailure::Panicked);
            assert!(matches!(last, Some(OutputEvent::Finished { reason, .. }) if reason == panicked));
        }
        engine.join();
        assert!(!handle.stats().alive);
        assert_eq!(handle.submit(request()).err(), Some(SubmitError::EngineDown));
    }
}
