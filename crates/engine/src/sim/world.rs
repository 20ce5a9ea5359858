//! The core of an engine with a mock runner, a clock of its own, and a journal of everything that
//! clients asked and got. After every change all invariants are checked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use baton_model::{RunError, RunSpec, Runner, SequenceStep, StepOutput, StepPlan, Tokens};
use parking_lot::Mutex;

use super::fairness::Fairness;
use super::invariants;
use super::{MockControl, MockModel, MockRunner};
use crate::constrain::MaskPool;
use crate::core::Core;
use crate::scheduler::{OUTPUT_TOKEN, PROMPT_TOKEN, RequestOutput};
use crate::sequence::{Class, Rank};
use crate::{EngineConfig, FinishReason, OutputEvent, PositionScore, Rebuild, Request, RequestId, SubmitError, Usage};

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
    /// Times a background sequence lost its blocks to the foreground.
    pub displaced: usize,
    /// Tokens that steps computed for sequences which had ended since the step was begun, and how many of these were not
    /// finite.
    pub in_vain: usize,
    pub spoilt_in_vain: usize,
    /// Steps begun ahead in which a prompt went on.
    pub prompts_ahead: usize,
    pub fairness: Fairness,
    /// Only what looks at the last step alone is checked after it: the others take ever longer.
    pub is_long: bool,
    /// The step under way.
    begun_ahead: Option<StepPlan>,
    model: MockModel,
    plans: Plans,
    rebuild: Rebuild,
}

/// Those that the runner was given and that the world has not looked at, in their order.
type Plans = Arc<Mutex<Vec<StepPlan>>>;

/// One request as its client sees it.
pub(crate) struct Record {
    pub request: Request,
    pub group: RequestId,
    pub arrival: Duration,
    /// What it gives alone, `max_tokens` long.
    pub solo: Vec<u32>,
    /// What it got so far.
    pub tokens: Vec<u32>,
    /// Tokens of its prompt that steps computed or that were cached, from the first on.
    pub prompt_done: usize,
    /// As `solo` and `tokens`, of the scores that it asked for.
    pub solo_scores: Vec<PositionScore>,
    pub scores: Vec<PositionScore>,
    /// When it was first part of a step.
    pub started: Option<Duration>,
    pub end: Option<(FinishReason, Usage)>,
    pub events_after_end: usize,
    pub aborted: bool,
    /// What it computes from there on is not finite.
    pub poisoned_from: Option<usize>,
    /// Its own computation was told to go wrong, or it was part of a step that was.
    pub faulty: bool,
}

/// What the last step did, and the state it found.
#[derive(Default)]
pub(crate) struct LastStep {
    /// `None` if the runner was not given one, perhaps because a step was under way.
    pub plan: Option<StepPlan>,
    /// The plan behind the step under way, if the runner was given one.
    pub ahead: Option<StepPlan>,
    /// Of both classes.
    pub holders: BTreeSet<RequestId>,
    /// What `plan` found.
    pub before: Found,
    /// What `ahead` found.
    pub before_ahead: Found,
}

/// What a plan finds of the class whose turn it is.
#[derive(Default)]
pub(crate) struct Found {
    pub running: BTreeSet<RequestId>,
    /// The first that waits.
    pub head: Option<RequestId>,
    /// Blocks that the class could have.
    pub available: usize,
    /// Whether a step is under way.
    pub under_way: bool,
}

/// Keeps the plans.
struct Recorder {
    inner: Box<dyn Runner>,
    plans: Plans,
}

impl Runner for Recorder {
    fn spec(&self) -> &RunSpec {
        self.inner.spec()
    }

    fn begin(&mut self, plan: &StepPlan) -> Result<(), RunError> {
        self.plans.lock().push(plan.clone());
        self.inner.begin(plan)
    }

    fn finish(&mut self) -> Result<StepOutput, RunError> {
        self.inner.finish()
    }

    fn clear_blocks(&mut self, kept: &[u32], passing: &[u32]) -> Result<(), RunError> {
        self.inner.clear_blocks(kept, passing)
    }
}

impl World {
    pub fn new(spec: RunSpec, config: &EngineConfig, model: MockModel) -> Self {
        Self::with_mask_threads(0, spec, config, model)
    }

