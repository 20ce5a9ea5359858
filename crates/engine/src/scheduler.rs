//! Which sequence computes which tokens in the next step: a state machine over values. Time is an
//! argument, maps are ordered, and nothing here blocks or fails, so that a seed replays any run.
//!
//! A step is [`schedule`](Scheduler::schedule), the runner's work, and [`commit`](Scheduler::commit).
//! Requests are added and aborted between steps only.
//!
//! There are two classes of sequences, foreground and background. A step is of one class: of the background only if
//! nothing of the foreground runs or waits. Meanwhile background sequences keep their blocks, until the foreground needs
//! them.
//!
//! Invariant: in each class every running sequence has a smaller id than every waiting one. Ids follow the order of
//! arrival, those of the background behind all others; the first waiting is the next to be admitted, and the last
//! admitted is the first to be preempted. So nobody is overtaken by its equals, and the earliest request always makes
//! progress, alone in the whole cache if it must; and the steps of the foreground are what they would be without any
//! background, but for the prefixes that the background's blocks displaced from the cache.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_model::{RunSpec, SampledToken, SequenceFailure, StepOutput, StepPlan};

use crate::block::BlockId;
use crate::block_manager::{BlockHasher, BlockManager};
use crate::sequence::{Sequence, Start};
use crate::speculate::{lookup, worth};
use crate::{
    DraftMethod, EngineConfig, EngineFailure, EngineStats, FinishReason, OutputEvent, RequestId, SpeculationConfig,
    SpeculationStats,
};

/// An event for the client of one request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RequestOutput {
    pub id: RequestId,
    pub event: OutputEvent,
}

/// See the head of the file.
pub(crate) struct Scheduler {
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    speculation: Option<SpeculationConfig>,
    blocks: BlockManager,
    /// Blocks that were taken back and may hold values that are not finite.
    unclean: Vec<BlockId>,
    /// Sequences that hold blocks. Each is part of every step of its class.
    running: BTreeMap<RequestId, Sequence>,
    /// Sequences that hold nothing: new and preempted ones.
    waiting: BTreeMap<RequestId, Sequence>,
    /// Requests that started, or ended without starting: of the foreground, and of the background.
    left_queue: [u64; 2],
    counters: EngineStats,
}

impl Scheduler {
    /// `secret`: the key of the prefix cache.
    pub fn new(spec: &RunSpec, config: &EngineConfig, secret: [u8; 32]) -> Self {
        let max_num_batched_tokens = config.max_num_batched_tokens.min(spec.max_step_tokens).max(1);
        let speculation = config.speculation.clone().map(|speculation| SpeculationConfig {
            num_speculative_tokens: speculation.num_speculative_tokens.min(spec.max_draft_tokens),
            ..speculation
        });
        let hasher = config.enable_prefix_caching.then(|| BlockHasher::new(secret, &config.cache_namespace));
        let counters =
            EngineStats { speculation: speculation.as_ref().map(SpeculationStats::new), ..EngineStats::default() };
        Self {
            // Each running sequence has at least one token of every step.
            max_num_seqs: config.max_num_seqs.min(spec.max_step_sequences).min(max_num_batched_tokens).max(1),
            max_num_batched_tokens,
            speculation,
            blocks: BlockManager::new(spec.num_blocks, spec.block_size, hasher),
            unclean: Vec::new(),
            running: BTreeMap::new(),
            waiting: BTreeMap::new(),
            left_queue: [0; 2],
            counters,
        }
    }

