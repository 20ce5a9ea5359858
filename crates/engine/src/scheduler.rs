//! Which sequence computes which tokens in the next step: a state machine over values. Time is an
//! argument, maps are ordered, and nothing here blocks or fails, so that a seed replays any run.
//!
//! A step is [`schedule`](Scheduler::schedule), the runner's work, and [`commit`](Scheduler::commit). While the runner works,
//! the step behind it may be [planned ahead](Scheduler::schedule_ahead). Requests are added and aborted when a step was
//! committed and before the next is planned; a step that was begun ahead may be under way then.
//!
//! There are two classes of sequences, foreground and background. A step is of one class: of the background only if
//! nothing of the foreground runs or waits. Meanwhile background sequences keep their blocks, until the foreground needs
//! them.
//!
//! Invariant: of each class the first by [`Rank`] (priority, then arrival) of those that wait is the next to be admitted,
//! and the last of those that run is the first to be preempted. So nobody is overtaken by its equals, and the first of
//! all always makes progress, alone in the whole cache if it must: behind it whoever has a worse priority waits as long
//! as better ones keep coming. Nobody who runs is preempted for one who waits. And the steps of the foreground are
//! what they would be without any background, but for the prefixes that the background's blocks displaced from the
//! cache.

mod ahead;
mod commit;

use std::collections::BTreeMap;
use std::time::Duration;

use baton_model::{RunSpec, SequenceStep, StepPlan};

