//! The core of an engine with a mock runner, a clock of its own, and a journal of everything that
//! clients asked and got. After every change all invariants are checked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use baton_model::{RunError, RunSpec, Runner, StepOutput, StepPlan};
use parking_lot::Mutex;

use super::invariants;
use super::{MockControl, MockModel, MockRunner};
use crate::core::Core;
use crate::scheduler::RequestOutput;
use crate::{EngineConfig, FinishReason, OutputEvent, PositionScore, Request, RequestId, SubmitError, Usage};

/// See the head of the file.
pub(crate) struct World {
    pub core: Core,
    pub control: MockControl,
    pub spec: RunSpec,
    pub now: Duration,
    pub journal: BTreeMap<RequestId, Record>,
    pub last_step: LastStep,
    pub config: EngineConfig,
    /// Lengths of all drafts of steps that did not fail, and how much of each the client got.
    pub drafts: Vec<(usize, usize)>,
    model: MockModel,
    plans: Arc<Mutex<Option<StepPlan>>>,
}

/// One request as its client sees it.
pub(crate) struct Record {
    pub request: Request,
    pub group: RequestId,
    pub arrival: Duration,
    /// What it gives alone, `max_tokens` long.
    pub solo: Vec<u32>,
    /// What it got so far.
    pub tokens: Vec<u32>,
    /// As `solo` and `tokens`, of the scores that it asked for.
    pub solo_scores: Vec<PositionScore>,
    pub scores: Vec<PositionScore>,
    /// When it was first part of a step.
    pub started: Option<Duration>,
    pub end: Option<(FinishReason, Usage)>,
    pub events_after_end: usize,
    pub aborted: bool,
    /// Its own computation was told to go wrong, or it was part of a step that was.
    pub faulty: bool,
}

/// What the last step did, and the state it found.
#[derive(Default)]
pub(crate) struct LastStep {
    /// `None` if the runner was not called.
    pub plan: Option<StepPlan>,
    pub running_before: BTreeSet<RequestId>,
    /// The first waiting one.
    pub head_before: Option<RequestId>,
    pub available_before: usize,
    pub preemptions_before: u64,
}

/// Keeps the last plan.
struct Recorder {
    inner: MockRunner,
    plans: Arc<Mutex<Option<StepPlan>>>,
}

impl Runner for Recorder {
    fn spec(&self) -> &RunSpec {
        self.inner.spec()
    }

    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, RunError> {
        *self.plans.lock() = Some(plan.clone());
        self.inner.step(plan)
    }

    fn clear_blocks(&mut self, blocks: &[u32]) -> Result<(), RunError> {
        self.inner.clear_blocks(blocks)
    }
}

impl World {
    pub fn new(spec: RunSpec, config: &EngineConfig, model: MockModel) -> Self {
        let inner = MockRunner::new(spec.clone(), model.clone());
        let (control, plans) = (inner.control(), Arc::default());
        let runner = Recorder { inner, plans: Arc::clone(&plans) };
        Self {
            core: Core::new(Box::new(runner), config, [42; 32]),
            control,
            spec,
            now: Duration::ZERO,
            journal: BTreeMap::new(),
            last_step: LastStep::default(),
            config: config.clone(),
            drafts: Vec::new(),
            model,
            plans,
        }
    }

    /// Submits the choices of a request, if the engine could finish them.
    pub fn submit(&mut self, requests: Vec<Request>) -> Result<Vec<RequestId>, SubmitError> {
        requests.iter().try_for_each(|request| crate::handle::check(request, &self.spec))?;
        let group = RequestId(self.journal.len() as u64);
        let mut ids = Vec::new();
        for request in requests {
            let id = RequestId(self.journal.len() as u64);
            let record = Record {
                request: request.clone(),
                group,
                arrival: self.now,
                solo: self.model.solo(&request),
                tokens: Vec::new(),
                solo_scores: self.model.solo_scores(&request, self.spec.vocab_size),
                scores: Vec::new(),
                started: None,
                end: None,
                events_after_end: 0,
                aborted: false,
                faulty: false,
            };
            self.journal.insert(id, record);
            self.core.add(id, group, request, self.now);
            ids.push(id);
        }
        Ok(ids)
    }