    /// Adds a request that the engine can finish. Its id is larger than all before in its class.
    pub fn add(&mut self, sequence: Sequence) {
        let is_background = sequence.id.is_background();
        debug_assert!(self.waiting.range(sequence.id..).all(|(id, _)| id.is_background() != is_background));
        self.waiting.insert(sequence.id, sequence);
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Requests that started, or ended without starting, so far: of the foreground, and of the background.
    pub fn left_queue(&self) -> [u64; 2] {
        self.left_queue
    }

    /// Gauges and counters; what the scheduler does not know is left at zero.
    pub fn stats(&self) -> EngineStats {
        let [running, waiting] = [&self.running, &self.waiting].map(|all| all.range(..RequestId::BACKGROUND));
        let adapters = |(_, sequence): (_, &Sequence)| Some(*sequence.adapter.as_ref()?.digest());
        let foreground = [running.clone().count(), waiting.clone().count()];
        EngineStats {
            running: foreground[0],
            waiting: foreground[1],
            background: self.running.len() + self.waiting.len() - foreground.iter().sum::<usize>(),
            running_adapters: running.filter_map(adapters).collect(),
            waiting_adapters: waiting.filter_map(adapters).collect(),
            blocks: self.blocks.stats(),
            ..self.counters.clone()
        }
    }

    /// Ends the requests that should have started by now and have not.
    pub fn expire(&mut self, now: Duration) -> Vec<RequestOutput> {
        let overdue = self.waiting.extract_if(.., |_, sequence| sequence.is_overdue(now)).map(|(_, sequence)| sequence);
        let overdue: Vec<Sequence> = overdue.collect();
        let reason = FinishReason::Error(EngineFailure::QueueTimeout);
        overdue.into_iter().map(|sequence| self.finish(sequence, reason.clone(), now)).collect()
    }

    /// Plans a step, after `expire(now)`. It is empty only if the scheduler is idle.
    ///
    /// A step moves `num_computed` of a sequence towards the number of its known tokens; there is no
    /// prefill or decode phase:
    ///
    /// ```text
    ///   0            num_computed       num_computed + n          tokens.len()
    ///   |-- in blocks --|-- this step, n --|-- later steps: chunks --|
    ///   |------------------- blocks are held for all -------------------|
    /// ```
    ///
    /// A token is sampled if and only if the step reaches `tokens.len()`, and is then known and not
    /// computed. So a sequence that decodes has n = 1, and one that just started, or was preempted, has
    /// as many tokens as budget and cache leave.
    ///
    /// Of the class whose turn it is:
    ///
    /// 1. Running sequences, earliest first, get what they miss of the budget. All but the latest miss
    ///    one token, since nobody is admitted before the latest has all it misses; so each gets some.
    ///    One that needs a block when there is none takes it from the latest, which waits again and
    ///    later computes from its tokens what it lost.
    /// 2. Waiting sequences, earliest first, are admitted while budget, places and blocks last. The
    ///    first that cannot be admitted ends the step's plan: nobody passes it.
    /// 3. Drafts take what is left of budget and blocks, and nobody's place.
    ///
    /// In each of these the blocks of background sequences are there for the foreground, the latest's first.
    pub fn schedule(&mut self, now: Duration) -> StepPlan {
        let mut plan = StepPlan::default();
        let mut budget = self.max_num_batched_tokens;
        let block_size = self.blocks.block_size();
        let background = self.is_background_turn();
        let of_class = |id: &RequestId| id.is_background() == background;
        let mut preempted_own = false;

        let earliest_first: Vec<RequestId> = self.running.keys().copied().filter(of_class).collect();
        for id in earliest_first {
            // Gone if it was preempted, and then so were all after it.
            while let Some(sequence) = self.running.get_mut(&id) {
                if self.blocks.grow(sequence) {
                    let n = sequence.num_pending().min(budget);
                    debug_assert!(n > 0, "every running sequence is part of every step of its class");
                    plan.sequences.push(sequence.step(n, block_size));
                    budget -= n;
                    break;
                }
                preempted_own |= of_class(&self.preempt_latest());
            }
        }

        // Blocks that a preemption among equals just set free are for those that run.
        while !preempted_own && budget > 0 && self.waiting.keys().next().is_some_and(of_class) {
            let Some(sequence) = self.admit(plan.sequences.len(), now) else { break };
            let n = sequence.num_pending().min(budget);
            budget -= n;
            plan.sequences.push(sequence.step(n, block_size));
        }
        self.add_drafts(&mut plan);
        plan
    }

    /// Whether the next step is of the background: there is nothing else.
    pub fn is_background_turn(&self) -> bool {
        let first = [&self.running, &self.waiting].map(|sequences| sequences.keys().next());
        first.into_iter().flatten().all(|id| id.is_background())
    }

    /// Adds drafts to the sequences of a step that sample, in equal parts of the rows that are left.
    fn add_drafts(&mut self, plan: &mut StepPlan) {
        let Some(speculation) = self.speculation.clone() else { return };
        let rows = speculation.disable_by_batch_size.min(self.max_num_batched_tokens);
        let mut left = rows.saturating_sub(plan.num_tokens());
        // As at admission: a draft takes no block that a token may soon need.
        let spare = plan.sequences.len();
        let mut sampling = plan.sequences.iter().filter(|step| step.sample.is_some()).count();
        let worth = worth(sampling, plan.num_tokens());
        for step in plan.sequences.iter_mut().filter(|step| step.sample.is_some()) {
            let id = RequestId(step.id);
            let sequence = &self.running[&id];
            let most = speculation.num_speculative_tokens.min(sequence.max_drafts()).min(left.div_ceil(sampling));
            sampling -= 1;
            let wanted = sequence.drafting.length(most, worth);
            let mut draft = match speculation.method {
                _ if wanted == 0 => Vec::new(),
                DraftMethod::Ngram { min, max } => lookup(&sequence.tokens, (min, max), wanted),
                DraftMethod::Model => sequence.proposed.iter().take(wanted).copied().collect(),
            };
            let room = loop {
                let sequence = self.running.get_mut(&id).expect("what is planned is running");
                let room = self.blocks.grow_for_drafts(sequence, draft.len(), spare);
                if room == draft.len() || !self.preempt_background_for(id) {
                    break room;
                }
            };
            draft.truncate(room);
            let sequence = &self.running[&id];
            if !draft.is_empty() {
                left -= draft.len();
                let end = sequence.tokens.len() + draft.len();
                step.block_table = sequence.table.blocks()[..end.div_ceil(self.blocks.block_size())].to_vec();
                step.draft = draft;
            }
            step.propose = match speculation.method {
                DraftMethod::Ngram { .. } => 0,
                DraftMethod::Model => sequence.drafting.length(speculation.num_speculative_tokens, worth),
            };
        }
    }

    /// Moves the earliest waiting sequence to the running ones, if it may start beside the `running` ones of its class.
    fn admit(&mut self, running: usize, now: Duration) -> Option<&Sequence> {
        if running >= self.max_num_seqs {
            return None;
        }
        let (&id, sequence) = self.waiting.first_key_value()?;
        if shares_soon(&self.blocks, self.running.values(), sequence) {
            return None;
        }
        // Each running sequence may need one block within the next `block_size` steps. Without them to
        // spare, whoever is admitted now would soon be preempted again.
        while !self.blocks.admit(self.waiting.get_mut(&id)?, running) {
            if !self.preempt_background_for(id) {
                return None;
            }
        }
        let mut sequence = self.waiting.remove(&id)?;
        if sequence.start.is_none() {
            let cached_tokens = sequence.num_computed;
            sequence.start = Some(Start { at: now, cached_tokens });
            self.left_queue[usize::from(id.is_background())] += 1;
            let looked_up = if sequence.prompt_scores.is_some() { 0 } else { sequence.prompt_len };
            self.counters.prefix_query_tokens += looked_up as u64;
            self.counters.prefix_hit_tokens += cached_tokens as u64;
        }
        Some(self.running.entry(sequence.id).or_insert(sequence))
    }

    /// Blocks that must be cleared before the step just planned, whoever holds them by now: nothing was
    /// computed in them since they were taken back.
    pub fn take_unclean(&mut self) -> Vec<BlockId> {
        std::mem::take(&mut self.unclean)
    }

    /// Takes all blocks from the running sequence that came last. It is the first of the waiting of its class then.
    fn preempt_latest(&mut self) -> RequestId {
        let (id, mut sequence) = self.running.pop_last().expect("whoever lacks a block is running");
        self.unclean.extend(self.blocks.release_unfinished(&mut sequence));
        self.waiting.insert(id, sequence);
        self.counters.preemptions += u64::from(!id.is_background());
        id
    }

    /// Takes the blocks of a background sequence, if there is one that has some and `id` is of the foreground.
    fn preempt_background_for(&mut self, id: RequestId) -> bool {
        let holds = !id.is_background() && self.running.keys().next_back().is_some_and(|last| last.is_background());
        if holds {
            self.preempt_latest();
        }
        holds
    }

    /// Takes the result of the planned step, entry by entry.
    pub fn commit(&mut self, plan: &StepPlan, output: StepOutput, now: Duration) -> Vec<RequestOutput> {
        let mut outputs = Vec::new();
        self.counters.step_tokens.observe(plan.num_tokens());
        for (step, result) in plan.sequences.iter().zip(output.sequences) {
            let id = RequestId(step.id);
            let sequence = self.running.get_mut(&id).expect("what is planned is running until committed");
            let end = step.num_computed + step.tokens.len();
            self.counters.prompt_tokens_computed +=
                end.min(sequence.prompt_len).saturating_sub(step.num_computed) as u64;
            sequence.num_computed = end;
            let sampled = match result.scores {
                // Whatever was sampled came of the same values.
                Err(failure) => vec![Err(failure)],
                Ok(scores) => {
                    if !scores.is_empty() {
                        let event = OutputEvent::PromptScores(sequence.take_scores(scores));
                        outputs.push(RequestOutput { id, event });
                    }
                    result.sampled
                }
            };
            if !sampled.is_empty() {
                sequence.proposed = result.proposed;
                outputs.extend(self.take_samples(id, &step.draft, sampled, now));
            }
        }
        outputs
    }

    /// Takes what was sampled for a sequence, token by token: each is judged as if it had come alone, and what was
    /// sampled behind an end is forgotten.
    fn take_samples(
        &mut self,
        id: RequestId,
        draft: &[u32],
        sampled: Vec<Result<SampledToken, SequenceFailure>>,
        now: Duration,
    ) -> Vec<RequestOutput> {
        let mut outputs = Vec::new();
        let mut end = None;
        let sequence = self.running.get_mut(&id).expect("what is planned is running until committed");
        let known = sequence.tokens.len();
        for sampled in sampled {
            let Ok(SampledToken { token, logprob, top }) = sampled else {
                end = Some(FinishReason::Error(EngineFailure::NonFiniteLogits));
                break;
            };
            // A sample behind a draft: it was accepted, and is computed.
            sequence.num_computed = sequence.tokens.len();
            self.blocks.publish(sequence);
            sequence.tokens.push(token);
            sequence.first_token_at.get_or_insert(now);
            self.counters.generated_tokens += 1;

            let stop = sequence.stop_token_ids.contains(&token).then_some(FinishReason::Stop { token });
            if stop.is_none() {
                outputs.push(RequestOutput { id, event: OutputEvent::Token { token, logprob, top } });
            }
            let length = (sequence.num_output() >= sequence.max_tokens).then_some(FinishReason::Length);
            end = stop.or(length);
            if end.is_some() {
                break;
            }
        }
        if draft.is_empty() {
            sequence.drafting.without();
        } else {
            let accepted =
                draft.iter().zip(&sequence.tokens[known..]).take_while(|(draft, token)| draft == token).count();
            sequence.drafting.judged(draft.len(), accepted);
            let stats = self.counters.speculation.as_mut().expect("there are drafts");
            stats.observe(draft.len(), accepted);
        }
        match end {
            None => self.blocks.trim(sequence),
            Some(reason) => outputs.push(self.end_running(id, reason, now)),
        }
        outputs
    }

    /// Ends a sequence by what its step gave.
    fn end_running(&mut self, id: RequestId, reason: FinishReason, now: Duration) -> RequestOutput {
        let mut sequence = self.running.remove(&id).expect("what is planned is running until committed");
        match reason {
            FinishReason::Error(_) => self.unclean.extend(self.blocks.discard(&mut sequence)),
            _ => self.blocks.release(&mut sequence),
        }
        self.finish(sequence, reason, now)
    }

    /// Ends a request at the client's wish. `None` if it has ended already.
    pub fn abort(&mut self, id: RequestId, now: Duration) -> Option<RequestOutput> {
        let mut sequence = self.running.remove(&id).or_else(|| self.waiting.remove(&id))?;
        self.unclean.extend(self.blocks.release_unfinished(&mut sequence));
        Some(self.finish(sequence, FinishReason::Aborted, now))
    }

    /// Ends all sequences that hold blocks after a step that failed as a whole, and forgets all cached blocks:
    /// nobody knows what the step left in the cache. The waiting ones have nothing there and go on.
    pub fn fail_running(&mut self, failure: &EngineFailure, now: Duration) -> Vec<RequestOutput> {
        let mut outputs = Vec::new();
        while let Some((_, mut sequence)) = self.running.pop_first() {
            self.unclean.extend(self.blocks.discard(&mut sequence));
            outputs.push(self.finish(sequence, FinishReason::Error(failure.clone()), now));
        }
        self.unclean.extend(self.blocks.forget_cached());
        self.counters.failed_steps += 1;
        outputs
    }

    /// Ends everything.
    pub fn fail_all(&mut self, failure: &EngineFailure, now: Duration) -> Vec<RequestOutput> {
        let all =
            std::mem::take(&mut self.running).into_values().chain(std::mem::take(&mut self.waiting).into_values());
        let all: Vec<Sequence> = all.collect();
        all.into_iter()
            .map(|mut sequence| {
                self.blocks.release(&mut sequence);
                self.finish(sequence, FinishReason::Error(failure.clone()), now)
            })
            .collect()
    }

    /// The last event of a sequence that is neither running nor waiting any more and holds no block.
    fn finish(&mut self, sequence: Sequence, reason: FinishReason, now: Duration) -> RequestOutput {
        debug_assert!(sequence.table.blocks().is_empty(), "an ended sequence holds no block");
        if sequence.start.is_none() {
            self.left_queue[usize::from(sequence.id.is_background())] += 1;
        }
        let finished = &mut self.counters.finished;
        match reason {
            FinishReason::Stop { .. } => finished.stop += 1,
            FinishReason::Length => finished.length += 1,
            FinishReason::Aborted => finished.aborted += 1,
            FinishReason::Error(ref failure) => {
                finished.error += 1;
                finished.non_finite_logits += u64::from(*failure == EngineFailure::NonFiniteLogits);
            }
        }
        let event = OutputEvent::Finished { reason, usage: sequence.usage(), timings: sequence.timings(now) };
        RequestOutput { id: sequence.id, event }
    }
}

/// What the simulator looks at, and how it breaks things to see its checks fail.
#[cfg(test)]
impl Scheduler {
    pub fn limits(&self) -> (usize, usize) {
        (self.max_num_seqs, self.max_num_batched_tokens)
    }

