//! The runner of a loaded model: packs a ragged batch, plans attention once, computes all layers,
//! scores and samples the rows that ask for it, and drafts what may follow where the model has a layer for it. Of several
//! ranks each computes the layers; what follows is the first one's.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use baton_device::{AttentionBatch, Backend, DeviceError, Draw, SequenceSpan, TokenId, TokenIds};

use crate::adapter::{Adapter, AdapterLoader};
use crate::arch::{AdaptedRows, AdapterScratch, AdapterWeights, Model, StepAdapters};
use crate::begun::{Begun, sampled};
use crate::buckets::padded;
use crate::loader::Slot;
use crate::sampler::{Sampler, score};
use crate::step::{
    Passing, RunError, RunSpec, Runner, SampleRequest, Score, ScoreRequest, SequenceFailure, SequenceOutput,
    SequenceStep, StepOutput, StepPlan,
};

/// A model on a device.
pub struct ModelRunner<B: Backend> {
    backend: Arc<B>,
    model: Box<dyn Model<B>>,
    cache: B::KvCache,
    spec: RunSpec,
    adapters: AdapterSupport<B>,
    sampler: Sampler,
    /// Logits on the host, reused.
    logits: Vec<f32>,
    /// Tokens that the device chose, reused.
    chosen: Vec<Option<u32>>,
    /// Steps that have not ended, the earliest first.
    begun: VecDeque<Begun<B>>,
}

/// What a model needs to run adapters.
pub(crate) struct AdapterSupport<B: Backend> {
    /// The projections of the model, by number.
    pub(crate) slots: Arc<[Slot]>,
    /// 0 if there are to be none.
    pub(crate) max_rank: usize,
    pub(crate) scratch: AdapterScratch<B>,
}

impl<B: Backend> ModelRunner<B> {
    pub(crate) fn new(
        backend: B,
        model: Box<dyn Model<B>>,
        cache: B::KvCache,
        spec: RunSpec,
        adapters: AdapterSupport<B>,
    ) -> Self {
        let (backend, sampler) = (Arc::new(backend), Sampler::default());
        Self {
            backend,
            model,
            cache,
            spec,
            adapters,
            sampler,
            logits: Vec::new(),
            chosen: Vec::new(),
            begun: VecDeque::new(),
        }
    }