use crate::block::BlockId;
use crate::block_manager::{BlockHasher, BlockManager};
use crate::constrain::MaskJob;
use crate::sequence::{Rank, Sequence, Start};
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
    /// Blocks that the step under way writes for sequences that have ended since it was begun. They're held until it has
    /// said whether these values are finite.
    in_doubt: BTreeMap<RequestId, BlockId>,
    /// Sequences that hold blocks. Each is part of every step of its class.
    running: BTreeMap<RequestId, Sequence>,
    /// Sequences that hold nothing: new and preempted ones.
    waiting: BTreeMap<Rank, Sequence>,
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
            in_doubt: BTreeMap::new(),
            running: BTreeMap::new(),
            waiting: BTreeMap::new(),
            left_queue: [0; 2],
            counters,
        }
    }

    /// Adds a request that the engine can finish. Its id is larger than all before in its class. Ends it at once if its
    /// adapter is of a runner that is gone.
    pub fn add(&mut self, mut sequence: Sequence, now: Duration) -> Option<RequestOutput> {
        let is_background = sequence.id.is_background();
        let is_later = |other: &Sequence| other.id < sequence.id || other.id.is_background() != is_background;
        debug_assert!(self.waiting.values().all(is_later));
        if !sequence.renew_adapter() {
            return Some(self.finish(sequence, FinishReason::Error(EngineFailure::AdapterLost), now));
        }
        self.waiting.insert(sequence.rank(), sequence);
        None
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
        let is_foreground = |sequence: &&Sequence| !sequence.id.is_background();
        let running = self.running.values().filter(is_foreground);
        let waiting = self.waiting.values().filter(is_foreground);
        let adapters = |sequence: &Sequence| Some(*sequence.adapter.as_ref()?.digest());
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

    /// Plans a step, after `expire(now)`, when none is under way. It is empty only if the scheduler is idle.
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
    /// 1. Running sequences, first by rank, get the blocks that they miss. If there are too few, the last by rank
    ///    gives its own up, waits again and later computes from its tokens what it lost.
    /// 2. They get what they miss of the budget. All but one miss one token, since nobody is admitted before the
    ///    latest has all it misses, and that one goes last; so each gets some.
    /// 3. Waiting sequences, first by rank, are admitted while budget, places and blocks last. The
    ///    first that cannot be admitted ends the step's plan: nobody passes it.
    /// 4. Drafts take what is left of budget and blocks, and nobody's place.
    ///
    /// In each of these the blocks of background sequences are there for the foreground, the last's first.
    pub fn schedule(&mut self, now: Duration) -> StepPlan {
        let mut plan = StepPlan::default();
        let mut budget = self.max_num_batched_tokens;
        let block_size = self.blocks.block_size();
        let background = self.is_background_turn();
        let of_class = |id: &RequestId| id.is_background() == background;
        let mut preempted_own = false;

        let mut ranks: Vec<Rank> =
            self.running.values().map(Sequence::rank).filter(|rank| of_class(&rank.id)).collect();
        ranks.sort_unstable();
        for rank in &ranks {
            // Gone if it was preempted, and then so were all after it.
            while let Some(sequence) = self.running.get_mut(&rank.id) {
                if self.blocks.grow(sequence, sequence.tokens.len()) {
                    break;
                }
                preempted_own |= of_class(&self.preempt_last());
            }
        }
        let mut running: Vec<&Sequence> = ranks.iter().filter_map(|rank| self.running.get(&rank.id)).collect();
        running.sort_by_key(|sequence| sequence.num_pending() > 1);
        for sequence in running {
            let n = sequence.num_pending().min(budget);
            debug_assert!(n > 0, "every running sequence is part of every step of its class");
            plan.sequences.push(sequence.step(n, block_size));
            budget -= n;
        }

        // Blocks that a preemption among equals just set free are for those that run.
        while !preempted_own && budget > 0 && self.waiting.keys().next().is_some_and(|rank| of_class(&rank.id)) {
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
        let first = [self.running.keys().next(), self.waiting.keys().next().map(|rank| &rank.id)];
        first.into_iter().flatten().all(|id| id.is_background())
    }

    /// Adds drafts to the sequences of a step that sample, in equal parts of the rows that are left.
    fn add_drafts(&mut self, plan: &mut StepPlan) {
        let Some(speculation) = self.speculation.clone() else { return };
        let mut left = self.rows_for_drafts(plan.num_tokens());
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

    /// Rows that drafts may have beside so many of tokens.
    fn rows_for_drafts(&self, tokens: usize) -> usize {
        let most = |speculation: &SpeculationConfig| speculation.disable_by_batch_size.min(self.max_num_batched_tokens);
        self.speculation.as_ref().map_or(0, most).saturating_sub(tokens)
    }

    /// Moves the first waiting sequence to the running ones, if it may start beside the `running` ones of its class.
    fn admit(&mut self, running: usize, now: Duration) -> Option<&Sequence> {
        if running >= self.max_num_seqs {
            return None;
        }
        let (&rank, sequence) = self.waiting.first_key_value()?;
        let id = rank.id;
        if shares_soon(&self.blocks, self.running.values(), sequence) {
            return None;
        }
        // Each running sequence may need one block within the next `block_size` steps. Without them to
        // spare, whoever is admitted now would soon be preempted again.
        while !self.blocks.admit(self.waiting.get_mut(&rank)?, running) {
            if !self.preempt_background_for(id) {
                return None;
            }
        }
        let mut sequence = self.waiting.remove(&rank)?;
        if sequence.start.is_none() {
            let cached_tokens = sequence.num_computed;
            sequence.start = Some(Start { at: now, cached_tokens });
            self.left_queue[usize::from(id.is_background())] += 1;
            let looked_up = if sequence.num_cacheable() == 0 { 0 } else { sequence.prompt_len };
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

    /// The running sequence that is the first to lose its blocks.
    fn last(&self) -> Option<&Sequence> {
        self.running.values().max_by_key(|sequence| sequence.rank())
    }

    /// Takes all blocks from the last running sequence, which waits then.
    fn preempt_last(&mut self) -> RequestId {
        let id = self.last().expect("whoever lacks a block is running").id;
        let mut sequence = self.running.remove(&id).expect("it was just found");
        debug_assert!(!sequence.is_begun_ahead(), "it will run again, and what is under way would be of its past");
        self.unclean.extend(self.blocks.release_unfinished(&mut sequence));
        self.waiting.insert(sequence.rank(), sequence);
        self.counters.preemptions += u64::from(!id.is_background());
        id
    }

    /// Takes the blocks of a background sequence, if there is one that has some and `id` is of the foreground.
    fn preempt_background_for(&mut self, id: RequestId) -> bool {
        let holds = !id.is_background() && self.last().is_some_and(|last| last.id.is_background());
        if holds {
            self.preempt_last();
        }
        holds
    }

    /// The work of making the masks of a planned step; `None` where it needs none.
    pub fn mask_job(&mut self, step: &SequenceStep) -> Option<MaskJob> {
        let masks = step.sample.as_ref()?.masks.clone()?;
        self.running.get_mut(&RequestId(step.id))?.mask_job(&step.draft, masks)
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

    pub fn waiting(&self) -> BTreeMap<RequestId, &Sequence> {
        self.waiting.values().map(|sequence| (sequence.id, sequence)).collect()
    }

    pub fn check_blocks(&self) -> Result<(), String> {
        let sequences = self.running.values().chain(self.waiting.values());
        self.blocks.check(sequences.flat_map(|sequence| sequence.table.blocks()).chain(self.in_doubt.values()))
    }

    pub fn in_doubt(&self) -> &BTreeMap<RequestId, BlockId> {
        &self.in_doubt
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
