//! The engine thread: reads commands at its own pace, takes steps while there is work, sleeps when
//! there is none, and hands events to the streams without ever waiting for a reader: what a stream
//! buffers is bounded by what its request asked for: `max_tokens`, and the scores of its prompt.
//!
//! Invariant: whatever happens to the thread, every accepted request gets its `Finished` event.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use baton_model::Runner;
use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use parking_lot::Mutex;
use rand::TryRngCore;
use rand::rngs::OsRng;
use tokio::sync::watch;

use crate::constrain::MaskPool;
use crate::core::Core;
use crate::handle::{Command, EngineConfig, EngineHandle, Gate, Shared, Submission};
use crate::intake::Limits;
use crate::rebuild::{self, Rebuild};
use crate::scheduler::RequestOutput;
use crate::streams::Streams;
use crate::timeline::Timeline;
use crate::watchdog::{self, Never};
use crate::{EngineFailure, EngineStats};

/// Threads that compute masks of grammars, at most: they take cores from the forward pass.
const MAX_MASK_THREADS: usize = 2;

/// How often deadlines are looked at while another runner is loaded.
const LOOK: Duration = Duration::from_millis(100);

/// The engine thread, to be joined.
pub struct Engine {
    thread: JoinHandle<()>,
    /// Ends with the thread, or gives true and has given the thread up.
    watchdog: Option<JoinHandle<bool>>,
}

impl Engine {
    /// Waits for the thread to end: after [`EngineHandle::shutdown`], when the engine gave up on its
    /// runner, or when the last handle and stream are gone. A thread whose step hangs is left to itself.
    pub fn join(self) {
        let hung = self.watchdog.is_some_and(|watchdog| watchdog.join().unwrap_or(false));
        if !hung {
            // The thread catches its own panics; there is nothing to pass on.
            let _ = self.thread.join();
        }
    }
}

/// Starts the engine on its own thread.
///
/// # Panics
/// If the system gives no thread or no random numbers: then there is no engine to report it.
pub fn spawn(runner: Box<dyn Runner>, config: EngineConfig) -> (EngineHandle, Engine) {
    start(runner, None, config)
}

/// As [`spawn`], with a way to load another runner in the place of one that breaks.
///
/// # Panics
/// As [`spawn`].
pub fn spawn_rebuildable(runner: Box<dyn Runner>, rebuild: Rebuild, config: EngineConfig) -> (EngineHandle, Engine) {
    start(runner, Some(rebuild), config)
}

fn start(runner: Box<dyn Runner>, rebuild: Option<Rebuild>, config: EngineConfig) -> (EngineHandle, Engine) {
    let (sender, commands) = unbounded();
    let mut secret = [0; 32];
    OsRng.try_fill_bytes(&mut secret).expect("the system gives random numbers");
    let spec = runner.spec().clone();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let masks = MaskPool::new(cores.min(MAX_MASK_THREADS));
    let core = Core::new(runner, rebuild.is_some(), &config, secret, masks);
    let shared = Arc::new(Shared {
        spec,
        queue: Limits { requests: config.max_queued, tokens: config.max_queued_tokens },
        epoch: Instant::now(),
        gate: Mutex::new(Gate::default()),
        left_queue: Default::default(),
        stats: Mutex::new(EngineStats { alive: true, ..core.stats() }),
        streams: Mutex::new(Streams::default()),
        step_started: Mutex::new(None),
        timeline: Timeline::default(),
        drained: watch::Sender::new(false),
    });
    let (alive, ended) = bounded(0);
    let watchdog = config.device_timeout.map(|timeout| {
        let (shared, commands) = (shared.clone(), commands.clone());
        let watch = move || watchdog::watch(&shared, &commands, &ended, timeout);
        std::thread::Builder::new().name("engine-watchdog".into()).spawn(watch).expect("the system gives a thread")
    });
    let mut thread = EngineThread {
        core,
        rebuild,
        shared: shared.clone(),
        commands,
        stop: None,
        draining: false,
        dropped_events: 0,
        last_step: Duration::ZERO,
        _alive: alive,
    };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || thread.run());
    let thread = thread.expect("the system gives a thread");
    (EngineHandle { shared, commands: sender }, Engine { thread, watchdog })
}

