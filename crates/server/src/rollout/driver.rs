//! Carries out what the policy decides. One thread owns the rollout, the journal and the engines of all generations,
//! and is told everything by messages (`control` has the other end); loading and judging a candidate happen beside it.
//!
//! Invariants: a transition that gives a candidate more is in the journal before it happens, and does not happen if it
//! cannot be; one that takes something away happens in any case. An engine is shut down only when no request that began
//! with it is left, and its memory is free before the next rollout begins.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use baton_http::{Admission, Retired, RolloutRefusal, Service};
use baton_model::Files;
use serde_json::{Map, Value};
use tracing::{info, warn};

use super::candidate::{self, Candidate, Serving, verdict};
use super::journal::{Journal, JournalError};
use super::plan::{Plan, PlanError};
use super::policy::{Action, Command, Event, Phase, Refused, Rollouts, Started, Step, Transition, Verdict};
use super::{commands, on_disk, room, status};
use crate::settings::Settings;

/// How often both generations are looked at.
const LOOK: Duration = Duration::from_millis(250);
/// How long the end of the process waits for generations that are being freed.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// What the thread is told.
pub(super) enum Message {
    Status(Sender<Value>),
    Command {
        command: String,
        body: Map<String, Value>,
        reply: Sender<Result<Value, RolloutRefusal>>,
    },
    Loaded(Box<Candidate>),
    LoadFailed {
        reason: String,
    },
    Gated(Verdict),
    /// The engine of a generation that was replaced or withdrawn has ended.
    Gone,
    /// No more candidates from now on.
    Drain,
    /// The service has ended.
    Stop,
}

impl From<Refused> for RolloutRefusal {
    fn from(refused: Refused) -> Self {
        Self::Conflict(refused.0)
    }
}

impl From<JournalError> for RolloutRefusal {
    fn from(error: JournalError) -> Self {
        Self::Failed(format!("nothing has changed, because the journal cannot be written: {error}"))
    }
}

/// What the thread has.
pub(super) struct Driver {
    pub service: Service,
    pub settings: Arc<Settings>,
    pub base: String,
    pub journal: Journal,
    pub runtime: tokio::runtime::Handle,
    pub messages: Sender<Message>,
    pub rollouts: Rollouts,
    /// `None` only while it is exchanged.
    pub serving: Option<Serving>,
    pub candidate: Option<Candidate>,
    pub epoch: Instant,
    pub draining: bool,
}