    pub fn running(&self) -> &BTreeMap<RequestId, Sequence> {
        &self.running
    }

    pub fn waiting(&self) -> &BTreeMap<RequestId, Sequence> {
        &self.waiting
    }

    pub fn check_blocks(&self) -> Result<(), String> {
        self.blocks.check(self.running.values().chain(self.waiting.values()))
    }

    pub fn leak_a_block(&mut self) {
        self.blocks.leak();
    }

    /// Leaves a running sequence a block that only drafts needed.
    pub fn keep_a_draft_block(&mut self) {
        let block_size = self.blocks.block_size();
        let sequence = self.running.values_mut().next().expect("something runs");
        assert!(self.blocks.grow_for_drafts(sequence, block_size, 0) > 0, "a block is left");
    }

    pub fn miscount_a_draft(&mut self) {
        self.counters.speculation.as_mut().expect("there are drafts").accepted_tokens += 1;
    }

    pub fn miscount_a_token(&mut self) {
        self.counters.generated_tokens += 1;
    }

    /// Forgets the earliest running sequence without an event.
    pub fn lose_a_sequence(&mut self) {
        let (_, mut sequence) = self.running.pop_first().expect("something runs");
        self.blocks.release(&mut sequence);
    }
}

/// Whether a running choice of the same request still computes blocks that `sequence` will share. The background shares
/// none of its own.
fn shares_soon<'a>(
    blocks: &BlockManager,
    mut running: impl Iterator<Item = &'a Sequence>,
    sequence: &Sequence,
) -> bool {
    !sequence.id.is_background()
        && blocks.shareable_blocks(sequence, sequence.prompt_len) > 0
        && running.any(|other| other.group == sequence.group && other.num_pending() > 1)
}