struct EngineThread {
    core: Core,
    rebuild: Option<Rebuild>,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    /// Set when there is to be no further step.
    stop: Option<EngineFailure>,
    draining: bool,
    dropped_events: u64,
    last_step: Duration,
    /// Tells the watchdog when the thread ends.
    _alive: Sender<Never>,
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
            if self.core.is_broken() {
                if !self.replace_runner() {
                    return;
                }
                continue;
            }
            if self.core.is_idle() {
                self.rest();
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

    /// Nothing is to be done.
    fn rest(&mut self) {
        self.publish_stats();
        if self.draining {
            self.shared.drained.send_replace(true);
        }
    }

    /// Has another runner loaded in the place of the broken one, and goes on with everything but steps meanwhile. False
    /// if nobody can tell anything any more.
    fn replace_runner(&mut self) -> bool {
        let rebuild = self.rebuild.clone().expect("a runner is broken only if there can be another");
        let rebuilt = rebuild::begin(self.core.take_runner(), rebuild, self.core.rebuilds_in_a_row());
        while self.stop.is_none() {
            let expired = self.core.expire(self.now());
            self.deliver(expired);
            if self.core.is_idle() {
                self.rest();
            }
            select! {
                recv(self.commands) -> command => match command {
                    Ok(command) => self.obey(command),
                    Err(_) => return false,
                },
                recv(rebuilt) -> rebuilt => {
                    let rebuilt = rebuilt.unwrap_or_else(|_| Err("there is no thread to load it on".into()));
                    let outputs = self.core.install(rebuilt, self.now());
                    self.stop = self.core.down().cloned();
                    self.deliver(outputs);
                    return true;
                }
                default(LOOK) => {}
            }
        }
        true
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submissions) => {
                for Submission { id, group, request, arrival, events } in submissions {
                    self.shared.streams.lock().insert(id, events);
                    if let Some(refused) = self.core.add(id, group, request, arrival, self.now()) {
                        self.deliver(vec![refused]);
                    }
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
        if self.core.is_idle() {
            return;
        }
        let epoch = self.shared.epoch;
        let start = *self.shared.step_started.lock().get_or_insert_with(Instant::now);
        let outputs = self.core.execute(plan, &|| epoch.elapsed());
        let end = Instant::now();
        // A step that was begun ahead has had the device to itself since then.
        *self.shared.step_started.lock() = self.core.is_under_way().then_some(end);
        self.last_step = end - start;
        self.shared.timeline.record(start - epoch..end - epoch, || self.core.stats());
        // The watchdog has ended everything if the step took too long.
        let given_up = self.shared.streams.lock().sealed().cloned();
        self.stop = given_up.or_else(|| self.core.down().cloned());
        self.deliver(outputs);
    }

    /// Statistics first: whoever sees its request finished sees it counted as well. And whoever sees that there will be no more
    /// steps is refused from then on.
    fn deliver(&mut self, outputs: Vec<RequestOutput>) {
        if self.stop.is_some() {
            self.shared.gate.lock().down = true;
        }
        self.publish_stats();
        let mut streams = self.shared.streams.lock();
        let lost = outputs.into_iter().map(|output| streams.send(output)).filter(|sent| !sent).count();
        self.dropped_events += lost as u64;
    }

    fn publish_stats(&self) {
        for (shared, left_queue) in self.shared.left_queue.iter().zip(self.core.left_queue()) {
            shared.store(left_queue);
        }
        let mut stats = self.shared.stats.lock();
        // Whoever gave the thread up has the last word: it comes to these statistics behind the streams.
        if self.shared.streams.lock().sealed().is_some() {
            return;
        }
        *stats = EngineStats {
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
            match command {
                Command::Submit(submissions) if sound => self.obey(Command::Submit(submissions)),
                Command::Submit(submissions) => {
                    let mut streams = self.shared.streams.lock();
                    submissions.into_iter().for_each(|submission| streams.insert(submission.id, submission.events));
                }
                _ => {}
            }
        }
        if sound {
            let outputs = self.core.fail_all(&failure, self.now());
            self.deliver(outputs);
        } else {
            let mut stats = self.shared.stats.lock();
            let mut streams = self.shared.streams.lock();
            // What clients were told stands.
            let told = streams.sealed().unwrap_or(&failure).clone();
            (stats.alive, stats.failure) = (false, Some(told));
            drop(stats);
            streams.seal(&failure);
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
    use crate::{FinishReason, OutputEvent, Request, SubmitError};

    #[test]
    fn a_panic_of_the_engine_itself_still_ends_every_request() {
        let spec = RunSpec {
            vocab_size: 10,
            max_model_len: 100,
            block_size: 4,
            num_blocks: 100,
            passing: None,
            max_step_tokens: 16,
            max_step_sequences: 2,
            max_draft_tokens: 0,
            steps_ahead: false,
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