    pub fn abort(&mut self, id: RequestId) {
        self.record_mut(id).aborted = true;
        // What the last step did was judged after it, and is no longer comparable.
        self.last_step = LastStep::default();
        let output = self.core.abort(id, self.now);
        self.note(output.into_iter().collect());
        self.check();
    }

    /// What the sequence computes from this position on is not finite.
    pub fn poison(&mut self, id: RequestId, position: usize) {
        self.record_mut(id).faulty = true;
        self.control.not_finite_from(id.0, position);
    }

    /// One step of the engine, and all checks.
    pub fn step(&mut self) {
        let (scheduler, stats) = (self.core.scheduler(), self.core.stats());
        let failed_before = stats.failed_steps;
        self.last_step = LastStep {
            plan: None,
            running_before: scheduler.running().keys().copied().collect(),
            head_before: scheduler.waiting().keys().next().copied(),
            available_before: stats.blocks.free + stats.blocks.cached,
            preemptions_before: stats.preemptions,
        };
        *self.plans.lock() = None;
        let now = self.now;
        let (mut outputs, plan) = self.core.plan(now);
        if !plan.sequences.is_empty() {
            outputs.extend(self.core.execute(&plan, &|| now));
        }
        self.last_step.plan = self.plans.lock().take();
        let failed = self.core.stats().failed_steps > failed_before;
        for id in self.last_step.planned() {
            let record = self.record_mut(id);
            record.started.get_or_insert(now);
            record.faulty |= failed;
        }
        if self.core.down().is_some() {
            self.journal.values_mut().for_each(|record| record.faulty |= record.end.is_none());
        }
        let drafted: Vec<(RequestId, usize, Vec<u32>)> = self
            .last_step
            .plan
            .iter()
            .flat_map(|plan| &plan.sequences)
            .filter(|step| !failed && !step.draft.is_empty())
            .map(|step| (RequestId(step.id), self.record(RequestId(step.id)).tokens.len(), step.draft.clone()))
            .collect();
        self.note(outputs);
        for (id, known, draft) in drafted {
            let record = self.record(id);
            let stop = match record.end {
                Some((FinishReason::Stop { token }, _)) => Some(token),
                _ => None,
            };
            let got = record.tokens[known..].iter().copied().chain(stop);
            self.drafts.push((draft.len(), got.zip(&draft).take_while(|(token, draft)| token == *draft).count()));
        }
        self.check();
    }

    /// Steps until nothing is left to do.
    pub fn run(&mut self) {
        // Far beyond what any run here needs: it bounds starvation, not speed.
        for _ in 0..100_000 {
            if self.core.is_idle() {
                return;
            }
            self.step();
        }
        panic!("the engine does not come to an end");
    }

    pub fn note(&mut self, outputs: Vec<RequestOutput>) {
        for RequestOutput { id, event } in outputs {
            let record = self.journal.get_mut(&id).expect("events are for accepted requests");
            if record.end.is_some() {
                record.events_after_end += 1;
            }
            match event {
                OutputEvent::PromptScores(scores) => {
                    assert!(record.tokens.is_empty() && !scores.is_empty(), "scores come before tokens");
                    record.scores.extend(scores);
                }
                OutputEvent::Token { token, .. } => record.tokens.push(token),
                OutputEvent::Finished { reason, usage, .. } => record.end = Some((reason, usage)),
            }
        }
    }

    /// # Panics
    /// If an invariant does not hold.
    pub fn check(&self) {
        for invariant in invariants::ALL {
            if let Err(why) = (invariant.check)(self) {
                panic!("invariant `{}` is broken: {why}", invariant.name);
            }
        }
    }

    pub fn record(&self, id: RequestId) -> &Record {
        &self.journal[&id]
    }

    pub fn record_mut(&mut self, id: RequestId) -> &mut Record {
        self.journal.get_mut(&id).expect("the request was accepted")
    }

    /// How a request ended.
    pub fn end(&self, id: RequestId) -> &FinishReason {
        &self.record(id).end.as_ref().expect("the request has ended").0
    }

    /// Prompt tokens that the request found in the cache.
    pub fn cached_tokens(&self, id: RequestId) -> usize {
        self.record(id).end.as_ref().expect("the request has ended").1.cached_tokens
    }
}

impl LastStep {
    pub fn planned(&self) -> BTreeSet<RequestId> {
        self.plan.iter().flat_map(|plan| &plan.sequences).map(|step| RequestId(step.id)).collect()
    }
}
