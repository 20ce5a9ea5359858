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
//! Who goes first is decided by class, then between tenants by what they [were served](baton_fairness::Ledger), then within a tenant
//! by priority and arrival.
//!
//! Invariant: the first of those that wait is the next to be admitted, and the last of those that run is the first to be
//! preempted. So within a tenant nobody is overtaken by its equals, and the first of all always makes progress, alone in
//! the whole cache if it must: behind it whoever has a worse priority waits as long as its tenant's better ones keep coming.
//! Nobody who runs is preempted for one who waits, but for a tenant that holds far fewer places than it: see
//! [`gives_way`](Scheduler::gives_way). And the steps of the foreground are what they would be without any background, but
//! for the prefixes that the background's blocks displaced from the cache.

mod ahead;
mod commit;
mod queue;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use baton_model::{RunSpec, SequenceStep, StepPlan};

use crate::block::Blocks;
use crate::block_manager::{Beginning, BlockHasher, BlockManager};
use crate::constrain::MaskJob;
use crate::intake::Amount;
use crate::scheduler::queue::{Queue, Urgency};
use crate::sequence::{Sequence, Start};
use crate::speculate::{lookup, worth};
use crate::{
    DraftMethod, EngineConfig, EngineFailure, EngineStats, FinishReason, OutputEvent, RequestId, SpeculationConfig,
    SpeculationStats, Tenant,
};

