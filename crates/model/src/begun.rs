//! A step of [`ModelRunner`](crate::ModelRunner) between its begin and its end.
//!
//! Invariant: of a step of draws nothing has come to the host; its tokens are where the device chose them, and the next step
//! finds them there.

use std::collections::BTreeMap;

use baton_device::{Backend, TokenId, TokenIds};

use crate::step::{SampledToken, SequenceFailure, SequenceOutput, StepPlan, Tokens};

/// What is kept of a step.
pub(crate) struct Begun<B: Backend> {
    gives: Gives,
    /// Its end.
    end: B::Chosen,
}

enum Gives {
    /// What it has told.
    Told(Vec<SequenceOutput>),
    /// A token, chosen by the device, for each sequence that samples: all in the order of the plan, with whether they do.
    Drawn(Vec<(u64, bool)>),
}

impl<B: Backend> Begun<B> {
    /// A step that has told all.
    pub fn told(sequences: Vec<SequenceOutput>, end: B::Chosen) -> Self {
        Self { gives: Gives::Told(sequences), end }
    }

    /// `end`: with a token for each sequence of the plan that samples; those behind them do not count.
    pub fn drawn(plan: &StepPlan, end: B::Chosen) -> Self {
        let sequences = plan.sequences.iter().map(|step| (step.id, step.sample.is_some())).collect();
        Self { gives: Gives::Drawn(sequences), end }
    }

    /// The tokens of a plan ahead, in the order of its rows.
    pub fn ids_of(&self, plan: &StepPlan) -> Vec<TokenId> {
        let Gives::Drawn(sequences) = &self.gives else { panic!("a step ahead comes behind one of draws") };
        let sampling = sequences.iter().filter(|(_, samples)| *samples);
        let rows: BTreeMap<u64, u32> = sampling.map(|(id, _)| *id).zip(0..).collect();
        let mut ids = Vec::with_capacity(plan.num_tokens());
        for step in &plan.sequences {
            match &step.tokens {
                Tokens::Known(tokens) => ids.extend(tokens.iter().map(|&token| TokenId::Known(token))),
                Tokens::Awaited => ids.push(TokenId::Chosen(rows[&step.id])),
            }
        }
        ids
    }

    /// Tokens of the next step.
    pub fn token_ids<'a>(&'a self, ids: &'a [TokenId]) -> TokenIds<'a, B::Chosen> {
        TokenIds::Chosen { tokens: &self.end, ids }
    }

    /// Waits for the end; what it gave each sequence.
    pub fn finish(self, backend: &B) -> baton_device::Result<Vec<SequenceOutput>> {
        let mut chosen = Vec::new();
        backend.read_chosen(&self.end, &mut chosen)?;
        let sequences = match self.gives {
            Gives::Told(outputs) => return Ok(outputs),
            Gives::Drawn(sequences) => sequences,
        };
        let mut tokens = chosen.into_iter().map(sampled);
        let output = |(id, samples): (u64, bool)| {
            let sampled = if samples { tokens.by_ref().take(1).collect() } else { Vec::new() };
            SequenceOutput { sampled, ..SequenceOutput::new(id) }
        };
        Ok(sequences.into_iter().map(output).collect())
    }
}

/// A token that the device chose, `None` for logits that are not finite.
pub(crate) fn sampled(chosen: Option<u32>) -> Result<SampledToken, SequenceFailure> {
    let token = chosen.ok_or(SequenceFailure::NonFiniteLogits)?;
    Ok(SampledToken { token, logprob: 0.0, top: Vec::new() })
}
