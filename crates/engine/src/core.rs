//! Scheduler and runner put together: one step at a time, on the caller's thread and clock. What the
//! engine thread drives with real time, the simulator drives with its own.
//!
//! One step is under way while the runner is waited for, or two, if the second could be [planned
//! ahead](Scheduler::schedule_ahead) of the first one's end. So what the first gave is committed, and told to clients, while the
//! device computes the second; and requests are added, aborted and expire meanwhile.
//!
//! Faults of the runner:
//! - One sequence's logits are not finite: it fails, its blocks are cleared before the next step, its
//!   batch mates go on. So it is if its grammar fails, but for the blocks: their values are sound.
//! - A step fails, panics, or answers something else than was asked: every sequence that holds blocks fails, every
//!   block that holds anything is cleared, and the engine goes on with those that wait. Another step that is under way is
//!   forgotten: what it computes comes of what failed, or failed with it.
//! - Steps fail [`max_failed_steps`](crate::EngineConfig::max_failed_steps) times in a row, blocks cannot be cleared, or
//!   the device says that it must be set up anew: the runner is broken. Where another can be loaded in its place, those
//!   that wait, wait for it; it begins with an empty cache and no cached prefix.
//! - The device is lost, nothing can be loaded, or [`max_rebuilds`](crate::EngineConfig::max_rebuilds) runners in a row
//!   break before they have done a step: the engine is down for good. Everything fails.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use baton_model::{RunError, RunSpec, Runner, Score, ScoreRequest, SequenceOutput, SequenceStep, StepOutput, StepPlan};

use crate::constrain::MaskPool;
use crate::handle::EngineConfig;
use crate::intake::Amount;
use crate::scheduler::{RequestOutput, Scheduler};
use crate::sequence::Sequence;
use crate::{DeviceFailures, EngineFailure, EngineStats, Request, RequestId};

/// See the head of the file.
pub(crate) struct Core {
    /// Taken out when it is broken.
    runner: Option<Box<dyn Runner>>,
    spec: RunSpec,
    scheduler: Scheduler,
    /// Steps that were begun and have not ended, the earliest first; two at most.
    under_way: VecDeque<StepPlan>,
    masks: MaskPool,
    max_failed_steps: u32,
    failed_in_a_row: u32,
    /// Runners that may be loaded before one of them does a step.
    max_rebuilds: u32,
    rebuilds_in_a_row: u32,
    rebuilds: u64,
    device_failures: DeviceFailures,
    condition: Condition,
}

/// Why the steps under way have failed.
struct StepFailure {
    failure: EngineFailure,
    /// Whether the runner is of no use any more.
    for_good: bool,
}

impl From<EngineFailure> for StepFailure {
    fn from(failure: EngineFailure) -> Self {
        let for_good = matches!(failure, EngineFailure::Device(RunError::Poisoned(_) | RunError::Lost(_)));
        Self { failure, for_good }
    }
}

/// What becomes of the next step.
enum Condition {
    Sound,
    /// There is none before another runner is there.
    Broken(EngineFailure),
    /// There is none.
    Down(EngineFailure),
}

impl Core {
    /// `secret`: the key of the prefix cache. `masks`: where those of grammars are computed. `rebuildable`: whether a
    /// broken runner can be replaced.
    pub fn new(
        runner: Box<dyn Runner>,
        rebuildable: bool,
        config: &EngineConfig,
        secret: [u8; 32],
        masks: MaskPool,
    ) -> Self {
        Self {
            spec: runner.spec().clone(),
            scheduler: Scheduler::new(runner.spec(), config, secret),
            under_way: VecDeque::new(),
            runner: Some(runner),
            masks,
            max_failed_steps: config.max_failed_steps,
            failed_in_a_row: 0,
            max_rebuilds: if rebuildable { config.max_rebuilds } else { 0 },
            rebuilds_in_a_row: 0,
            rebuilds: 0,
            device_failures: DeviceFailures::default(),
            condition: Condition::Sound,
        }
    }