/// What a token of a prompt counts for its tenant, and one of an output: those come one by one, each in a step.
pub(crate) const PROMPT_TOKEN: u64 = 1;
pub(crate) const OUTPUT_TOKEN: u64 = 2;

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
    unclean: Blocks,
    /// Blocks that the step under way writes for sequences that have ended since it was begun. They're held until it has
    /// said whether these values are finite.
    in_doubt: BTreeMap<RequestId, Blocks>,
    /// Sequences that hold blocks. Each is part of every step of its class.
    running: BTreeMap<RequestId, Sequence>,
    /// Sequences that hold nothing: new and preempted ones.
    waiting: Queue,
    /// Requests that started, or ended without starting: of the foreground, and of the background.
    left_queue: [Amount; 2],
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
            blocks: BlockManager::new(spec, hasher),
            unclean: Blocks::default(),
            in_doubt: BTreeMap::new(),
            running: BTreeMap::new(),
            waiting: Queue::default(),
            left_queue: [Amount::default(); 2],
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
        if !self.runs(is_background) && !self.waiting.has(is_background) {
            self.waiting.forget(is_background);
        }
        self.waiting.insert(sequence);
        None
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Requests that started, or ended without starting, so far: of the foreground, and of the background.
    pub fn left_queue(&self) -> [Amount; 2] {
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
            passing_blocks: self.blocks.passing_stats(),
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
    /// 1. Running sequences, first by urgency, get the blocks that they miss. If there are too few, the last gives its own
    ///    up, waits again and later computes from its tokens what it lost.
    /// 2. Each running sequence has a row of the budget. All, first by urgency, get what else they miss, and those that
    ///    wait are admitted in their place among them, while budget, places and blocks last. Nobody passes the first, also
    ///    if it cannot be admitted; but what the step does for its tenant may make another's the first.
    /// 3. Drafts take what is left of budget and blocks, and nobody's place.
    ///
    /// In each of these the blocks of background sequences are there for the foreground, the last's first. Tenants are
    /// charged for prompts as they are planned, so that several are admitted in turn, and for outputs when they are there.
    pub fn schedule(&mut self, now: Duration) -> StepPlan {
        let mut plan = StepPlan::default();
        let background = self.is_background_turn();
        let of_class = |id: &RequestId| id.is_background() == background;
        let mut preempted_own = false;

        let mut behind = self.in_order(background);
        for urgency in &behind {
            // Gone if it was preempted, and then so were all after it.
            while let Some(sequence) = self.running.get_mut(&urgency.id()) {
                if self.blocks.grow(sequence, sequence.tokens.len()) {
                    break;
                }
                preempted_own |= of_class(&self.preempt_last());
            }
        }
        behind.retain(|urgency| self.running.contains_key(&urgency.id()));
        let mut left = self.max_num_batched_tokens;
        let mut refused = None;
        loop {
            // Blocks that a preemption among equals just set free are for those that run.
            while !preempted_own
                && left >= behind.len().max(1)
                && let Some(first) = self.waiting.first().filter(|first| of_class(&first.id()))
                && refused != Some(first.id())
                && behind.front().is_none_or(|next| first < *next)
            {
                if self.admit(&first, (plan.sequences.len(), left), &mut behind, now) {
                    left -= self.plan(first.id(), left - behind.len(), &mut plan);
                } else {
                    refused = Some(first.id());
                }
            }
            let Some(next) = behind.pop_front() else { break };
            left -= self.plan(next.id(), left - behind.len(), &mut plan);
        }
        self.add_drafts(&mut plan);
        self.begun(&plan);
        plan
    }

    /// Adds a running sequence to the plan, with as many of its tokens as there is room for; returns how many.
    fn plan(&mut self, id: RequestId, room: usize, plan: &mut StepPlan) -> usize {
        let sequence = self.running.get_mut(&id).expect("who is planned runs");
        let n = sequence.num_left().min(room);
        debug_assert!(n > 0, "every running sequence is part of every step of its class");
        let uncharged = sequence.take_uncharged(n) as u64;
        self.waiting.charge(sequence, uncharged * PROMPT_TOKEN);
        self.blocks.give_passing(sequence, sequence.next() + n);
        plan.sequences.push(sequence.step(n, self.blocks.block_size()));
        n
    }

    /// A planned step is under way from now on.
    fn begun(&mut self, plan: &StepPlan) {
        for step in &plan.sequences {
            let sequence = self.running.get_mut(&RequestId(step.id)).expect("what is planned is running");
            sequence.num_begun = step.num_computed + step.tokens.count();
        }
    }

    /// The running sequences of a class, the first to go first.
    fn in_order(&self, background: bool) -> VecDeque<Urgency> {
        let of_class = self.running.values().filter(|sequence| sequence.id.is_background() == background);
        let mut order: Vec<Urgency> = of_class.map(|sequence| self.waiting.urgency(sequence)).collect();
        order.sort_unstable();
        order.into()
    }

    /// Whether the next step is of the background: there is nothing else.
    pub fn is_background_turn(&self) -> bool {
        !self.runs(false) && !self.waiting.has(false)
    }

    /// Whether anything of the background runs, or of the foreground.
    fn runs(&self, background: bool) -> bool {
        let id = if background { self.running.keys().next_back() } else { self.running.keys().next() };
        id.is_some_and(|id| id.is_background() == background)
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
            let sequence = self.running.get_mut(&id).expect("what is planned is running");
            if !draft.is_empty() {
                left -= draft.len();
                let end = sequence.tokens.len() + draft.len();
                self.blocks.give_passing(sequence, end);
                let blocks = sequence.table.first(end.div_ceil(self.blocks.block_size()));
                (step.block_table, step.passing_table) = (blocks.kept, blocks.passing);
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

    /// Moves the first that waits to the running ones, if it may start beside those of its class that are `planned` and
    /// those `behind` it, of whom some may give way; for all of these `left` tokens are left in the step.
    fn admit(
        &mut self,
        first: &Urgency,
        (planned, left): (usize, usize),
        behind: &mut VecDeque<Urgency>,
        now: Duration,
    ) -> bool {
        let (rank, id) = (first.rank(), first.id());
        let sequence = self.waiting.get(rank).expect("it waits");
        if shares_soon(&self.blocks, self.running.values(), sequence) {
            return false;
        }
        let beginning = self.beginning(first, planned + behind.len());
        let Some(give_way) = self.who_gives_way(first, (planned, left), &beginning, behind) else { return false };
        for id in give_way {
            behind.retain(|urgency| urgency.id() != id);
            self.preempt(id);
        }
        self.blocks.admit(self.waiting.get_mut(rank).expect("it waits"), beginning);
        let mut sequence = self.waiting.start(rank).expect("it waits");
        if sequence.start.is_none() {
            let cached_tokens = sequence.num_computed;
            sequence.start = Some(Start { at: now, cached_tokens });
            self.leaves_queue(&sequence);
            let looked_up = if sequence.num_cacheable() == 0 { 0 } else { sequence.prompt_len };
            self.counters.prefix_query_tokens += looked_up as u64;
            self.counters.prefix_hit_tokens += cached_tokens as u64;
        }
        self.running.insert(id, sequence);
        true
    }

    /// How the first that waits would begin beside so many others, for whose blocks the background gives way.
    fn beginning(&mut self, first: &Urgency, others: usize) -> Beginning {
        loop {
            let beginning = self.blocks.beginning(self.waiting.get_mut(first.rank()).expect("it waits"));
            let are_there = self.blocks.available() >= beginning.needed + others;
            if are_there || !self.preempt_background_for(first.id()) {
                return beginning;
            }
        }
    }

    /// Those `behind` it who give way to `first`, which begins so, beside what is `planned`, until there are a place, a row and
    /// blocks for it; `None` if that is not enough, for nobody gives way for nothing. Each running sequence may need one block
    /// within the next `block_size` steps: without them to spare, whoever is admitted now would soon be preempted again.
    fn who_gives_way(
        &self,
        first: &Urgency,
        (planned, left): (usize, usize),
        beginning: &Beginning,
        behind: &VecDeque<Urgency>,
    ) -> Option<Vec<RequestId>> {
        let (mut staying, mut available, mut gone) = (behind.len(), self.blocks.available(), Vec::new());
        let fits = |staying: usize, available: usize| {
            planned + staying < self.max_num_seqs && staying < left && available >= beginning.needed + planned + staying
        };
        if fits(staying, available) {
            return Some(gone);
        }
        let (mut held, mut others) = (self.held(), behind.clone());
        while !fits(staying, available) {
            let next = others.remove(self.gives_way(first, &held, &others)?)?;
            staying -= 1;
            available += self.blocks.freed_for(beginning, &self.running[&next.id()]);
            *held.get_mut(&next.tenant()).expect("it holds a place") -= 1;
            gone.push(next.id());
        }
        Some(gone)
    }

    /// Places of the foreground that each tenant holds.
    fn held(&self) -> BTreeMap<Tenant, u64> {
        let mut held = BTreeMap::new();
        for sequence in self.running.values().filter(|sequence| !sequence.id.is_background()) {
            *held.entry(sequence.share.tenant).or_default() += 1;
        }
        held
    }

    /// Which of the running ones `behind` it gives way to `first`, which waits, where tenants hold so many places: the last of
    /// the tenant that holds the most places for its weight, if `first`'s holds not half as many, also with one more, and it
    /// keeps others.
    ///
    /// So a tenant that comes to an engine which another one fills need not wait for any of its requests to end. It gets a
    /// third of the places in this way; the rest as they become free. What one takes, the other cannot take back.
    fn gives_way(&self, first: &Urgency, held: &BTreeMap<Tenant, u64>, behind: &VecDeque<Urgency>) -> Option<usize> {
        let own = held.get(&first.tenant()).copied().unwrap_or_default() + 1;
        let weight = |sequence: &Sequence| u64::from(sequence.share.weight.max(1));
        let own_weight = weight(self.waiting.get(first.rank())?);
        let others = behind.iter().enumerate().filter(|(_, other)| other.tenant() != first.tenant());
        let load = |(index, other): (usize, &Urgency)| {
            let (held, weight) = (held.get(&other.tenant())?, weight(self.running.get(&other.id())?));
            let gives = *held > 1 && 2 * own * weight <= held * own_weight;
            // In whole parts of a place, as far as it matters.
            gives.then_some(((held << 20) / weight, index))
        };
        others.filter_map(load).max().map(|(_, index)| index)
    }

    /// A request has started, or ended without starting.
    fn leaves_queue(&mut self, sequence: &Sequence) {
        self.left_queue[usize::from(sequence.id.is_background())].add(sequence.prompt_len);
    }

    /// Blocks that must be cleared before the step just planned, whoever holds them by now: nothing was
    /// computed in them since they were taken back.
    pub fn take_unclean(&mut self) -> Blocks {
        std::mem::take(&mut self.unclean)
    }

    /// The running sequence that is the first to lose its blocks.
    fn last(&self) -> Option<&Sequence> {
        self.running.values().max_by_key(|sequence| self.waiting.urgency(sequence))
    }

    /// Takes all blocks from the last running sequence, which waits then.
    fn preempt_last(&mut self) -> RequestId {
        let id = self.last().expect("whoever lacks a block is running").id;
        self.preempt(id);
        id
    }

    /// Takes all blocks from a running sequence, which waits then.
    fn preempt(&mut self, id: RequestId) {
        let mut sequence = self.running.remove(&id).expect("it runs");
        debug_assert!(!sequence.is_under_way(), "it will run again, and what is under way would be of its past");
        self.unclean.extend(self.blocks.release_unfinished(&mut sequence));
        self.waiting.insert(sequence);
        self.counters.preemptions += u64::from(!id.is_background());
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
        let mut held = Blocks::default();
        for sequence in self.running.values().chain(self.waiting.values()) {
            let table = &sequence.table;
            held.extend(Blocks { kept: table.blocks().to_vec(), passing: table.passing().to_vec() });
        }
        self.in_doubt.values().for_each(|blocks| held.extend(blocks.clone()));
        self.blocks.check(&held)
    }

    pub fn in_doubt(&self) -> &BTreeMap<RequestId, Blocks> {
        &self.in_doubt
    }

    /// The first of those that wait, of the class whose turn it is.
    pub fn first_waiting(&self) -> Option<RequestId> {
        let background = self.is_background_turn();
        self.waiting.first().map(|first| first.id()).filter(|id| id.is_background() == background)
    }

    /// Breaks the order between tenants.
    pub fn plant(&mut self, fault: baton_fairness::Fault) {
        self.waiting.plant(fault);
    }

    pub fn leak_a_block(&mut self) {
        self.blocks.leak();
    }

    pub fn leak_a_passing_block(&mut self) {
        self.blocks.leak_passing();
    }

    /// Gives a running sequence passing blocks for tokens that no step computes.
    pub fn give_too_much(&mut self) {
        let sequence = self.running.values_mut().next().expect("something runs");
        let end = sequence.num_computed + 3 * self.blocks.block_size();
        self.blocks.give_passing(sequence, end);
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
        && running.any(|other| other.group == sequence.group && other.num_left() > 1)
}
