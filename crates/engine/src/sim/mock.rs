//! A runner whose next token is a hash of the whole context *as it reads it back* from its own paged
//! memory. So a lost, doubled, stale or foreign block shows as a wrong token, not as a subtle change of
//! probabilities. What passes is the same once more, which every token reads as far as it reaches. It checks every plan against its spec, and fails on command. Like a device it works off what it was asked
//! for one by one, and as late as it can: when somebody waits for it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use baton_model::{
    Adapter, PASSED, Passing, RunError, RunSpec, Runner, SampleRequest, SampledToken, Score, ScoreRequest,
    SequenceFailure, SequenceOutput, SequenceStep, StepOutput, StepPlan, Tokens,
};
use parking_lot::{Condvar, Mutex};

use super::mock_model::{MockModel, likeliest, logprob, mix, state};
use crate::Rebuild;

/// How long what hangs waits for its release at most, so that a forgotten one ends a test.
const MAX_HANG: Duration = Duration::from_secs(60);

/// What the mock keeps per position, in place of a key and a value. Like those, it depends on all of
/// the context up to the token, so a block is of use only behind the very prefix it was computed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Empty,
    Written {
        token: u32,
        context: u64,
    },
    NotFinite,
    /// Of a draft, which must not matter unless it is accepted.
    NotFiniteDraft,
}

/// Faults to come and what happened so far. Clones control the same runner, and those that take its place.
#[derive(Clone, Default)]
pub struct MockControl(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    delay: Duration,
    fail_steps: u32,
    fault: Option<RunError>,
    fail_clears: u32,
    fail_rebuilds: u32,
    panic_steps: u32,
    fail_early: bool,
    hang: bool,
    hang_rebuilds: bool,
    not_finite_from: BTreeMap<u64, usize>,
    not_finite_tokens: BTreeSet<u32>,
    steps: u64,
    computed_tokens: u64,
    adapters: BTreeSet<[u8; 32]>,
    cleared: Vec<u32>,
    cleared_passing: Vec<u32>,
}

impl MockControl {
    /// The end of every step takes this long from now on.
    pub fn delay_steps(&self, delay: Duration) {
        self.0.0.lock().delay = delay;
    }

    /// The next `n` steps fail as a whole, having spoilt all of memory.
    pub fn fail_steps(&self, n: u32) {
        self.fail_steps_with(n, RunError::Failed("mock fault".into()));
    }

    /// As [`fail_steps`](Self::fail_steps), with this error. A runner that says that it is poisoned or lost says so from
    /// then on.
    pub fn fail_steps_with(&self, n: u32, error: RunError) {
        let mut state = self.0.0.lock();
        (state.fail_steps, state.fault) = (n, Some(error));
    }

    /// Steps that fail or panic do so when they begin, not when they end.
    pub fn fail_early(&self) {
        self.0.0.lock().fail_early = true;
    }

    /// The next `n` attempts to load another runner fail.
    pub fn fail_rebuilds(&self, n: u32) {
        self.0.0.lock().fail_rebuilds = n;
    }

    /// Attempts to load another runner do not return before [`release`](Self::release), or a minute.
    pub fn hang_rebuilds(&self) {
        self.0.0.lock().hang_rebuilds = true;
    }

    /// The next `n` calls to clear blocks fail.
    pub fn fail_clears(&self, n: u32) {
        self.0.0.lock().fail_clears = n;
    }

    /// The next `n` steps panic, having spoilt all of memory.
    pub fn panic_steps(&self, n: u32) {
        self.0.0.lock().panic_steps = n;
    }

    /// Steps do not end before [`release`](Self::release), or a minute.
    pub fn hang(&self) {
        self.0.0.lock().hang = true;
    }

    /// Ends the hang of steps alone.
    pub fn release_steps(&self) {
        self.0.0.lock().hang = false;
        self.0.1.notify_all();
    }

    /// Ends what hangs.
    pub fn release(&self) {
        let mut state = self.0.0.lock();
        (state.hang, state.hang_rebuilds) = (false, false);
        drop(state);
        self.0.1.notify_all();
    }

    /// What the sequence of this id computes from this position on is not finite.
    pub fn not_finite_from(&self, id: u64, position: usize) {
        self.0.0.lock().not_finite_from.insert(id, position);
    }

    /// What is computed for this token is not finite, in any sequence.
    pub fn not_finite_on_token(&self, token: u32) {
        self.0.0.lock().not_finite_tokens.insert(token);
    }