    /// Loads adapters for this runner; `None` if it was not loaded for any (see
    /// [`LoadOptions::max_lora_rank`](crate::LoadOptions::max_lora_rank)).
    pub fn adapter_loader(&self) -> Option<AdapterLoader<B>> {
        let AdapterSupport { slots, max_rank, .. } = &self.adapters;
        (*max_rank > 0).then(|| AdapterLoader::new(self.backend.clone(), slots.clone(), *max_rank))
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Computes a step and returns the logits of all its tokens, `[tokens, vocab]`, sampling nothing.
    pub fn logits(&mut self, plan: &StepPlan) -> Result<Vec<f32>, RunError> {
        self.forward(plan)?;
        let rows: Vec<u32> = (0..plan.num_tokens() as u32).collect();
        let mut all = Vec::with_capacity(rows.len() * self.spec.vocab_size);
        for rows in rows.chunks(self.spec.logit_rows()) {
            self.read_logits(rows)?;
            all.extend_from_slice(&self.logits);
        }
        Ok(all)
    }

    /// All of a step but [`ModelRunner::look_ahead`]: what it gave each sequence, which only the first rank says, and what
    /// attention knows of it.
    pub(crate) fn compute(&mut self, plan: &StepPlan) -> Result<(Vec<SequenceOutput>, B::AttentionPlan), DeviceError> {
        let attention = self.forward(plan)?;
        let outputs = if self.speaks() { self.sample(plan)? } else { Vec::new() };
        Ok((outputs, attention))
    }

    /// Keeps a step of which all was told that it will tell.
    pub(crate) fn told(&mut self, outputs: Vec<SequenceOutput>) -> Result<(), DeviceError> {
        let end = self.backend.submit()?;
        self.begun.push_back(Begun::told(outputs, end));
        Ok(())
    }

    /// Begins a step of a model that does not look ahead. One of draws is left to the device; of any other it is known what it
    /// gave when it has begun.
    pub(crate) fn begin_step(&mut self, plan: &StepPlan) -> Result<(), DeviceError> {
        if !plan.is_plain_draw() {
            let (outputs, _) = self.compute(plan)?;
            return self.told(outputs);
        }
        self.forward(plan)?;
        let sampling = sampling(plan);
        let end = if sampling.is_empty() { self.backend.submit()? } else { self.draw_for_all(&sampling)? };
        self.begun.push_back(Begun::drawn(plan, end));
        Ok(())
    }

    /// Waits for the end of the earliest step under way; what it gave each sequence, if this is the first rank.
    pub(crate) fn finish_step(&mut self) -> Result<Vec<SequenceOutput>, DeviceError> {
        self.begun.pop_front().expect("a step is under way").finish(&self.backend)
    }

    /// Whether this rank scores and samples.
    fn speaks(&self) -> bool {
        self.backend.world().rank == 0
    }

    /// Whether [`ModelRunner::look_ahead`] belongs to a step.
    pub(crate) fn looks_ahead(&self) -> bool {
        self.model.looks_ahead()
    }

    /// The device, to be told of other ranks.
    pub(crate) fn shared_backend(&self) -> Arc<B> {
        self.backend.clone()
    }

    pub(crate) fn clear(&mut self, kept: &[u32], passing: &[u32]) -> Result<(), DeviceError> {
        self.backend.clear_blocks(&mut self.cache, kept, passing)
    }

    fn forward(&mut self, plan: &StepPlan) -> Result<B::AttentionPlan, DeviceError> {
        self.check(plan);
        if !plan.ahead {
            // What is left of steps that an error ended.
            self.begun.clear();
        }
        let mut spans: Vec<SequenceSpan<'_>> = plan
            .sequences
            .iter()
            .map(|s| SequenceSpan {
                start: s.num_computed,
                len: s.num_rows(),
                block_table: &s.block_table,
                passing_table: &s.passing_table,
            })
            .collect();
        // Rows that pad are all alike, a first token in the block that is nobody's: of experts they meet no more than one row
        // does. They have no adapter, and nobody reads what they give.
        let padding = self.padding(plan);
        let nobodys = [self.spec.num_blocks, self.spec.passing.map_or(0, |passing| passing.num_blocks)];
        let [block_table, passing_table] = nobodys.map(|block| [block as u32]);
        let nobody = SequenceSpan { start: 0, len: 1, block_table: &block_table, passing_table: &passing_table };
        spans.resize(spans.len() + padding, nobody);
        let attention = self.backend.plan_attention(&AttentionBatch { sequences: &spans })?;
        let groups = adapted_rows(plan, self.backend.world().rank);
        let mut adapters = StepAdapters { groups: &groups, scratch: &mut self.adapters.scratch };
        let (mut known, mut ids): (Vec<u32>, Vec<TokenId>);
        let ids = if plan.ahead {
            let last = self.begun.back().expect("a step is under way");
            ids = last.ids_of(plan);
            ids.resize(ids.len() + padding, ids[0]);
            last.token_ids(&ids)
        } else {
            known = plan.sequences.iter().flat_map(|s| s.tokens.known().iter().chain(&s.draft)).copied().collect();
            known.resize(known.len() + padding, known[0]);
            TokenIds::Known(&known)
        };
        self.model.forward(&*self.backend, ids, &attention, &mut self.cache, &mut adapters)?;
        Ok(attention)
    }

    /// Rows that are added to a step of single tokens.
    fn padding(&self, plan: &StepPlan) -> usize {
        let rows = plan.sequences.len();
        let single = || plan.sequences.iter().all(|s| s.num_rows() == 1);
        if self.pads() && single() { padded(rows, self.spec.max_step_sequences) - rows } else { 0 }
    }

    fn pads(&self) -> bool {
        self.backend.caps().replays_steps
    }

    /// Scores and samples where the plan asks for it.
    fn sample(&mut self, plan: &StepPlan) -> Result<Vec<SequenceOutput>, DeviceError> {
        let mut sequences: Vec<SequenceOutput> = plan.sequences.iter().map(|s| SequenceOutput::new(s.id)).collect();
        self.score(plan, &mut sequences)?;
        let vocab = self.spec.vocab_size;
        for group in groups_of_rows(&sampling(plan), self.spec.logit_rows()) {
            if group.iter().all(|s| s.step.sample.as_ref().is_some_and(SampleRequest::is_plain_draw)) {
                self.choose(group, &mut sequences)?;
                continue;
            }
            self.read_logits(&rows_of(group))?;
            let mut logits = self.logits.chunks_exact(vocab);
            for Sampling { index, step, rows } in group {
                let logits: Vec<&[f32]> = logits.by_ref().take(rows.len()).collect();
                sequences[*index].sampled =
                    step.sample_along(|drafts, request| self.sampler.sample(logits[drafts], request));
            }
        }
        Ok(sequences)
    }

    /// Scores the rows whose scores are asked for, some at a time, as many as may ever be sampled at once.
    fn score(&mut self, plan: &StepPlan, outputs: &mut [SequenceOutput]) -> Result<(), DeviceError> {
        let mut start = 0;
        let mut scoring: Vec<(usize, u32, &ScoreRequest)> = Vec::new();
        for (index, step) in plan.sequences.iter().enumerate() {
            scoring.extend(step.scores.iter().map(|request| (index, (start + request.row) as u32, request)));
            start += step.num_rows();
        }
        for group in scoring.chunks(self.spec.logit_rows()) {
            let rows: Vec<u32> = group.iter().map(|(_, row, _)| *row).collect();
            let hidden = self.read_hidden(&rows, group.iter().any(|(_, _, request)| request.hidden))?;
            if group.iter().any(|(_, _, request)| request.needs_logits()) {
                self.read_logits(&rows)?;
            }
            let width = hidden.len() / rows.len();
            for (i, (index, _, request)) in group.iter().enumerate() {
                let logits = || &self.logits[i * self.spec.vocab_size..][..self.spec.vocab_size];
                let logprobs = if request.needs_logits() { score(logits(), request) } else { Ok(Score::default()) };
                let hidden = if request.hidden { &hidden[i * width..][..width] } else { &[] };
                let scores = &mut outputs[*index].scores;
                match (logprobs, &mut *scores) {
                    _ if hidden.iter().any(|x| !x.is_finite()) => *scores = Err(SequenceFailure::NonFiniteLogits),
                    (Ok(score), Ok(scores)) => scores.push(Score { hidden: hidden.to_vec(), ..score }),
                    (Err(failure), _) => *scores = Err(failure),
                    (Ok(_), Err(_)) => {}
                }
            }
        }
        Ok(())
    }

    /// Runs the layer that looks ahead over the step, drafts wanted or not, so that its cache covers every context, and
    /// drafts a token where it is asked for: chosen as the real one will be, with the same random number, so that both
    /// agree as often as their distributions do. `outputs` are those of the first rank.
    pub(crate) fn look_ahead(
        &mut self,
        plan: &StepPlan,
        attention: &B::AttentionPlan,
        outputs: &mut [SequenceOutput],
    ) -> Result<(), DeviceError> {
        let mut next = Vec::with_capacity(plan.num_tokens());
        let mut drafting = Vec::new();
        for (index, (step, output)) in plan.sequences.iter().zip(&*outputs).enumerate() {
            let rows = step.tokens.known().iter().chain(&step.draft);
            let start = next.len();
            // Behind the last row nothing is known, unless it is sampled: any token is as good.
            next.extend(rows.clone().skip(1).chain(rows.last()));
            if let Some(Ok(last)) = output.sampled.last() {
                let row = start + step.tokens.count() - 1 + output.sampled.len() - 1;
                next[row] = last.token;
                if step.propose > 0 && self.speaks() {
                    drafting.push((index, row as u32));
                }
            }
        }
        next.resize(next.len() + self.padding(plan), next[0]);
        let groups = adapted_rows(plan, self.backend.world().rank);
        let mut adapters = StepAdapters { groups: &groups, scratch: &mut self.adapters.scratch };
        self.model.look_ahead(&*self.backend, &next, attention, &mut self.cache, &mut adapters)?;
        for group in drafting.chunks(self.spec.logit_rows()) {
            let rows: Vec<u32> = group.iter().map(|(_, row)| *row).collect();
            self.read_logits(&rows)?;
            for ((index, _), logits) in group.iter().zip(self.logits.chunks_exact(self.spec.vocab_size)) {
                let output = &mut outputs[*index];
                let request = plan.sequences[*index].request_behind(&output.sampled).expect("a token was sampled");
                output.proposed.extend(self.sampler.choose(logits, &request).ok().map(|(token, _)| token));
            }
        }
        Ok(())
    }

    /// The rows of sequences that all draw from their logits as they are, and how, for each row as if the drafts before it were
    /// accepted. Rows that nobody asked for come last.
    fn draws(&self, group: &[Sampling<'_>]) -> (Vec<u32>, Vec<Draw>) {
        let rows = self.padded_rows(&rows_of(group));
        let mut draws: Vec<Draw> = group.iter().flat_map(Sampling::draws).collect();
        draws.resize(rows.len(), Draw::LARGEST);
        (rows, draws)
    }

    /// Has the first rank's device choose for such sequences, and all have what it chose.
    fn draw_for_all(&mut self, group: &[Sampling<'_>]) -> Result<B::Chosen, DeviceError> {
        let (rows, draws) = self.draws(group);
        let logits = if self.speaks() { Some(self.model.logits(&*self.backend, &rows)?) } else { None };
        self.backend.choose_for_all(logits, self.spec.vocab_size, &draws)
    }

    /// Samples such sequences.
    fn choose(&mut self, group: &[Sampling<'_>], outputs: &mut [SequenceOutput]) -> Result<(), DeviceError> {
        let (rows, draws) = self.draws(group);
        let chosen = self.backend.choose(self.model.logits(&*self.backend, &rows)?, &draws)?;
        self.backend.read_chosen(&chosen, &mut self.chosen)?;
        let mut chosen = self.chosen.as_slice();
        for Sampling { index, step, rows } in group {
            let (own, others) = chosen.split_at(rows.len());
            chosen = others;
            outputs[*index].sampled = step.sample_along(|drafts, _| sampled(own[drafts]));
        }
        Ok(())
    }

    /// Hidden states of some rows, if any are `wanted`.
    fn read_hidden(&mut self, rows: &[u32], wanted: bool) -> Result<Vec<f32>, DeviceError> {
        let mut values = Vec::new();
        if wanted {
            let hidden = self.model.hidden(&*self.backend, rows)?;
            self.backend.read(hidden, &mut values)?;
        }
        Ok(values)
    }

    fn read_logits(&mut self, rows: &[u32]) -> Result<(), DeviceError> {
        let padded = self.padded_rows(rows);
        let logits = self.model.logits(&*self.backend, &padded)?;
        self.backend.read(logits, &mut self.logits)?;
        self.logits.truncate(rows.len() * self.spec.vocab_size);
        Ok(())
    }

    /// Rows whose logits are wanted, and behind them as many others as make their number a usual one.
    fn padded_rows(&self, rows: &[u32]) -> Vec<u32> {
        let mut padded_rows = rows.to_vec();
        if self.pads() {
            padded_rows.resize(padded(rows.len(), self.spec.logit_rows()), rows[0]);
        }
        padded_rows
    }

    /// A plan that leaves the spec is a bug of the engine: it would read or write another's cache.
    fn check(&self, plan: &StepPlan) {
        let spec = &self.spec;
        assert!(plan.num_tokens() <= spec.max_step_tokens, "{} tokens in a step", plan.num_tokens());
        assert!(plan.sequences.len() <= spec.max_step_sequences, "{} sequences in a step", plan.sequences.len());
        for s in &plan.sequences {
            let end = s.num_computed + s.num_rows();
            assert!(s.tokens.count() > 0 && end <= spec.max_model_len, "sequence {} ends at {end}", s.id);
            assert!(s.block_table.len() * spec.block_size >= end, "sequence {} lacks blocks for {end} tokens", s.id);
            assert!(s.block_table.iter().all(|&b| (b as usize) < spec.num_blocks), "sequence {}: a block id", s.id);
            if let Some(Passing { reach, num_blocks }) = spec.passing {
                let read = s.num_computed.saturating_sub(reach) / spec.block_size..end.div_ceil(spec.block_size);
                let are_there = |blocks: &[u32]| blocks.iter().all(|&b| (b as usize) < num_blocks);
                assert!(s.passing_table.get(read).is_some_and(are_there), "sequence {}: a passing block", s.id);
            }
            assert!(s.draft.len() <= spec.max_draft_tokens, "sequence {}: {} drafts", s.id, s.draft.len());
            assert!(
                s.draft.is_empty() || s.sample.is_some(),
                "sequence {} has drafts and no sample to judge them",
                s.id
            );
            assert!(
                s.tokens.known().iter().chain(&s.draft).all(|&t| (t as usize) < spec.vocab_size),
                "sequence {}: a token id",
                s.id
            );
            let scored =
                |r: &ScoreRequest| r.row < s.tokens.count() && r.ids.iter().all(|&id| (id as usize) < spec.vocab_size);
            assert!(s.scores.iter().all(scored), "sequence {}: scores of what is not there", s.id);
        }
    }
}

/// A sequence of a step that asks for a sample.
struct Sampling<'a> {
    /// Its place in the plan.
    index: usize,
    step: &'a SequenceStep,
    /// Its last token and its drafts.
    rows: Range<u32>,
}

impl Sampling<'_> {
    /// How each row's token is drawn.
    fn draws(&self) -> impl Iterator<Item = Draw> {
        let request = self.step.sample.as_ref().expect("a sequence that samples");
        (0..self.rows.len() as u32).map(|drafts| request.draw(drafts))
    }
}

/// The sequences of a plan that ask for a sample.
fn sampling(plan: &StepPlan) -> Vec<Sampling<'_>> {
    let mut end = 0;
    let sampling = plan.sequences.iter().enumerate().filter_map(|(index, step)| {
        end += step.num_rows() as u32;
        step.sample.is_some().then(|| Sampling { index, step, rows: end - step.draft.len() as u32 - 1..end })
    });
    sampling.collect()
}

/// All their rows.
fn rows_of(group: &[Sampling<'_>]) -> Vec<u32> {
    group.iter().flat_map(|s| s.rows.clone()).collect()
}

/// Whole sequences whose rows are at most `most` together; none has more alone.
fn groups_of_rows<'s, 'a>(sampling: &'s [Sampling<'a>], most: usize) -> impl Iterator<Item = &'s [Sampling<'a>]> {
    let mut rest = sampling;
    std::iter::from_fn(move || {
        let mut rows = 0;
        let fits = rest.iter().take_while(|s| {
            rows += s.rows.len();
            rows <= most
        });
        let (group, others) = rest.split_at(fits.count());
        rest = others;
        (!group.is_empty()).then_some(group)
    })
}