    /// As `new`, with threads that compute masks: they decide no output, and so a seed still replays a run.
    pub fn with_mask_threads(threads: usize, spec: RunSpec, config: &EngineConfig, model: MockModel) -> Self {
        let inner = MockRunner::new(spec.clone(), model.clone());
        let (control, rebuild, plans) = (inner.control(), inner.rebuild(), Arc::default());
        let runner = Recorder { inner: Box::new(inner), plans: Arc::clone(&plans) };
        Self {
            core: Core::new(Box::new(runner), true, config, [42; 32], MaskPool::new(threads)),
            control,
            spec,
            now: Duration::ZERO,
            journal: BTreeMap::new(),
            last_step: LastStep::default(),
            config: config.clone(),
            drafts: Vec::new(),
            displaced: 0,
            in_vain: 0,
            spoilt_in_vain: 0,
            prompts_ahead: 0,
            fairness: Fairness::default(),
            is_long: false,
            begun_ahead: None,
            model,
            plans,
            rebuild,
        }
    }

    /// Submits the choices of a request, all of one class, if the engine could finish them.
    pub fn submit(&mut self, requests: Vec<Request>) -> Result<Vec<RequestId>, SubmitError> {
        requests.iter().try_for_each(|request| crate::handle::check(request, &self.spec))?;
        let mut ids: Vec<RequestId> = Vec::new();
        for request in requests {
            let class = self.journal.keys().filter(|id| id.is_background() == request.background);
            let id = RequestId::nth(class.count() as u64, request.background);
            let group = *ids.first().unwrap_or(&id);
            let record = Record {
                request: request.clone(),
                group,
                arrival: self.now,
                solo: self.model.solo(&request),
                tokens: Vec::new(),
                prompt_done: 0,
                solo_scores: self.model.solo_scores(&request, self.spec.vocab_size),
                scores: Vec::new(),
                started: None,
                end: None,
                events_after_end: 0,
                aborted: false,
                poisoned_from: None,
                faulty: false,
            };
            self.journal.insert(id, record);
            let refused = self.core.add(id, group, request, self.now, self.now);
            self.note(refused.into_iter().collect());
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
        let record = self.record_mut(id);
        (record.faulty, record.poisoned_from) = (true, Some(position));
        self.control.not_finite_from(id.0, position);
    }

    /// Has another runner loaded in the place of the broken one, if it can be.
    pub fn rebuild(&mut self) {
        drop(self.core.take_runner());
        let rebuilt = (self.rebuild)()
            .map(|inner| -> Box<dyn Runner> { Box::new(Recorder { inner, plans: Arc::clone(&self.plans) }) });
        self.last_step = LastStep::default();
        let outputs = self.core.install(rebuilt, self.now);
        if self.core.down().is_some() {
            self.journal.values_mut().for_each(|record| record.faulty |= record.end.is_none());
        }
        self.note(outputs);
        self.check();
    }

    /// One step of the engine, or another runner in the place of a broken one; and all checks.
    pub fn step(&mut self) {
        if self.core.is_broken() {
            return self.rebuild();
        }
        let failed_before = self.core.stats().failed_steps;
        self.last_step = LastStep {
            holders: self.core.scheduler().running().keys().copied().collect(),
            before: self.found(),
            ..LastStep::default()
        };
        let now = self.now;
        let (mut outputs, plan) = self.core.plan(now);
        self.last_step.before_ahead = self.found();
        let ending = self.begun_ahead.take();
        let gone = |step: &&SequenceStep| !self.core.scheduler().running().contains_key(&RequestId(step.id));
        let in_vain: Vec<_> = ending.iter().flat_map(|plan| &plan.sequences).filter(gone).collect();
        for step in in_vain {
            let poisoned_from = self.record(RequestId(step.id)).poisoned_from;
            let end = step.num_computed + step.tokens.count();
            self.in_vain += step.tokens.count();
            self.spoilt_in_vain += end.saturating_sub(poisoned_from.unwrap_or(end).max(step.num_computed));
        }
        let scheduled: Vec<RequestId> = plan.sequences.iter().map(|step| RequestId(step.id)).collect();
        if !self.core.is_idle() {
            outputs.extend(self.core.execute(plan, &|| now));
        }
        let plans = std::mem::take(&mut *self.plans.lock());
        let (ahead, plan): (Vec<_>, Vec<_>) = plans.into_iter().partition(|plan| plan.ahead);
        (self.last_step.plan, self.last_step.ahead) = (plan.into_iter().next(), ahead.into_iter().next());
        let failed = self.core.stats().failed_steps > failed_before;
        self.begun_ahead = self.last_step.ahead.clone();
        let of_prompts = |plan: &StepPlan| plan.sequences.iter().any(|step| step.tokens != Tokens::Awaited);
        self.prompts_ahead += usize::from(self.begun_ahead.as_ref().is_some_and(of_prompts));
        let planned = self.last_step.planned();
        if failed {
            // There may have been no step to be judged, since blocks could not be cleared.
            if self.last_step.plan.is_none() {
                self.last_step.before = Found::default();
            }
            scheduled.iter().for_each(|&id| self.record_mut(id).faulty = true);
        }
        for &id in &planned {
            self.record_mut(id).started.get_or_insert(now);
        }
        let waiting = self.core.scheduler().waiting();
        let (preempted, held): (Vec<_>, Vec<_>) =
            self.last_step.holders.iter().copied().partition(|id| waiting.contains_key(id));
        if failed {
            held.iter().chain(&planned).for_each(|&id| self.record_mut(id).faulty = true);
        }
        let of_the_background = |id: &RequestId| id.is_background();
        if !planned.iter().all(of_the_background) {
            self.displaced += preempted.iter().filter(|id| id.is_background()).count();
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
        let parts = self.last_step.plan.iter().chain(&self.last_step.ahead).flat_map(|plan| &plan.sequences);
        let parts: Vec<_> = parts.map(|step| (RequestId(step.id), step.num_computed, step.tokens.count())).collect();
        for (id, num_computed, count) in parts {
            let record = self.record_mut(id);
            let from = record.prompt_done.max(num_computed);
            let to = (num_computed + count).min(record.request.prompt.len());
            record.prompt_done = from.max(to);
            self.serve(id, PROMPT_TOKEN * to.saturating_sub(from) as u64);
        }
        let waiting = self.core.scheduler().waiting().into_keys().map(|id| self.record(id).rank(id));
        let waiting = waiting.map(|rank| (rank.class, rank.tenant)).collect();
        self.fairness.observe(&waiting);
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

    /// What a plan would find.
    fn found(&self) -> Found {
        let (scheduler, total) = (self.core.scheduler(), self.core.stats().blocks.total);
        let of_class = |id: &RequestId| id.is_background() == scheduler.is_background_turn();
        let running = || scheduler.running().iter().filter(|(id, _)| of_class(id));
        let in_doubt = scheduler.in_doubt().values().flat_map(|blocks| &blocks.kept);
        let held = running().flat_map(|(_, sequence)| sequence.table.blocks()).chain(in_doubt);
        Found {
            running: running().map(|(&id, _)| id).collect(),
            head: scheduler.first_waiting(),
            available: total - held.collect::<BTreeSet<_>>().len(),
            under_way: self.core.is_under_way(),
        }
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
                OutputEvent::Token { token, .. } => {
                    record.tokens.push(token);
                    self.serve(id, OUTPUT_TOKEN);
                }
                OutputEvent::Finished { reason, usage, .. } => {
                    let stopped = matches!(reason, FinishReason::Stop { .. });
                    record.end = Some((reason, usage));
                    self.serve(id, if stopped { OUTPUT_TOKEN } else { 0 });
                }
            }
        }
    }

    fn serve(&mut self, id: RequestId, count: u64) {
        let (rank, share) = (self.record(id).rank(id), self.record(id).request.share);
        self.fairness.serve((rank.class, rank.tenant), count as f64 / f64::from(share.weight));
    }

    /// # Panics
    /// If an invariant does not hold.
    pub fn check(&self) {
        let watched = invariants::ALL.iter().filter(|invariant| !self.is_long || invariant.is_of_a_step);
        for invariant in watched {
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

impl Record {
    pub fn rank(&self, id: RequestId) -> Rank {
        let Request { priority, share, .. } = self.request;
        Rank { class: Class::of(id, &self.request), tenant: share.tenant, priority, id }
    }
}

impl LastStep {
    /// The sequences of the plans that the runner was given.
    pub fn planned(&self) -> BTreeSet<RequestId> {
        let plans = self.plan.iter().chain(&self.ahead);
        plans.flat_map(|plan| &plan.sequences).map(|step| RequestId(step.id)).collect()
    }
}
