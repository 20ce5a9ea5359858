//! A step of [`ModelRunner`](crate::ModelRunner) between its begin and its end.
//!
//! Invariant: of a step of draws nothing has come to the host; its tokens are where the device chose them, and the next step
//! finds them there.

use std::collections::BTreeMap;

use baton_device::{Backend, TokenIds};

use crate::step::{SampledToken, SequenceFailure, SequenceOutput, StepPlan};

/// What is kept of a step.
pub(crate) enum Begun<B: Backend> {
    /// It has told all.
    Told(Vec<SequenceOutput>),
    /// The device chooses a token for each sequence that samples.
    Drawn(Drawn<B>),
}

/// See [`Begun::Drawn`].
pub(crate) struct Drawn<B: Backend> {
    /// In the order of the plan, with whether it samples.
    sequences: Vec<(u64, bool)>,
    /// Of those that sample.
    tokens: B::Chosen,
}

impl<B: Backend> Drawn<B> {
    /// `tokens`: one for each sequence of the plan that samples.
    pub fn new(plan: &StepPlan, tokens: B::Chosen) -> Self {
        let sequences = plan.sequences.iter().map(|step| (step.id, step.sample.is_some())).collect();
        Self { sequences, tokens }
    }

    /// The rows of its tokens that a plan ahead awaits.
    pub fn awaited(&self, plan: &StepPlan) -> Vec<u32> {
        let sampling = self.sequences.iter().filter(|(_, samples)| *samples);
        let rows: BTreeMap<u64, u32> = sampling.map(|(id, _)| *id).zip(0..).collect();
        plan.sequences.iter().map(|step| rows[&step.id]).collect()
    }

    /// Tokens of the next step, in these rows.
    pub fn token_ids<'a>(&'a self, rows: &'a [u32]) -> TokenIds<'a, B::Chosen> {
        TokenIds::Chosen { tokens: &self.tokens, rows }
    }

    /// What it gave each sequence.
    pub fn finish(&self, backend: &B) -> baton_device::Result<Vec<SequenceOutput>> {
        let mut chosen = Vec::new();
        backend.read_chosen(&self.tokens, &mut chosen)?;
        let mut sampled = chosen.into_iter().map(sampled);
        let output = |&(id, samples): &(u64, bool)| {
            let sampled = if samples { sampled.by_ref().take(1).collect() } else { Vec::new() };
            SequenceOutput { sampled, ..SequenceOutput::new(id) }
        };
        Ok(self.sequences.iter().map(output).collect())
    }
}

/// A token that the device chose, `None` for logits that are not finite.
pub(crate) fn sampled(chosen: Option<u32>) -> Result<SampledToken, SequenceFailure> {
    let token = chosen.ok_or(SequenceFailure::NonFiniteLogits)?;
    Ok(SampledToken { token, logprob: 0.0, top: Vec::new() })
}