    /// Steps begun so far, failed ones included.
    pub fn steps(&self) -> u64 {
        self.0.0.lock().steps
    }

    /// Tokens computed so far.
    pub fn computed_tokens(&self) -> u64 {
        self.0.0.lock().computed_tokens
    }

    /// Digests of the adapters of all sequences so far.
    pub fn adapters(&self) -> BTreeSet<[u8; 32]> {
        self.0.0.lock().adapters.clone()
    }

    /// Blocks cleared so far, in order.
    pub fn cleared_blocks(&self) -> Vec<u32> {
        self.0.0.lock().cleared.clone()
    }

    /// Passing blocks cleared so far, in order.
    #[cfg(test)]
    pub fn cleared_passing_blocks(&self) -> Vec<u32> {
        self.0.0.lock().cleared_passing.clone()
    }
}

enum Work {
    Step(StepPlan),
    /// Kept and passing blocks.
    Clear([Vec<u32>; 2]),
}

/// See the head of the file.
pub struct MockRunner {
    spec: RunSpec,
    model: MockModel,
    /// `[num_blocks * block_size]`
    slots: Vec<Slot>,
    /// As `slots`, of what passes.
    passing: Vec<Slot>,
    control: MockControl,
    /// What it was asked for and has not done.
    queue: VecDeque<Work>,
    /// What the last step gave.
    last: StepOutput,
    /// What it says from now on.
    broken: Option<RunError>,
}

impl MockRunner {
    /// A runner with empty memory.
    pub fn new(spec: RunSpec, model: MockModel) -> Self {
        Self::under(MockControl::default(), spec, model)
    }

    fn under(control: MockControl, spec: RunSpec, model: MockModel) -> Self {
        let passing = spec.passing.map_or(0, |passing| passing.num_blocks);
        let [slots, passing] = [spec.num_blocks, passing].map(|blocks| vec![Slot::Empty; blocks * spec.block_size]);
        Self { spec, model, slots, passing, control, queue: VecDeque::new(), last: StepOutput::default(), broken: None }
    }

    /// Makes another one like it, under the same control.
    pub fn rebuild(&self) -> Rebuild {
        let (control, spec, model) = (self.control.clone(), self.spec.clone(), self.model.clone());
        Arc::new(move || {
            let mut state = control.0.0.lock();
            if state.hang_rebuilds {
                control.0.1.wait_while_for(&mut state, |state| state.hang_rebuilds, MAX_HANG);
            }
            if state.fail_rebuilds > 0 {
                state.fail_rebuilds -= 1;
                return Err("mock fault while loading".into());
            }
            Ok(Box::new(Self::under(control.clone(), spec.clone(), model.clone())))
        })
    }

    /// Its remote control.
    pub fn control(&self) -> MockControl {
        self.control.clone()
    }

    fn slot(&self, sequence: &SequenceStep, position: usize) -> usize {
        sequence.block_table[position / self.spec.block_size] as usize * self.spec.block_size
            + position % self.spec.block_size
    }

    fn passing_slot(&self, sequence: &SequenceStep, position: usize) -> usize {
        sequence.passing_table[position / self.spec.block_size] as usize * self.spec.block_size
            + position % self.spec.block_size
    }

    /// Whether all that passes and that a token at `position` reads is what was written beside what is kept.
    fn is_in_reach(&self, sequence: &SequenceStep, position: usize) -> bool {
        let Some(Passing { reach, .. }) = self.spec.passing else { return true };
        (position.saturating_sub(reach)..position).all(|position| {
            self.passing[self.passing_slot(sequence, position)] == self.slots[self.slot(sequence, position)]
        })
    }

    fn put(&mut self, sequence: &SequenceStep, position: usize, slot: Slot) {
        let index = self.slot(sequence, position);
        self.slots[index] = slot;
        if self.spec.passing.is_some() {
            let index = self.passing_slot(sequence, position);
            self.passing[index] = slot;
        }
    }

