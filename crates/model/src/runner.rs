//! The runner of a loaded model: packs a ragged batch, plans attention once, computes all layers, and
//! samples the rows that ask for it.

use baton_device::{AttentionBatch, Backend, DeviceError, SequenceSpan};

use crate::arch::Model;
use crate::sampler::Sampler;
use crate::step::{RunError, RunSpec, Runner, SampleRequest, SequenceOutput, StepOutput, StepPlan};

/// A model on a device.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Box<dyn Model<B>>,
    cache: B::KvCache,
    spec: RunSpec,
    sampler: Sampler,
    /// Logits on the host, reused.
    logits: Vec<f32>,
}

impl<B: Backend> ModelRunner<B> {
    pub(crate) fn new(backend: B, model: Box<dyn Model<B>>, cache: B::KvCache, spec: RunSpec) -> Self {
        Self { backend, model, cache, spec, sampler: Sampler::default(), logits: Vec::new() }
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
        for rows in rows.chunks(self.spec.max_step_sequences) {
            self.read_logits(rows)?;
            all.extend_from_slice(&self.logits);
        }
        Ok(all)
    }

    fn forward(&mut self, plan: &StepPlan) -> Result<(), DeviceError> {
        self.check(plan);
        let ids: Vec<u32> = plan.sequences.iter().flat_map(|s| &s.tokens).copied().collect();
        let spans: Vec<SequenceSpan<'_>> = plan
            .sequences
            .iter()
            .map(|s| SequenceSpan { start: s.num_computed, len: s.tokens.len(), block_table: &s.block_table })
            .collect();
        let attention = self.backend.plan_attention(&AttentionBatch { sequences: &spans })?;
        self.model.forward(&self.backend, &ids, &attention, &mut self.cache)
    }

    fn read_logits(&mut self, rows: &[u32]) -> Result<(), DeviceError> {
        let logits = self.model.logits(&self.backend, rows)?;
        self.backend.read(logits, &mut self.logits)
    }

    /// A plan that leaves the spec is a bug of the engine: it would read or write another's cache.
    fn check(&self, plan: &StepPlan) {
        let spec = &self.spec;
        assert!(plan.num_tokens() <= spec.max_step_tokens, "{} tokens in a step", plan.num_tokens());
        assert!(plan.sequences.len() <= spec.max_step_sequences, "{} sequences in a step", plan.sequences.len());
        for s in &plan.sequences {
            let end = s.num_computed + s.tokens.len();
            assert!(!s.tokens.is_empty() && end <= spec.max_model_len, "sequence {} ends at {end}", s.id);
            assert!(s.block_table.len() * spec.block_size >= end, "sequence {} lacks blocks for {end} tokens", s.id);
            assert!(s.block_table.iter().all(|&b| (b as usize) < spec.num_blocks), "sequence {}: a block id", s.id);
            assert!(s.tokens.iter().all(|&t| (t as usize) < spec.vocab_size), "sequence {}: a token id", s.id);
        }
    }
}

impl From<DeviceError> for RunError {
    fn from(error: DeviceError) -> Self {
        RunError(error.to_string())
    }
}

impl<B: Backend> Runner for ModelRunner<B> {
    fn spec(&self) -> &RunSpec {
        &self.spec
    }

    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, RunError> {
        if plan.sequences.is_empty() {
            return Ok(StepOutput::default());
        }
        self.forward(plan)?;
        let mut sequences: Vec<SequenceOutput> =
            plan.sequences.iter().map(|s| SequenceOutput { id: s.id, sampled: None }).collect();

        // (index in the plan, last row of the sequence, request)
        let mut end = 0;
        let sampling: Vec<(usize, u32, &SampleRequest)> = plan
            .sequences
            .iter()
            .enumerate()
            .filter_map(|(i, s)| {
                end += s.tokens.len();
                s.sample.as_ref().map(|request| (i, end as u32 - 1, request))
            })
            .collect();
        if !sampling.is_empty() {
            let rows: Vec<u32> = sampling.iter().map(|s| s.1).collect();
            self.read_logits(&rows)?;
            for ((i, _, request), logits) in sampling.iter().zip(self.logits.chunks_exact(self.spec.vocab_size)) {
                sequences[*i].sampled = Some(self.sampler.sample(logits, request));
            }
        }
        Ok(StepOutput { sequences })
    }

    fn clear_blocks(&mut self, blocks: &[u32]) -> Result<(), RunError> {
        Ok(self.backend.clear_blocks(&mut self.cache, blocks)?)
    }
}