    /// Adds an accepted request. `group` is the id of the first choice of its request.
    pub fn add(
        &mut self,
        id: RequestId,
        group: RequestId,
        request: Request,
        arrival: Duration,
        now: Duration,
    ) -> Option<RequestOutput> {
        self.scheduler.add(Sequence::new(id, group, request, arrival), now)
    }

    /// Ends a request at the client's wish; `None` if it has ended already.
    pub fn abort(&mut self, id: RequestId, now: Duration) -> Option<RequestOutput> {
        self.scheduler.abort(id, now)
    }

    /// Ends everything.
    pub fn fail_all(&mut self, failure: &EngineFailure, now: Duration) -> Vec<RequestOutput> {
        self.scheduler.fail_all(failure, now)
    }

    /// Whether there is nothing to do. A step that is under way must end, even if nobody is left who awaits its tokens.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && !self.is_under_way()
    }

    /// Whether a step was begun that has not ended.
    pub fn is_under_way(&self) -> bool {
        !self.under_way.is_empty()
    }

    /// Why the engine takes no more steps, if so.
    pub fn down(&self) -> Option<&EngineFailure> {
        match &self.condition {
            Condition::Down(failure) => Some(failure),
            _ => None,
        }
    }

    /// Whether no step can be taken before [`install`](Self::install).
    pub fn is_broken(&self) -> bool {
        matches!(self.condition, Condition::Broken(_))
    }

    /// The broken runner, to be dropped before another is loaded: both may not fit onto the device.
    pub fn take_runner(&mut self) -> Option<Box<dyn Runner>> {
        self.runner.take()
    }

    /// Runners that were to take the place of a broken one since the last step.
    pub fn rebuilds_in_a_row(&self) -> u32 {
        self.rebuilds_in_a_row
    }

    /// Takes another runner, or why there is none.
    pub fn install(&mut self, rebuilt: Result<Box<dyn Runner>, String>, now: Duration) -> Vec<RequestOutput> {
        let Condition::Broken(failure) = &self.condition else { unreachable!("only a broken runner is replaced") };
        let failure = failure.clone();
        self.rebuilds_in_a_row += 1;
        // Requests were accepted under the limits of the one before.
        let same = |runner: Box<dyn Runner>| match *runner.spec() == self.spec {
            true => Ok(runner),
            false => Err(format!("its limits are others: {:?}, not {:?}", runner.spec(), self.spec)),
        };
        match rebuilt.and_then(same) {
            Ok(runner) => {
                tracing::info!(in_a_row = self.rebuilds_in_a_row, "another runner takes the place of the broken one");
                self.runner = Some(runner);
                self.condition = Condition::Sound;
                self.failed_in_a_row = 0;
                self.rebuilds += 1;
                self.scheduler.renewed(now)
            }
            Err(reason) => {
                tracing::error!(reason, in_a_row = self.rebuilds_in_a_row, "no runner in the place of the broken one");
                self.broken(failure, now)
            }
        }
    }

    /// Requests that started, or ended without starting, so far: of the foreground, and of the background.
    pub fn left_queue(&self) -> [Amount; 2] {
        self.scheduler.left_queue()
    }

    /// What is known between steps.
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            rebuilding: self.is_broken(),
            failure: self.down().cloned(),
            device_failures: self.device_failures,
            rebuilds: self.rebuilds,
            ..self.scheduler.stats()
        }
    }

    /// Ends what waited or took too long.
    pub fn expire(&mut self, now: Duration) -> Vec<RequestOutput> {
        self.scheduler.expire(now)
    }

    /// Ends what waited or took too long and, unless a step is under way, plans the next. The plan is empty only if one is
    /// under way, or nothing is left to do.
    pub fn plan(&mut self, now: Duration) -> (Vec<RequestOutput>, StepPlan) {
        let expired = self.expire(now);
        let plan = if self.is_under_way() { StepPlan::default() } else { self.scheduler.schedule(now) };
        (expired, plan)
    }

    /// Begins the planned step, if there is one, and the one behind it where that can be; then waits for the earliest step
    /// under way, and takes what it gave. `clock` is read when the runner is done. Not to be called when idle.
    pub fn execute(&mut self, plan: StepPlan, clock: &dyn Fn() -> Duration) -> Vec<RequestOutput> {
        match self.advance(plan) {
            Ok((plan, output)) => {
                (self.failed_in_a_row, self.rebuilds_in_a_row) = (0, 0);
                self.scheduler.commit(&plan, output, clock())
            }
            Err(StepFailure { failure, for_good }) => {
                self.failed_in_a_row += 1;
                tracing::error!(%failure, in_a_row = self.failed_in_a_row, "step failed");
                let now = clock();
                let mut outputs = self.failed(&failure, now);
                if for_good || self.failed_in_a_row >= self.max_failed_steps {
                    outputs.extend(self.broken(failure, now));
                }
                outputs
            }
        }
    }

    /// The earliest step under way, with what it gave.
    fn advance(&mut self, plan: StepPlan) -> Result<(StepPlan, StepOutput), StepFailure> {
        if !plan.sequences.is_empty() {
            self.begin(plan)?;
        }
        let last = self.under_way.back().expect("a step was planned, or one is under way");
        if self.spec.steps_ahead
            && let Some(ahead) = self.scheduler.schedule_ahead(last)
        {
            self.begin(ahead)?;
        }
        let runner = self.runner.as_mut().expect("a step is under way on a sound runner");
        let output = guard(|| runner.finish())?;
        let plan = self.under_way.pop_front().expect("a step is under way");
        let output = check(&plan, output, self.spec.vocab_size)?;
        Ok((plan, output))
    }

    /// Clears what must be before the step, and begins it, behind all that was begun before.
    fn begin(&mut self, plan: StepPlan) -> Result<(), StepFailure> {
        let runner = self.runner.as_mut().expect("a step is planned for a sound runner");
        let unclean = self.scheduler.take_unclean();
        if !unclean.is_empty() {
            guard(|| runner.clear_blocks(&unclean.kept, &unclean.passing)).map_err(|failure| {
                tracing::error!(%failure, "cache blocks cannot be cleared");
                StepFailure { failure, for_good: true }
            })?;
        }
        // First, so that they are computed beside the step.
        for step in &plan.sequences {
            if let Some(job) = self.scheduler.mask_job(step) {
                self.masks.start(job);
            }
        }
        guard(|| runner.begin(&plan))?;
        self.under_way.push_back(plan);
        Ok(())
    }

    /// Ends all that hold blocks, and all steps under way.
    fn failed(&mut self, failure: &EngineFailure, now: Duration) -> Vec<RequestOutput> {
        self.under_way.clear();
        self.device_failures.count(failure);
        self.scheduler.fail_running(failure, now)
    }

    /// The runner is of no use any more. Those that wait go on waiting if there may be another.
    fn broken(&mut self, failure: EngineFailure, now: Duration) -> Vec<RequestOutput> {
        let is_lost = matches!(failure, EngineFailure::Device(RunError::Lost(_)));
        if is_lost || self.rebuilds_in_a_row >= self.max_rebuilds {
            let outputs = self.scheduler.fail_all(&failure, now);
            self.condition = Condition::Down(failure);
            return outputs;
        }
        self.condition = Condition::Broken(failure);
        Vec::new()
    }
}

