//! The seam between engine and model: one step over a ragged batch.
//!
//! There is no prefill or decode phase. A step gives each sequence some tokens, from
//! `num_computed` on; a sequence whose last known token is among them also asks for a sample, and may
//! bring drafts: guesses at what comes next, computed in the same step. A draft is accepted if and only if it is
//! the token that is sampled in its place ([`SequenceStep::sample_along`]), so drafts change no output.
//! Everything a step needs is in the plan: a runner keeps no state per sequence but the cache.
//!
//! A step has a begin and an end, so that a device need not wait for its host: behind a step that is under way another may
//! begin, which computes what the former samples ([`Tokens::Awaited`]) before the host knows it.

use std::borrow::Cow;
use std::sync::Arc;

use baton_device::Draw;

use crate::choosable::restricts;
use crate::philox::uniform;
use crate::{Adapter, ConstraintError, SamplingParams, StepMasks};

/// Work of one step, of at least one sequence. Sequence ids are distinct.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepPlan {
    /// In the order in which rows are packed.
    pub sequences: Vec<SequenceStep>,
    /// Whether it begins before the step before it has ended.
    pub ahead: bool,
}

impl StepPlan {
    /// A step that begins when none is under way.
    pub fn new(sequences: Vec<SequenceStep>) -> Self {
        Self { sequences, ahead: false }
    }

    /// Tokens computed by the step, drafts included.
    pub fn num_tokens(&self) -> usize {
        self.sequences.iter().map(SequenceStep::num_rows).sum()
    }

    /// Whether all that it tells is one plain draw for each sequence that samples: then its end says nothing that a device
    /// could not have told the next step.
    pub fn is_plain_draw(&self) -> bool {
        let is_plain = |step: &SequenceStep| {
            step.scores.is_empty()
                && step.draft.is_empty()
                && step.sample.as_ref().is_none_or(SampleRequest::is_plain_draw)
        };
        self.sequences.iter().all(is_plain)
    }
}

/// What a step computes of a sequence, besides drafts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tokens {
    /// These; at least one.
    Known(Vec<u32>),
    /// The one that the step before samples for the sequence; any valid one, if it fails to. Of a plan ahead.
    Awaited,
}

impl Tokens {
    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Self::Known(tokens) => tokens.len(),
            Self::Awaited => 1,
        }
    }

    /// Those that are known.
    pub fn known(&self) -> &[u32] {
        match self {
            Self::Known(tokens) => tokens,
            Self::Awaited => &[],
        }
    }
}

/// Tokens of one sequence at positions `num_computed..num_computed + tokens.count()`, and drafts behind them.
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceStep {
    /// The engine's number for the sequence.
    pub id: u64,
    /// Tokens whose keys and values are in the cache when the step is computed.
    pub num_computed: usize,
    /// What is computed.
    pub tokens: Tokens,
    /// Guesses at the tokens to be sampled behind `tokens`; none where no sample is asked for. What is computed for
    /// those that are not accepted must not matter to anything, be it finite or not: their positions are computed again.
    pub draft: Vec<u32>,
    /// Blocks of positions `0..num_computed + tokens.count() + draft.len()`.
    pub block_table: Vec<u32>,
    /// Passing blocks of the same positions, [`PASSED`](baton_device::PASSED) or any other behind [`Passing::reach`]; empty
    /// where nothing passes.
    pub passing_table: Vec<u32>,
    /// Changes the model for this sequence. The same in every step of it: what is in the cache depends on it.
    pub adapter: Option<Adapter>,
    /// Set when the last of `tokens` is the last one that is known, or awaited: choose the next.
    pub sample: Option<SampleRequest>,
    /// Drafts for the next step that a runner which can make them shall return, at most.
    pub propose: usize,
    /// What to tell of the distributions behind some of `tokens`, besides a sample.
    pub scores: Vec<ScoreRequest>,
}

impl SequenceStep {
    /// Tokens and drafts: rows of the batch.
    pub fn num_rows(&self) -> usize {
        self.tokens.count() + self.draft.len()
    }

    /// The rule of acceptance: `sample(n, request)` chooses the token behind the last known one and the first `n`
    /// drafts, from n = 0 on, as long as each choice is the draft in its place and masks reach.
    pub fn sample_along(
        &self,
        mut sample: impl FnMut(usize, &SampleRequest) -> Result<SampledToken, SequenceFailure>,
    ) -> Vec<Result<SampledToken, SequenceFailure>> {
        let Some(request) = &self.sample else { return Vec::new() };
        let mut sampled = vec![sample(0, request)];
        let mut request = Cow::Borrowed(request);
        for (n, &draft) in (1..).zip(&self.draft) {
            match sampled.last() {
                Some(Ok(last)) if last.token == draft => request.to_mut().advance(draft),
                _ => break,
            }
            if request.masks.as_ref().is_some_and(|masks| !masks.reach()) {
                break;
            }
            sampled.push(sample(n, &request));
        }
        sampled
    }