    /// The promises of what passes: it is there as far as tokens reach, and no further once it can be given back.
    fn check_passing(&self, s: &SequenceStep, ahead: bool) {
        let (end, block_size) = (s.num_computed + s.num_rows(), self.spec.block_size);
        let Some(passing) = self.spec.passing else {
            return assert!(s.passing_table.is_empty(), "passing blocks, and nothing passes");
        };
        assert_eq!(s.passing_table.len(), end.div_ceil(block_size), "passing blocks do not match the positions");
        let (gone, held) = s.passing_table.split_at(s.num_computed.saturating_sub(passing.reach) / block_size);
        assert!(held.iter().all(|&block| (block as usize) < passing.num_blocks), "a token reads what has passed");
        let gone = &gone[..gone.len().min(passing.first(s.num_computed, block_size))];
        assert!(ahead || gone.iter().all(|&block| block == PASSED), "a passing block is held that nobody reads");
    }

    /// The promises that the engine makes a runner. A broken one is a bug of the engine.
    fn check(&self, plan: &StepPlan) {
        assert!(!plan.sequences.is_empty(), "a step of nothing");
        assert!(plan.num_tokens() <= self.spec.max_step_tokens, "too many tokens in a step");
        assert!(plan.sequences.len() <= self.spec.max_step_sequences, "too many sequences in a step");
        let ids: BTreeSet<u64> = plan.sequences.iter().map(|s| s.id).collect();
        assert_eq!(ids.len(), plan.sequences.len(), "a sequence twice in a step");
        let (mut written, mut written_passing) = (BTreeSet::new(), BTreeSet::new());
        for s in &plan.sequences {
            assert!(s.tokens.count() > 0, "a sequence without tokens in a step");
            assert!(s.draft.len() <= self.spec.max_draft_tokens, "too many drafts");
            assert!(s.draft.is_empty() || s.sample.is_some(), "drafts that no sample judges");
            assert!(s.scores.iter().all(|score| score.row < s.tokens.known().len()), "scores of what is not computed");
            let end = s.num_computed + s.num_rows();
            assert!(end <= self.spec.max_model_len, "a sequence beyond the context");
            assert_eq!(s.block_table.len(), end.div_ceil(self.spec.block_size), "blocks do not match the positions");
            assert!(s.block_table.iter().all(|&block| (block as usize) < self.spec.num_blocks), "no such block");
            self.check_passing(s, plan.ahead);
            for position in s.num_computed..end {
                assert!(written.insert(self.slot(s, position)), "a slot written twice in a step");
                let passing = self.spec.passing.map(|_| self.passing_slot(s, position));
                assert!(passing.is_none_or(|slot| written_passing.insert(slot)), "a slot written twice in a step");
            }
        }
        if plan.ahead {
            self.check_ahead(plan);
        }
    }

    /// The promises of a plan ahead: each of its sequences goes on where the step under way leaves it.
    fn check_ahead(&self, plan: &StepPlan) {
        assert!(self.spec.steps_ahead, "a step ahead of another");
        let steps = self.queue.iter().filter_map(|work| match work {
            Work::Step(plan) => Some(plan),
            Work::Clear(_) => None,
        });
        let [last] = steps.collect::<Vec<_>>()[..] else { panic!("not one step is under way") };
        assert!(last.is_plain_draw() && plan.is_plain_draw(), "more is asked than draws");
        for s in &plan.sequences {
            let before = last.sequences.iter().find(|before| before.id == s.id).expect("it is part of the step before");
            assert_eq!(s.num_computed, before.num_computed + before.num_rows(), "it goes on where that ends");
            assert_eq!(
                s.tokens == Tokens::Awaited,
                before.sample.is_some(),
                "what is sampled is awaited, and nothing else"
            );
            if let Some(sample_before) = &before.sample {
                let sample = s.sample.as_ref().expect("it samples");
                assert_eq!(sample.position, sample_before.position + 1, "it samples what follows");
            }
            assert!(s.block_table.starts_with(&before.block_table), "its blocks are others");
            let first = s.passing_table.iter().take_while(|&&block| block == PASSED).count();
            let mut of_both = s.passing_table.iter().zip(&before.passing_table).skip(first);
            assert!(of_both.all(|(own, before)| own == before), "its passing blocks are others");
        }
    }

    /// What was told to happen to a step by now.
    fn suffer(&mut self, plan: &StepPlan) -> Result<(), RunError> {
        let control = self.control.clone();
        let mut state = control.0.0.lock();
        if state.fail_steps > 0 || state.panic_steps > 0 {
            self.spoil(plan);
        }
        if state.fail_steps > 0 {
            state.fail_steps -= 1;
            let error = state.fault.clone().expect("set with the number of steps");
            if matches!(error, RunError::Poisoned(_) | RunError::Lost(_)) {
                self.broken = Some(error.clone());
            }
            return Err(error);
        }
        if state.panic_steps > 0 {
            state.panic_steps -= 1;
            panic!("mock panic");
        }
        Ok(())
    }

