//! The engine as its clients see it: submit requests, read their events, watch it and stop it.
//!
//! Acceptance is decided here, at once, under one lock: what [`EngineHandle::submit`] accepts reaches
//! the engine in the order of its ids, and will get its one `Finished` event.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use baton_model::RunSpec;
use crossbeam_channel::Sender;
use parking_lot::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use crate::intake::{Amount, Intake, Limits, SharedAmount};
use crate::streams::Streams;
use crate::timeline::{StepRecording, Timeline};
use crate::{EngineStats, OutputEvent, Request, RequestId, SpeculationConfig, SubmitError};

/// Limits of the engine. Those that exceed what the runner can do are lowered to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Sequences that run at once, at most.
    pub max_num_seqs: usize,
    /// Tokens of one step, at most. Never fewer sequences run than can each have a token of it.
    pub max_num_batched_tokens: usize,
    /// Accepted requests that have not started, at most; those of the background are counted apart, up to the same
    /// number. A group with more choices is never accepted.
    pub max_queued: usize,
    /// Tokens of their prompts, at most, counted in the same way; `None` for any number. What waits alone may have more.
    pub max_queued_tokens: Option<usize>,
    /// Keep computed blocks for later requests with the same prefix.
    pub enable_prefix_caching: bool,
    /// Part of the name of every cached block, whatever its scope: a digest of all that decides what is computed.
    pub cache_namespace: Vec<u8>,
    /// Drafts, if there are to be any. They change no output.
    pub speculation: Option<SpeculationConfig>,
    /// Steps that may fail in a row before the engine gives up on the runner.
    pub max_failed_steps: u32,
    /// Runners that may be loaded in the place of a broken one, in a row and without a step between, before the engine
    /// gives up; for [`crate::spawn_rebuildable`].
    pub max_rebuilds: u32,
    /// How long a step may take before the device counts as hung and the engine gives up; `None`: for ever.
    pub device_timeout: Option<Duration>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 64,
            max_num_batched_tokens: 2048,
            max_queued: 1024,
            max_queued_tokens: None,
            enable_prefix_caching: true,
            cache_namespace: Vec::new(),
            speculation: None,
            max_failed_steps: 3,
            max_rebuilds: 3,
            device_timeout: None,
        }
    }
}

/// What clients tell the engine thread.
pub(crate) enum Command {
    /// New requests, in the order of their ids; the choices of one request together.
    Submit(Vec<Submission>),
    Abort(RequestId),
    Drain,
    Shutdown,
    /// A bug of our own.
    #[cfg(test)]
    Panic,
}

/// One accepted request on its way to the engine.
pub(crate) struct Submission {
    pub id: RequestId,
    /// The first id of the group in its class.
    pub group: RequestId,
    pub request: Request,
    /// When it was accepted, since `Shared::epoch`.
    pub arrival: Duration,
    pub events: UnboundedSender<OutputEvent>,
}

/// State that the engine thread and all handles share.
pub(crate) struct Shared {
    pub spec: RunSpec,
    /// What may wait, of each class.
    pub queue: Limits,
    /// Times in the engine are durations since this moment.
    pub epoch: Instant,
    pub gate: Mutex<Gate>,
    /// What has started, or ended without starting: of the foreground, and of the background.
    pub left_queue: [SharedAmount; 2],
    pub stats: Mutex<EngineStats>,
    pub streams: Mutex<Streams>,
    /// Since when the step is under way whose end is the next: its begin, or the end of the one before it if that is later.
    pub step_started: Mutex<Option<Instant>>,
    pub timeline: Timeline,
    /// True once nothing is in flight and nothing new will come.
    pub drained: watch::Sender<bool>,
}

/// What decides acceptance. The lock is held while a command is sent, so that nothing enters the
/// channel behind a `Drain`, or after the engine thread has emptied it for the last time.
#[derive(Default)]
pub(crate) struct Gate {
    /// Of the foreground, and of the background.
    pub intake: [Intake; 2],
    pub draining: bool,
    pub down: bool,
}

/// A handle on a running engine; clones are the same engine. When the last handle and stream are gone,
/// the engine stops.
#[derive(Clone)]
pub struct EngineHandle {
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: Sender<Command>,
}

impl EngineHandle {
    /// What the runner can do.
    pub fn spec(&self) -> &RunSpec {
        &self.shared.spec
    }

    /// Queues a request. Never blocks; a refusal is immediate and final.
    pub fn submit(&self, request: Request) -> Result<OutputStream, SubmitError> {
        Ok(self.submit_group(vec![request])?.remove(0))
    }

    /// Queues the `n` choices of one request: all of them or none, each counted. They should have the
    /// same prompt and scope: while one computes it, the others wait, to share its blocks.
    pub fn submit_group(&self, requests: Vec<Request>) -> Result<Vec<OutputStream>, SubmitError> {
        for request in &requests {
            check(request, &self.shared.spec)?;
        }
        let mut gate = self.shared.gate.lock();
        if gate.down {
            return Err(SubmitError::EngineDown);
        }
        if gate.draining {
            return Err(SubmitError::Draining);
        }
        let arrival = self.shared.epoch.elapsed();
        // The next ids of each class.
        let groups = gate.intake.each_ref().map(|intake| intake.accepted.requests);
        let wanted = [false, true]
            .map(|background| Amount::of(requests.iter().filter(|request| request.background == background)));
        for ((intake, left), wanted) in gate.intake.iter_mut().zip(&self.shared.left_queue).zip(wanted) {
            intake.check(self.shared.queue, left.load(), wanted, arrival)?;
        }
        gate.intake.iter_mut().zip(wanted).for_each(|(intake, wanted)| intake.accept(wanted));

        let mut next = groups;
        let mut submissions = Vec::with_capacity(requests.len());
        let mut streams = Vec::with_capacity(requests.len());
        for request in requests {
            let (class, background) = (usize::from(request.background), request.background);
            let group = RequestId::nth(groups[class], background);
            let id = RequestId::nth(next[class], background);
            next[class] += 1;
            let (sender, receiver) = unbounded_channel();
            submissions.push(Submission { id, group, request, arrival, events: sender });
            streams.push(OutputStream {
                id,
                events: receiver,
                commands: self.commands.clone(),
                ended: AtomicBool::new(false),
            });
        }
        // The receiver outlives `down`, so a command sent under the gate is always read.
        self.commands.send(Command::Submit(submissions)).map_err(|_| SubmitError::EngineDown)?;
        Ok(streams)
    }