    /// The request for the token behind those that were sampled, whatever a grammar says of it; `None` if none was
    /// sampled, or one failed.
    pub fn request_behind(&self, sampled: &[Result<SampledToken, SequenceFailure>]) -> Option<SampleRequest> {
        sampled.last()?.as_ref().ok()?;
        let mut request = self.sample.clone()?;
        sampled.iter().flatten().for_each(|sampled| request.advance(sampled.token));
        // Those of the step are for its drafts, and what was sampled last is none of them.
        request.masks = None;
        Some(request)
    }
}

/// What to tell of the distribution behind one token, under the model alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScoreRequest {
    /// Index of the token in [`SequenceStep::tokens`], which are known.
    pub row: usize,
    /// Ids whose log-probabilities are wanted, below the width of the logits.
    pub ids: Vec<u32>,
    /// How many of the most likely ids are wanted.
    pub top: u32,
    /// Whether the token's hidden state is wanted.
    pub hidden: bool,
}

impl ScoreRequest {
    /// Whether logits must be computed for it.
    pub(crate) fn needs_logits(&self) -> bool {
        self.top > 0 || !self.ids.is_empty()
    }
}

/// How to choose the next token.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleRequest {
    /// Parameters, shared with the sequence.
    pub params: Arc<SamplingParams>,
    /// Index of the token to be generated: 0 for the first of the output.
    pub position: u32,
    /// Ids of prompt and output so far, only if [`SamplingParams::needs_history`], else empty.
    pub history: Vec<u32>,
    /// How many of `history` are prompt.
    pub prompt_len: usize,
    /// What a grammar allows behind the known tokens and behind each draft; `None` without a grammar.
    pub masks: Option<StepMasks>,
}

impl SampleRequest {
    /// How the token behind so many accepted drafts is drawn, once its logits are what they shall be.
    pub(crate) fn draw(&self, drafts: u32) -> Draw {
        let SamplingParams { temperature, top_k, top_p, min_p, seed, choice, .. } = *self.params;
        Draw { temperature, top_k, top_p, min_p, uniform: uniform(seed, choice, self.position + drafts) }
    }

    /// Whether the token is drawn from the model's logits as they are, and nothing is told of them: then a device can choose
    /// it. It stays so as the request advances.
    pub fn is_plain_draw(&self) -> bool {
        self.params.logprobs.is_none() && !self.params.changes_logits() && !restricts(self)
    }

    /// The request for the token behind `token`, which was chosen.
    pub fn advance(&mut self, token: u32) {
        self.position += 1;
        if let Some(masks) = &mut self.masks {
            masks.advance();
        }
        if self.params.needs_history() {
            self.history.push(token);
        }
    }
}

/// What a step gave, in the order of the plan.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// One entry per sequence of the plan.
    pub sequences: Vec<SequenceOutput>,
}

/// What a step gave one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceOutput {
    /// As in the plan.
    pub id: u64,
    /// Empty if no sample was asked for, else at least one: each but the last is the draft in its place. A failure is the
    /// last.
    pub sampled: Vec<Result<SampledToken, SequenceFailure>>,
    /// Guesses at what follows, as many as [`SequenceStep::propose`] at most.
    pub proposed: Vec<u32>,
    /// One entry per [`SequenceStep::scores`], in their order, unless one of these rows is not finite.
    pub scores: Result<Vec<Score>, SequenceFailure>,
}

impl SequenceOutput {
    /// Of a sequence that got nothing yet.
    pub fn new(id: u64) -> Self {
        Self { id, sampled: Vec::new(), proposed: Vec::new(), scores: Ok(Vec::new()) }
    }
}

/// What one row says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Score {
    /// The log-probability of each of [`ScoreRequest::ids`].
    pub logprobs: Vec<f32>,
    /// The most likely ids with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
    /// The hidden state behind the last norm, if it was asked for.
    pub hidden: Vec<f32>,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Its id, below the width of the logits.
    pub token: u32,
    /// Its log-probability under the model alone (before bias, penalties and temperature); 0 if not
    /// asked for.
    pub logprob: f32,
    /// The most likely ids with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why one sequence of a step failed; its batch mates are untouched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SequenceFailure {
    /// The model's logits hold NaN or infinity.
    #[error("the model computed logits that are not finite")]
    NonFiniteLogits,
    /// The grammar of its output cannot be followed any further.
    #[error("the grammar of the output failed: {0}")]
    Grammar(#[from] ConstraintError),
}

/// A failure of the whole step, by what can be asked of the runner from then on; with the device's own words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// The step has failed. Once its blocks are cleared, another may go well.
    #[error("the device failed: {0}")]
    Failed(String),
    /// As [`Failed`](Self::Failed), for want of memory.
    #[error("the device has no memory for the step: {0}")]
    OutOfMemory(String),
    /// Nothing: it must be dropped, and another be loaded in its place.
    #[error("the device must be set up anew: {0}")]
    Poisoned(String),
    /// Nothing, and no other can be loaded in its place: the device is gone.
    #[error("the device is lost: {0}")]
    Lost(String),
}