    /// Does what comes next; what it gave, if that is a step.
    fn work(&mut self, work: Work) -> Option<StepOutput> {
        match work {
            Work::Step(plan) => Some(self.compute(plan)),
            Work::Clear(blocks) => {
                for (slots, blocks) in [&mut self.slots, &mut self.passing].into_iter().zip(blocks) {
                    for block in blocks {
                        let start = block as usize * self.spec.block_size;
                        slots[start..start + self.spec.block_size].fill(Slot::Empty);
                    }
                }
                None
            }
        }
    }

    fn compute(&mut self, mut plan: StepPlan) -> StepOutput {
        for step in plan.sequences.iter_mut().filter(|step| step.tokens == Tokens::Awaited) {
            let before = self.last.sequences.iter().find(|before| before.id == step.id);
            let sampled = before.and_then(|before| before.sampled.first()?.as_ref().ok());
            step.tokens = Tokens::Known(vec![sampled.map_or(0, |sampled| sampled.token)]);
        }
        let control = self.control.clone();
        let mut state = control.0.0.lock();
        let mut output = StepOutput::default();
        for sequence in &plan.sequences {
            state.computed_tokens += sequence.num_rows() as u64;
            state.adapters.extend(sequence.adapter.as_ref().map(Adapter::digest));
            self.write(sequence, &state);
        }
        for sequence in &plan.sequences {
            let known = sequence.num_computed + sequence.tokens.count();
            let sampled =
                sequence.sample_along(|drafts, request| self.sample(self.read(sequence, known + drafts)?, request));
            let proposed = self.propose(sequence, &sampled);
            let scores = sequence.scores.iter().map(|request| self.score(sequence, request)).collect();
            output.sequences.push(SequenceOutput { id: sequence.id, sampled, proposed, scores });
        }
        self.last = output.clone();
        output
    }

    fn write(&mut self, sequence: &SequenceStep, state: &State) {
        let not_finite_from = state.not_finite_from.get(&sequence.id).copied().unwrap_or(usize::MAX);
        let known = sequence.num_computed + sequence.tokens.count();
        for (&token, position) in sequence.tokens.known().iter().chain(&sequence.draft).zip(sequence.num_computed..) {
            let in_reach = self.is_in_reach(sequence, position);
            let previous = match position.checked_sub(1).map(|previous| self.slots[self.slot(sequence, previous)]) {
                None => Some(self.model.empty_context(sequence.adapter.as_ref())),
                Some(Slot::Written { context, .. }) => Some(context),
                Some(Slot::Empty) => Some(0),
                Some(Slot::NotFinite | Slot::NotFiniteDraft) => None,
            };
            let finite = position < not_finite_from && !state.not_finite_tokens.contains(&token);
            let slot = match previous.map(|previous| if in_reach { previous } else { !previous }) {
                Some(previous) if finite => Slot::Written { token, context: MockModel::extend(previous, token) },
                _ if position < known => Slot::NotFinite,
                _ => Slot::NotFiniteDraft,
            };
            self.put(sequence, position, slot);
        }
    }

    /// What a step leaves that failed half way: nothing in memory is what it was.
    fn spoil(&mut self, plan: &StepPlan) {
        for slot in self.slots.iter_mut().chain(&mut self.passing) {
            if let Slot::Written { context, .. } = slot {
                *context = !*context;
            }
        }
        for sequence in &plan.sequences {
            for position in sequence.num_computed..sequence.num_computed + sequence.num_rows() {
                self.put(sequence, position, Slot::NotFinite);
            }
        }
    }