#[cfg(test)]
impl Core {
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    pub fn scheduler_mut(&mut self) -> &mut Scheduler {
        &mut self.scheduler
    }
}

/// Turns everything that can go wrong in the runner into a failure. After a panic the runner may be asked to
/// clear blocks and to step again: it keeps no state per sequence but the cache, which is reset, and forgets the steps
/// that were under way.
fn guard<T>(work: impl FnOnce() -> Result<T, RunError>) -> Result<T, EngineFailure> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(EngineFailure::Device),
        Err(_) => Err(EngineFailure::Panicked),
    }
}

/// Whether the output answers the plan.
fn check(plan: &StepPlan, output: StepOutput, vocab_size: usize) -> Result<StepOutput, EngineFailure> {
    let known = |token: u32| (token as usize) < vocab_size;
    let tells = |(wanted, score): (&ScoreRequest, &Score)| {
        score.logprobs.len() == wanted.ids.len()
            && score.top.len() == vocab_size.min(wanted.top as usize)
            && score.top.iter().all(|&(token, _)| known(token))
            && score.hidden.is_empty() != wanted.hidden
    };
    let answers = |step: &SequenceStep, result: &SequenceOutput| {
        let mut drafts = step.draft.iter();
        // Each token but the last is the draft in its place; a failure is the last.
        let accepted = result.sampled.iter().rev().skip(1).rev();
        result.id == step.id
            && result.sampled.is_empty() == step.sample.is_none()
            && accepted
                .map(|sampled| sampled.as_ref().ok().map(|s| s.token))
                .all(|token| token == drafts.next().copied())
            && result.sampled.iter().flatten().all(|sampled| known(sampled.token))
            && result.proposed.len() <= step.propose
            && result.proposed.iter().all(|&token| known(token))
            && match &result.scores {
                Ok(scores) => scores.len() == step.scores.len() && step.scores.iter().zip(scores).all(tells),
                Err(_) => !step.scores.is_empty(),
            }
    };
    let answers = output.sequences.len() == plan.sequences.len()
        && plan.sequences.iter().zip(&output.sequences).all(|(step, result)| answers(step, result));
    let failure = || EngineFailure::Device(RunError::Failed("the output of the step does not answer its plan".into()));
    answers.then_some(output).ok_or_else(failure)
}