/// The rows of each adapter of a step, with its weights on a rank.
fn adapted_rows<B: Backend>(plan: &StepPlan, rank: usize) -> Vec<AdaptedRows<'_, B>> {
    let mut groups: Vec<(&Adapter, Vec<u32>)> = Vec::new();
    let mut end = 0;
    for s in &plan.sequences {
        let start = end;
        end += s.num_rows() as u32;
        let Some(adapter) = &s.adapter else { continue };
        match groups.iter_mut().find(|(known, _)| *known == adapter) {
            Some((_, rows)) => rows.extend(start..end),
            None => groups.push((adapter, (start..end).collect())),
        }
    }
    let weights = groups.into_iter().map(|(adapter, rows)| (adapter.weights::<Vec<AdapterWeights<B>>>(), rows));
    weights.map(|(of_ranks, rows)| AdaptedRows { weights: &of_ranks[rank], rows }).collect()
}

impl From<DeviceError> for RunError {
    fn from(error: DeviceError) -> Self {
        let words = error.to_string();
        match error {
            DeviceError::OutOfMemory { .. } => Self::OutOfMemory(words),
            DeviceError::Poisoned { .. } => Self::Poisoned(words),
            DeviceError::Lost { .. } => Self::Lost(words),
            _ => Self::Failed(words),
        }
    }
}

impl<B: Backend> Runner for ModelRunner<B> {
    fn spec(&self) -> &RunSpec {
        &self.spec
    }

    fn begin(&mut self, plan: &StepPlan) -> Result<(), RunError> {
        if !self.looks_ahead() {
            return Ok(self.begin_step(plan)?);
        }
        let (mut outputs, attention) = self.compute(plan)?;
        self.look_ahead(plan, &attention, &mut outputs)?;
        Ok(self.told(outputs)?)
    }

    fn finish(&mut self) -> Result<StepOutput, RunError> {
        Ok(StepOutput { sequences: self.finish_step()? })
    }

    fn clear_blocks(&mut self, kept: &[u32], passing: &[u32]) -> Result<(), RunError> {
        Ok(self.clear(kept, passing)?)
    }
}