    /// The context of the first `end` positions, as memory holds it; wrong if a slot is not what this very context wrote.
    fn read(&self, sequence: &SequenceStep, end: usize) -> Result<u64, SequenceFailure> {
        // As in a masked product, where 0 × NaN is NaN, what lies behind the last token matters too, but for drafts.
        for (slots, blocks) in [(&self.slots, &sequence.block_table), (&self.passing, &sequence.passing_table)] {
            for &block in blocks.iter().filter(|&&block| block != PASSED) {
                let start = block as usize * self.spec.block_size;
                if slots[start..start + self.spec.block_size].contains(&Slot::NotFinite) {
                    return Err(SequenceFailure::NonFiniteLogits);
                }
            }
        }
        let empty = self.model.empty_context(sequence.adapter.as_ref());
        (0..end).try_fold(empty, |expected, position| match self.slots[self.slot(sequence, position)] {
            Slot::Written { token, context } if context == MockModel::extend(expected, token) => Ok(context),
            Slot::NotFiniteDraft => Err(SequenceFailure::NonFiniteLogits),
            other => Ok(mix(expected, u64::MAX - u64::from(other == Slot::Empty))),
        })
    }

    /// Drafts for the next step: what follows indeed, but for about every third, where a wrong token takes its place.
    fn propose(&self, sequence: &SequenceStep, sampled: &[Result<SampledToken, SequenceFailure>]) -> Vec<u32> {
        let (Some(mut request), Some(Ok(last))) = (sequence.request_behind(sampled), sampled.last()) else {
            return Vec::new();
        };
        let end = sequence.num_computed + sequence.tokens.count() + sampled.len() - 1;
        let Ok(context) = self.read(sequence, end) else { return Vec::new() };
        let mut context = MockModel::extend(context, last.token);
        let next = |_| {
            let right = self.model.next_token(context, &request, None);
            let wrong = mix(context, 1).is_multiple_of(3);
            let token = if wrong { (right + 1) % self.spec.vocab_size as u32 } else { right };
            request.advance(token);
            context = MockModel::extend(context, token);
            token
        };
        (0..sequence.propose).map(next).collect()
    }

    fn score(&self, sequence: &SequenceStep, request: &ScoreRequest) -> Result<Score, SequenceFailure> {
        let context = self.read(sequence, sequence.num_computed + request.row + 1)?;
        Ok(Score {
            logprobs: request.ids.iter().map(|&id| logprob(context, id)).collect(),
            top: likeliest(context, request.top, self.spec.vocab_size),
            hidden: if request.hidden { state(context) } else { Vec::new() },
        })
    }

    fn sample(&self, context: u64, request: &SampleRequest) -> Result<SampledToken, SequenceFailure> {
        let mask = match &request.masks {
            Some(masks) => masks.wait()?,
            None => None,
        };
        let token = self.model.next_token(context, request, mask.as_ref());
        let Some(count) = request.params.logprobs else {
            return Ok(SampledToken { token, logprob: 0.0, top: Vec::new() });
        };
        let vocab_size = self.spec.vocab_size as u32;
        let top = (0..count.min(vocab_size)).map(|i| ((token + i) % vocab_size, -0.5 - i as f32)).collect();
        Ok(SampledToken { token, logprob: -0.5, top })
    }
}

impl Runner for MockRunner {
    fn spec(&self) -> &RunSpec {
        &self.spec
    }

    fn begin(&mut self, plan: &StepPlan) -> Result<(), RunError> {
        if !plan.ahead {
            // What is left of steps that nobody waits for any more happens nevertheless.
            while let Some(work) = self.queue.pop_front() {
                self.work(work);
            }
        }
        self.check(plan);
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let mut state = self.control.0.0.lock();
        state.steps += 1;
        let fails_early = state.fail_early;
        drop(state);
        if fails_early {
            self.suffer(plan)?;
        }
        self.queue.push_back(Work::Step(plan.clone()));
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, RunError> {
        let control = self.control.clone();
        let mut state = control.0.0.lock();
        if state.hang {
            control.0.1.wait_while_for(&mut state, |state| state.hang, MAX_HANG);
        }
        let delay = state.delay;
        drop(state);
        std::thread::sleep(delay);
        loop {
            let work = self.queue.pop_front().expect("a step is under way");
            if let Work::Step(plan) = &work {
                self.suffer(plan)?;
            }
            if let Some(output) = self.work(work) {
                return Ok(output);
            }
        }
    }

    fn clear_blocks(&mut self, kept: &[u32], passing: &[u32]) -> Result<(), RunError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let mut state = self.control.0.0.lock();
        if state.fail_clears > 0 {
            state.fail_clears -= 1;
            return Err(RunError::Failed("mock fault while clearing".into()));
        }
        state.cleared.extend(kept);
        state.cleared_passing.extend(passing);
        self.queue.push_back(Work::Clear([kept.to_vec(), passing.to_vec()]));
        Ok(())
    }
}