    /// A snapshot, as of the last time something started, advanced or ended.
    pub fn stats(&self) -> EngineStats {
        let mut stats = self.shared.stats.lock().clone();
        stats.step_under_way = self.shared.step_started.lock().map(|start| start.elapsed());
        stats
    }

    /// Records what each step does from now on, in memory for the `capacity` newest; `None` while somebody else does.
    pub fn record_steps(&self, capacity: usize) -> Option<StepRecording> {
        StepRecording::begin(&self.shared, capacity)
    }

    /// How long it takes, at the pace of late, until there is room in the queue for what was refused for want of it. For
    /// any other refusal, or none, until all that waits has begun.
    pub fn room_in(&self, refusal: Option<&SubmitError>) -> Duration {
        let gate = self.shared.gate.lock();
        gate.intake[0].room_in(refusal, self.shared.left_queue[0].load(), self.shared.epoch.elapsed())
    }

    /// Takes no new requests from now on; those accepted finish.
    pub fn drain(&self) {
        let mut gate = self.shared.gate.lock();
        gate.draining = true;
        // A send can only fail when the engine is down, which is drained as well.
        let _ = self.commands.send(Command::Drain);
    }

    /// Waits until the engine, after [`drain`](Self::drain) or [`shutdown`](Self::shutdown) or because
    /// it is down, has nothing in flight.
    pub async fn drained(&self) {
        // The sender lives in `shared`, so this cannot fail.
        let _ = self.shared.drained.subscribe().wait_for(|drained| *drained).await;
    }

    /// Ends what is in flight with [`crate::EngineFailure::ShuttingDown`], after the step under way,
    /// and stops the engine.
    pub fn shutdown(&self) {
        let mut gate = self.shared.gate.lock();
        gate.draining = true;
        let _ = self.commands.send(Command::Shutdown);
    }
}

/// Whether the engine could ever finish the request.
pub(crate) fn check(request: &Request, spec: &RunSpec) -> Result<(), SubmitError> {
    let (prompt, max_tokens) = (request.prompt.len(), request.max_tokens);
    if prompt == 0 {
        return Err(SubmitError::PromptEmpty);
    }
    if max_tokens == 0 {
        return Err(SubmitError::MaxTokensZero);
    }
    let num_tokens = prompt.saturating_add(max_tokens as usize);
    if num_tokens > spec.max_model_len {
        return Err(SubmitError::TooLong { prompt, max_tokens, max_model_len: spec.max_model_len });
    }
    let targets = request.prompt_scores.iter().flat_map(|scores| &scores.targets);
    if let Some((&position, _)) = targets.clone().last().filter(|(position, _)| **position >= prompt) {
        return Err(SubmitError::ScoreBeyondPrompt { position, prompt });
    }
    let mut ids = request.prompt.iter().chain(targets.flat_map(|(_, ids)| ids));
    if let Some(&id) = ids.find(|&&id| id as usize >= spec.vocab_size) {
        return Err(SubmitError::TokenOutOfRange { id, vocab: spec.vocab_size });
    }
    // The last token generated is never computed.
    let (needed_blocks, total_blocks) = ((num_tokens - 1).div_ceil(spec.block_size), spec.num_blocks);
    if needed_blocks > total_blocks {
        return Err(SubmitError::DoesNotFit { needed_blocks, total_blocks });
    }
    Ok(())
}

/// The events of one request. Dropping it aborts the request, and its blocks are free before the
/// next step.
pub struct OutputStream {
    id: RequestId,
    events: UnboundedReceiver<OutputEvent>,
    commands: Sender<Command>,
    /// Finished, or told to abort: another abort would tell the engine nothing.
    ended: AtomicBool,
}

impl OutputStream {
    /// The engine's number for the request.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The next event; `None` after `Finished`. Cancel-safe.
    pub async fn next(&mut self) -> Option<OutputEvent> {
        let event = self.events.recv().await;
        self.note(event)
    }

    /// As [`next`](Self::next), for a thread that may block.
    pub fn blocking_next(&mut self) -> Option<OutputEvent> {
        let event = self.events.blocking_recv();
        self.note(event)
    }

    /// Asks the engine to end the request. It ends with `Aborted`, unless it had already ended.
    pub fn abort(&self) {
        if !self.ended.swap(true, Ordering::Relaxed) {
            // A send can only fail when the engine is down, and then the request has ended.
            let _ = self.commands.send(Command::Abort(self.id));
        }
    }

    fn note(&self, event: Option<OutputEvent>) -> Option<OutputEvent> {
        if let Some(OutputEvent::Finished { .. }) = event {
            self.ended.store(true, Ordering::Relaxed);
        }
        event
    }
}

impl Drop for OutputStream {
    fn drop(&mut self) {
        self.abort();
    }
}