/// What the engine must know of a runner. Fixed for its life.
#[derive(Debug, Clone, PartialEq)]
pub struct RunSpec {
    /// Width of the logits: every token id is below it.
    pub vocab_size: usize,
    /// Tokens of prompt and output together, at most.
    pub max_model_len: usize,
    /// Tokens per cache block.
    pub block_size: usize,
    /// Blocks in the cache; ids are `0..num_blocks`.
    pub num_blocks: usize,
    /// What is kept of the last tokens of a context only, in blocks of its own; `None` if nothing is.
    pub passing: Option<Passing>,
    /// Tokens of one step, at most.
    pub max_step_tokens: usize,
    /// Sequences of one step, at most.
    pub max_step_sequences: usize,
    /// Drafts of one sequence in a step, at most.
    pub max_draft_tokens: usize,
    /// Whether a step may begin before the one before it has ended.
    pub steps_ahead: bool,
}

impl RunSpec {
    /// Rows whose logits are computed at once, at most: those of a sequence with all its drafts are.
    pub(crate) fn logit_rows(&self) -> usize {
        self.max_step_sequences.max(1 + self.max_draft_tokens)
    }
}

/// What a model keeps of the last tokens of a context only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passing {
    /// How many positions before its own a token reads of it.
    pub reach: usize,
    /// Passing blocks in the cache; ids are `0..num_blocks`.
    pub num_blocks: usize,
}

impl Passing {
    /// The first block that a sequence has whose next token is at `position`: all that the reach of any token of that token's
    /// block touches. So whoever finds the beginning of a sequence up to there can go on from it.
    pub const fn first(self, position: usize, block_size: usize) -> usize {
        (position / block_size).saturating_sub(self.reach.div_ceil(block_size))
    }

    /// Blocks that running sequences have at most, of which steps take so many, with so many tokens together.
    ///
    /// Let w blocks lie before the one of a sequence's next token, as [`Passing::first`] says. Between steps it has w + 1 at
    /// most. With n tokens in a step, and one in the step begun ahead of its end, it has w + 1 + ⌈n / block size⌉. Over all of
    /// a step ⌈n / block size⌉ adds up to no more than one for each and what all tokens fill. Beside them as many may sit the
    /// step out: those of the background while the foreground computes.
    pub const fn fewest(reach: usize, block_size: usize, sequences: usize, tokens: usize) -> usize {
        let resting = reach.div_ceil(block_size) + 1;
        sequences.saturating_mul(2 * resting + 1).saturating_add(tokens / block_size)
    }
}

/// Runs steps. Implemented by the model runner and by the engine's simulator.
///
/// What it is asked for happens in the order in which it is asked: a step reads what those before it wrote, and a block
/// is cleared behind all that were begun. An error, or a panic, ends all steps under way.
pub trait Runner: Send {
    /// Limits of this runner.
    fn spec(&self) -> &RunSpec;
    /// Begins a step. The plan keeps to the spec. A plan [ahead](StepPlan::ahead) comes while one other step is under way, and
    /// both are [plain draws](StepPlan::is_plain_draw); for sequences whose token it awaits that one samples. Any other plan comes
    /// while none is: what is left of steps that an error ended is forgotten.
    fn begin(&mut self, plan: &StepPlan) -> Result<(), RunError>;
    /// Waits for the end of the earliest step under way, of which there is one, and what it gives.
    fn finish(&mut self) -> Result<StepOutput, RunError>;
    /// Computes a step, while none is under way.
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, RunError> {
        self.begin(plan)?;
        self.finish()
    }
    /// Zeroes kept and passing cache blocks, after a sequence failed.
    fn clear_blocks(&mut self, kept: &[u32], passing: &[u32]) -> Result<(), RunError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_request_that_asks_for_nothing_else_is_a_plain_draw() {
        let greedy = SamplingParams { temperature: 0.0, logprobs: None, ..SamplingParams::default() };
        let request = |params: SamplingParams, position| SampleRequest {
            params: Arc::new(params),
            position,
            history: Vec::new(),
            prompt_len: 0,
            masks: None,
        };
        let cut = SamplingParams { temperature: 0.5, top_k: 5, top_p: 0.9, min_p: 0.1, ..greedy.clone() };
        assert!(request(greedy.clone(), 0).is_plain_draw() && request(cut, 0).is_plain_draw());
        let at_least = SamplingParams { min_tokens: 2, suppressed_until_min: [1].into(), ..greedy.clone() };
        assert!(request(at_least.clone(), 2).is_plain_draw());
        for other in [
            at_least,
            SamplingParams { logprobs: Some(0), ..greedy.clone() },
            SamplingParams { allowed_token_ids: Some([1].into()), ..greedy.clone() },
            SamplingParams { bad_words: vec![vec![1]], ..greedy.clone() },
            SamplingParams { logit_bias: vec![(1, 1.0)], ..greedy.clone() },
            SamplingParams { repetition_penalty: 1.5, ..greedy },
        ] {
            assert!(!request(other.clone(), 1).is_plain_draw(), "{other:?}");
        }
    }
}