impl Driver {
    /// Until it is told to stop.
    pub fn run(&mut self, inbox: &Receiver<Message>) {
        let mut next_look = Instant::now() + LOOK;
        loop {
            match inbox.recv_timeout(next_look.saturating_duration_since(Instant::now())) {
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => return self.stop(inbox),
                Ok(message) => self.obey(message),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if Instant::now() >= next_look {
                self.look();
                next_look = Instant::now() + LOOK;
            }
        }
    }

    fn obey(&mut self, message: Message) {
        match message {
            Message::Status(reply) => {
                let _ = reply.send(self.status());
            }
            Message::Command { command, body, reply } => {
                let obeyed = self.command(&command, body).map(|()| self.status());
                let _ = reply.send(obeyed);
            }
            Message::Loaded(candidate) => {
                let generation = candidate.serving.generation.clone();
                self.candidate = Some(*candidate);
                match self.phase() {
                    Some(Phase::RollingBack) => self.withdraw(),
                    _ => self.event(Event::Loaded { generation }),
                }
            }
            Message::LoadFailed { reason } => self.event(Event::LoadFailed { reason }),
            Message::Gated(verdict) => {
                if let Some(candidate) = &mut self.candidate {
                    candidate.judged = true;
                }
                match self.phase() {
                    Some(Phase::RollingBack) => self.withdraw(),
                    _ => self.event(Event::Gated(verdict)),
                }
            }
            Message::Gone => self.event(Event::Gone),
            Message::Drain => {
                self.draining = true;
                // Refused when there is nothing to roll back.
                let _ = self.try_event(Event::Command(Command::Rollback { reason: "the server is stopping".into() }));
            }
            Message::Stop => unreachable!("ends the loop"),
        }
    }

    /// What serves, and what a candidate makes of its chance.
    fn look(&mut self) {
        if !self.phase().is_some_and(Phase::is_admitted) {
            return;
        }
        let (Some(observed), Some(candidate)) = (self.service.observed(), &self.candidate) else { return };
        let broken = match candidate.handoff.admission() {
            _ if !candidate.serving.handle.stats().alive => Some("the candidate's engine has stopped".to_owned()),
            Admission::Failed { reason } => Some(format!("the candidate's hand-off has failed: {reason}")),
            _ => None,
        };
        self.event(Event::Observed(status::observation(&observed, broken).into()));
    }

    fn phase(&self) -> Option<Phase> {
        self.rollouts.current.as_ref().map(|rollout| rollout.phase)
    }

    fn status(&self) -> Value {
        status::json(&self.rollouts, self.serving.as_ref(), self.journal.ledger(), self.epoch.elapsed())
    }

    fn command(&mut self, command: &str, body: Map<String, Value>) -> Result<(), RolloutRefusal> {
        if self.draining {
            return Err(stopping());
        }
        if command == "start" {
            return self.start(body);
        }
        let command = commands::read(command, body)?;
        if self.rollouts.current.is_none() {
            return Err(RolloutRefusal::Conflict("there is no rollout; start one first".into()));
        }
        self.try_event(Event::Command(command))
    }

    fn start(&mut self, body: Map<String, Value>) -> Result<(), RolloutRefusal> {
        let plan = Plan::parse(body)?;
        let (now, serving) = (self.epoch.elapsed(), self.serving.as_ref().expect("something serves"));
        let started = Started { base: self.base.clone(), names: serving.names.clone(), plan };
        let mut next = self.rollouts.clone();
        let mut step = next.start(started, now)?;
        // Now that no other candidate is there, its memory can be counted.
        let rollout = next.current.as_mut().expect("it has begun");
        let invalid = |reason: String| PlanError::new("model", reason);
        let path = rollout.started.plan.model.clone();
        let missing = || invalid(format!("{}: no such folder or .gguf file on the server", path.display()));
        let model = on_disk(&path).ok_or_else(missing)?;
        let free = room::free(serving.held);
        let files = Files::at(&model).map_err(|error| invalid(error.to_string()))?;
        room::check(&files, &self.settings, free).map_err(|error| invalid(format!("{}: {error:#}", path.display())))?;
        rollout.started.plan.model = model.clone();
        step.transitions = vec![Transition::Started(rollout.started.clone().into())];
        let id = next.last_id;
        self.record(id, &step)?;
        self.rollouts = next;
        self.load(model, free);
        Ok(())
    }

    /// Loads and judges a candidate, beside everything else.
    fn load(&self, model: PathBuf, free: Option<u64>) {
        let serving = self.serving.as_ref().expect("something serves");
        let (names, served) = (serving.names.clone(), serving.generation.clone());
        let (settings, runtime, messages) = (self.settings.clone(), self.runtime.clone(), self.messages.clone());
        let work = move || {
            let loaded = catch_unwind(AssertUnwindSafe(|| candidate::load(&settings, &model, names, &served, free)));
            let (candidate, gate) = match loaded {
                Ok(Ok(loaded)) => loaded,
                Ok(Err(error)) => return drop(messages.send(Message::LoadFailed { reason: format!("{error:#}") })),
                Err(_) => {
                    let reason = "a fault of the server while it was loaded".into();
                    return drop(messages.send(Message::LoadFailed { reason }));
                }
            };
            let _ = messages.send(Message::Loaded(Box::new(candidate)));
            let verdict = match catch_unwind(AssertUnwindSafe(|| gate.judge())) {
                Ok(gate) => {
                    let verdict = verdict(&gate);
                    if verdict.admitted {
                        runtime.spawn(gate.watch());
                    }
                    verdict
                }
                Err(_) => {
                    let summary = "a fault of the server while it was judged".into();
                    Verdict { admitted: false, summary, parity: None }
                }
            };
            let _ = messages.send(Message::Gated(verdict));
        };
        let spawned = thread::Builder::new().name("rollout-load".into()).spawn(work);
        if let Err(error) = spawned {
            let _ = self.messages.send(Message::LoadFailed { reason: error.to_string() });
        }
    }

    /// As [`try_event`](Self::try_event), for what nobody waits for.
    fn event(&mut self, event: Event) {
        // Both generations are looked at again soon; of what else is lost, nobody tells again.
        let again = matches!(event, Event::Observed(_));
        if let Err(refusal) = self.try_event(event) {
            warn!(?refusal, "a rollout does not go on");
            if !again {
                self.event(Event::Broken { reason: format!("{refusal:?}") });
            }
        }
    }

    fn try_event(&mut self, event: Event) -> Result<(), RolloutRefusal> {
        let mut next = self.rollouts.clone();
        let Some(rollout) = &mut next.current else { return Ok(()) };
        let (id, step) = (rollout.id, rollout.on(event, self.epoch.elapsed())?);
        self.record(id, &step)?;
        self.rollouts = next;
        for action in step.actions {
            if let Err(reason) = self.act(action) {
                self.event(Event::Broken { reason });
                break;
            }
        }
        Ok(())
    }

    /// Remembers and logs. On an error nothing must happen.
    fn record(&mut self, id: u64, step: &Step) -> Result<(), JournalError> {
        let takes = |t: &Transition| {
            matches!(t, Transition::RolledBack { .. } | Transition::Failed { .. } | Transition::Retired)
        };
        match step.transitions.as_slice() {
            [] => return Ok(()),
            taken if taken.iter().all(takes) => self.journal.note(id, taken),
            given => self.journal.append(id, given)?,
        }
        for transition in &step.transitions {
            let details = serde_json::to_value(transition).unwrap_or_default();
            let name = details["transition"].as_str().unwrap_or_default();
            info!(rollout = id, transition = name, details = %details["details"], "rollout");
        }
        Ok(())
    }

    fn act(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Stage => {
                let new = self.candidate.as_mut().and_then(|candidate| candidate.new.take());
                let new = new.ok_or("the candidate is gone")?;
                self.service.stage(new).map_err(|error| error.to_string())?;
            }
            Action::SetTraffic(traffic) => self.service.set_traffic(traffic).map_err(|error| error.to_string())?,
            Action::Promote => {
                let candidate = self.candidate.take().ok_or("the candidate is gone")?;
                let retired = self.service.promote().expect("the candidate was staged");
                let old = self.serving.replace(candidate.serving).expect("something serves");
                self.retire(retired, old);
            }
            Action::Withdraw => self.withdraw(),
        }
        Ok(())
    }

