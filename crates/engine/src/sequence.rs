//! The scheduler's view of one request: what is known, what is computed, where it lies.
//! No channel, no text, no clock, no cache memory.

use std::sync::Arc;
use std::time::Duration;

use baton_model::{Adapter, SampleRequest, SamplingParams, Score, ScoreRequest, SequenceStep, StepMasks, Tokens};

use crate::block_manager::BlockTable;
use crate::constrain::{Constrained, MaskJob};
use crate::speculate::Drafting;
use crate::{
    CacheScope, EngineFailure, HiddenStates, PositionScore, PromptScores, Request, RequestId, Share, Tenant, Timings,
    Usage,
};

/// A request under way.
pub(crate) struct Sequence {
    pub id: RequestId,
    pub class: Class,
    pub share: Share,
    pub priority: i32,
    /// The id of the first choice of its request.
    pub group: RequestId,
    /// Prompt, then output.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// Tokens whose keys and values are in `table`, from the first on.
    pub num_computed: usize,
    /// Tokens of the prompt that its tenant was charged for, or that were in the cache, from the first on: computed again,
    /// they cost nothing.
    pub num_charged: usize,
    /// As `num_computed` once the steps under way have ended, but for drafts; not above it if there is none.
    pub num_begun: usize,
    /// Blocks for all of `tokens` while it runs, and passing ones for the last that were planned; empty while it waits.
    pub table: BlockTable,
    pub scope: CacheScope,
    pub adapter: Option<Adapter>,
    pub params: Arc<SamplingParams>,
    pub max_tokens: usize,
    pub stop_token_ids: Vec<u32>,
    /// `None` without a grammar.
    pub constrained: Option<Constrained>,
    pub prompt_scores: Option<PromptScores>,
    /// Positions of the prompt whose scores were told, from the first on.
    pub num_scored: usize,
    /// A sequence that has not started by then never does.
    pub start_by: Option<Duration>,
    /// A sequence that has not ended by then is ended.
    pub end_by: Option<Duration>,
    pub arrival: Duration,
    /// Set by the first step.
    pub start: Option<Start>,
    pub first_token_at: Option<Duration>,
    pub drafting: Drafting,
    /// What the runner guesses to follow `tokens`.
    pub proposed: Vec<u32>,
}

/// The first time a sequence was given blocks.
#[derive(Clone, Copy)]
pub(crate) struct Start {
    pub at: Duration,
    /// Prompt tokens found in the cache then.
    pub cached_tokens: usize,
}

/// Which of all goes first, whosever it is: the smaller one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    Foreground,
    /// Of the foreground too, but behind those for whom somebody waits.
    Batch,
    Background,
}

impl Class {
    pub fn of(id: RequestId, request: &Request) -> Self {
        match (id.is_background(), request.batch) {
            (true, _) => Self::Background,
            (false, true) => Self::Batch,
            (false, false) => Self::Foreground,
        }
    }
}

/// Who goes first of the same class and tenant: the smaller one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub class: Class,
    pub tenant: Tenant,
    pub priority: i32,
    pub id: RequestId,
}

impl Sequence {
    pub fn new(id: RequestId, group: RequestId, request: Request, arrival: Duration) -> Self {
        // Of the others nothing is told.
        let last_alone = request.prompt_scores.as_ref().is_some_and(|scores| scores.hidden == Some(HiddenStates::Last));
        let num_scored = if last_alone { request.prompt.len().saturating_sub(1) } else { 0 };
        Self {
            id,
            class: Class::of(id, &request),
            share: request.share,
            priority: request.priority,
            group,
            prompt_len: request.prompt.len(),
            tokens: request.prompt,
            num_computed: 0,
            num_charged: 0,
            num_begun: 0,
            table: BlockTable::default(),
            scope: request.cache_scope,
            adapter: request.adapter,
            params: Arc::new(request.params),
            max_tokens: request.max_tokens as usize,
            constrained: request.grammar.map(|grammar| Constrained::new(grammar, request.stop_token_ids.clone())),
            stop_token_ids: request.stop_token_ids,
            prompt_scores: request.prompt_scores,
            num_scored,
            start_by: request.deadline.map(|deadline| arrival.saturating_add(deadline)),
            end_by: request.time_limit.map(|limit| arrival.saturating_add(limit)),
            arrival,
            start: None,
            first_token_at: None,
            drafting: Drafting::new(),
            proposed: Vec::new(),
        }
    }

    /// Takes its adapter as the present runner has it; false if that does not have it.
    pub fn renew_adapter(&mut self) -> bool {
        let Some(adapter) = &self.adapter else { return true };
        self.adapter = adapter.current();
        self.adapter.is_some()
    }

    pub fn rank(&self) -> Rank {
        Rank { class: self.class, tenant: self.share.tenant, priority: self.priority, id: self.id }
    }

    /// The first token that no step under way computes.
    pub fn next(&self) -> usize {
        self.num_begun.max(self.num_computed)
    }

    /// Tokens known and not computed, nor being computed by a step under way: at least one if there is none, or there would be
    /// nothing to sample from.
    pub fn num_left(&self) -> usize {
        self.tokens.len() - self.next()
    }

    /// The next `n` tokens are part of a step: those of the prompt that were not charged for before, and are from now on.
    pub fn take_uncharged(&mut self, n: usize) -> usize {
        let from = self.num_charged.max(self.next());
        let to = (self.next() + n).min(self.prompt_len);
        self.num_charged = from.max(to);
        to.saturating_sub(from)
    }