#[cfg(test)]
mod tests {
    use baton_model::{SequenceFailure, Tokens};

    use super::*;

    #[test]
    fn an_output_that_does_not_answer_its_plan_fails_the_step() {
        let wanted = ScoreRequest { row: 0, ids: vec![3], top: 2, hidden: false };
        let step = SequenceStep {
            id: 7,
            num_computed: 0,
            tokens: Tokens::Known(vec![1]),
            draft: Vec::new(),
            block_table: vec![0],
            passing_table: Vec::new(),
            adapter: None,
            sample: None,
            propose: 0,
            scores: vec![wanted],
        };
        let score = Score { logprobs: vec![-1.0], top: vec![(4, -0.5), (2, -0.6)], hidden: vec![] };
        let output = SequenceOutput { scores: Ok(vec![score.clone()]), ..SequenceOutput::new(7) };
        let answers = |step: &SequenceStep, output: &SequenceOutput| {
            let plan = StepPlan::new(vec![step.clone()]);
            check(&plan, StepOutput { sequences: vec![output.clone()] }, 10).is_ok()
        };
        let with = |scores| SequenceOutput { scores, ..output.clone() };
        let failed = with(Err(SequenceFailure::NonFiniteLogits));
        assert!(answers(&step, &output) && answers(&step, &failed));

        let silent = SequenceStep { scores: Vec::new(), ..step.clone() };
        assert!(answers(&silent, &SequenceOutput::new(7)));
        assert!(!answers(&silent, &output) && !answers(&silent, &failed), "nothing was asked for");
        assert!(!answers(&step, &SequenceOutput { id: 8, ..output.clone() }));
        for scores in [
            vec![],
            vec![score.clone(), score.clone()],
            vec![Score { logprobs: vec![], ..score.clone() }],
            vec![Score { hidden: vec![1.0], ..score.clone() }],
            vec![Score { top: vec![(4, -0.5)], ..score.clone() }],
            vec![Score { top: vec![(4, -0.5), (10, -0.6)], ..score }],
        ] {
            assert!(!answers(&step, &with(Ok(scores.clone()))), "{scores:?}");
        }
    }
}