    /// Takes away what there is of a candidate. What is loading, or being judged, is taken away when that has ended.
    fn withdraw(&mut self) {
        match self.service.withdraw() {
            Ok(retired) => {
                let candidate = self.candidate.take().expect("what is staged was loaded");
                self.retire(retired, candidate.serving);
            }
            Err(_) => {
                let Some(candidate) = self.candidate.take_if(|candidate| candidate.judged) else {
                    // Its gate has nothing more to do.
                    self.candidate.iter().for_each(|candidate| candidate.serving.handle.shutdown());
                    return;
                };
                let Candidate { serving, new, .. } = candidate;
                let messages = self.messages.clone();
                self.runtime.spawn_blocking(move || {
                    drop(new);
                    serving.end();
                    let _ = messages.send(Message::Gone);
                });
            }
        }
    }

    /// Ends an engine when the last request that began with it has ended.
    fn retire(&self, retired: Retired, serving: Serving) {
        let messages = self.messages.clone();
        self.runtime.spawn(async move {
            retired.ended().await;
            drop(retired);
            let _ = tokio::task::spawn_blocking(move || serving.end()).await;
            let _ = messages.send(Message::Gone);
        });
    }

    /// The service has ended: so do all engines.
    fn stop(&mut self, inbox: &Receiver<Message>) {
        self.obey(Message::Drain);
        let give_up = Instant::now() + LAST_WAIT;
        // What is still loading is not waited for.
        while self.phase().is_some_and(|phase| !phase.is_terminal() && self.candidate_is_loaded(phase)) {
            match inbox.recv_timeout(give_up.saturating_duration_since(Instant::now())) {
                Ok(Message::Stop) => {}
                Ok(message) => self.obey(message),
                Err(_) => break,
            }
        }
        if let Some(serving) = self.serving.take() {
            serving.end();
        }
    }

    /// Something of a generation that does not serve is left, and will be gone soon.
    fn candidate_is_loaded(&self, phase: Phase) -> bool {
        phase == Phase::Promoting || self.rollouts.current.as_ref().is_some_and(|rollout| rollout.generation.is_some())
    }
}

/// No command is taken any more.
pub(super) fn stopping() -> RolloutRefusal {
    RolloutRefusal::Conflict("the server is stopping".into())
}