    /// Tokens generated so far.
    pub fn num_output(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Whether a step under way computes tokens of it.
    pub fn is_under_way(&self) -> bool {
        self.num_begun > self.num_computed
    }

    /// Whether it ends with the next token, whatever that is.
    pub fn ends_next(&self) -> bool {
        self.num_output() + 1 >= self.max_tokens
    }

    /// Why it must end before the next step, if it should have started or ended by now.
    pub fn overdue(&self, now: Duration) -> Option<EngineFailure> {
        let passed = |time: Option<Duration>| time.is_some_and(|time| time <= now);
        if self.start.is_none() && passed(self.start_by) {
            return Some(EngineFailure::QueueTimeout);
        }
        passed(self.end_by).then_some(EngineFailure::DeadlineExceeded)
    }

    /// The work of making the masks of a step with these drafts; `None` without a grammar.
    pub fn mask_job(&mut self, draft: &[u32], masks: StepMasks) -> Option<MaskJob> {
        let output = &self.tokens[self.prompt_len..];
        Some(self.constrained.as_mut()?.job(output, draft, masks))
    }

    /// Drafts that could still become output: behind them one more token is sampled.
    pub fn max_drafts(&self) -> usize {
        self.max_tokens - self.num_output() - 1
    }

    /// The next `n` tokens as work for the runner, in blocks of `block_size`, without drafts.
    pub fn step(&self, n: usize, block_size: usize) -> SequenceStep {
        let (start, end) = (self.next(), self.next() + n);
        let blocks = self.table.first(end.div_ceil(block_size));
        SequenceStep {
            id: self.id.0,
            num_computed: start,
            tokens: Tokens::Known(self.tokens[start..end].to_vec()),
            block_table: blocks.kept,
            passing_table: blocks.passing,
            adapter: self.adapter.clone(),
            draft: Vec::new(),
            propose: 0,
            scores: self.score_requests(start, end),
            sample: (end == self.tokens.len()).then(|| self.sample_request(self.num_output())),
        }
    }

    /// Whether [`step`](Self::step) of so many tokens tells nothing but a plain draw, if anything.
    pub fn is_plain_draw(&self, n: usize) -> bool {
        let (start, end) = (self.next(), self.next() + n);
        self.score_requests(start, end).is_empty()
            && (end < self.tokens.len() || self.sample_request(self.num_output()).is_plain_draw())
    }

    /// The token that the step under way samples, as work for the runner. Blocks are there for it.
    pub fn step_awaited(&self) -> SequenceStep {
        SequenceStep {
            id: self.id.0,
            num_computed: self.tokens.len(),
            tokens: Tokens::Awaited,
            block_table: self.table.blocks().to_vec(),
            passing_table: self.table.passing().to_vec(),
            adapter: self.adapter.clone(),
            draft: Vec::new(),
            propose: 0,
            scores: Vec::new(),
            sample: Some(self.sample_request(self.num_output() + 1)),
        }
    }

    /// For the token of this index in the output.
    fn sample_request(&self, position: usize) -> SampleRequest {
        SampleRequest {
            params: self.params.clone(),
            position: position as u32,
            history: if self.params.needs_history() { self.tokens.clone() } else { Vec::new() },
            prompt_len: self.prompt_len,
            masks: self.constrained.as_ref().map(|_| StepMasks::default()),
        }
    }

    /// What is to be told of positions from `start` up to `end`, and was not told before.
    fn score_requests(&self, start: usize, end: usize) -> Vec<ScoreRequest> {
        let Some(PromptScores { top, targets, hidden }) = &self.prompt_scores else { return Vec::new() };
        let prompt = &self.tokens[..self.prompt_len];
        let request = |position: usize| {
            let row = position - start;
            if hidden.is_some() {
                return ScoreRequest { row, hidden: true, ..ScoreRequest::default() };
            }
            let targets = targets.get(&position).into_iter().flatten();
            let ids = prompt.get(position + 1).into_iter().chain(targets).copied().collect();
            ScoreRequest { row, ids, top: *top, hidden: false }
        };
        (start.max(self.num_scored)..end.min(prompt.len())).map(request).collect()
    }

    /// The answers to `score_requests`, for the client.
    pub fn take_scores(&mut self, scores: Vec<Score>) -> Vec<PositionScore> {
        let first = self.num_scored;
        self.num_scored += scores.len();
        let told = |(position, Score { logprobs, top, hidden }): (usize, Score)| {
            let mut targets = logprobs;
            let has_next = position + 1 < self.prompt_len && hidden.is_empty();
            let next = has_next.then(|| targets.remove(0));
            PositionScore { position, next, top, targets, hidden }
        };
        (first..).zip(scores).map(told).collect()
    }

    /// Tokens that the prefix cache may spare: those whose scores are wanted and not told must be computed.
    pub fn num_cacheable(&self) -> usize {
        if self.prompt_scores.is_some() && self.num_scored < self.prompt_len {
            self.num_scored
        } else {
            self.tokens.len()
        }
    }

    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_len,
            completion_tokens: self.num_output(),
            cached_tokens: self.start.map_or(0, |start| start.cached_tokens),
        }
    }

    /// Where the time went, if it ended at `now`.
    pub fn timings(&self, now: Duration) -> Timings {
        let start = self.start.map_or(now, |start| start.at);
        let first_token = self.first_token_at.unwrap_or(now);
        Timings {
            queue: start.saturating_sub(self.arrival),
            prefill: first_token.saturating_sub(start),
            decode: now.saturating_sub(first_token),
        }
    }
}
