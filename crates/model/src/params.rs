//! How a token is chosen from logits. Values arrive validated: ranges are the wire's business, but
//! nothing here can make the sampler panic.

/// Sampling parameters of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 means the first maximum, always.
    pub temperature: f32,
    /// Keeps the k most likely, and ties with the k-th; 0 for all.
    pub top_k: u32,
    /// Keeps the smallest set of most likely tokens that reaches this probability; 1 for all.
    pub top_p: f32,
    /// Keeps tokens at least this likely relative to the most likely; 0 for all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of ids in prompt or output; 1 for none.
    pub repetition_penalty: f32,
    /// Subtracted from logits of ids in the output.
    pub presence_penalty: f32,
    /// Subtracted from logits of ids in the output, once per occurrence.
    pub frequency_penalty: f32,
    /// Added to the logits of these ids, first of all steps.
    pub logit_bias: Vec<(u32, f32)>,
    /// Ids that cannot be chosen before `min_tokens` tokens are out: end tokens.
    pub suppressed_until_min: Vec<u32>,
    /// See `suppressed_until_min`; 0 for none.
    pub min_tokens: u32,
    /// The only ids that can be chosen, where a grammar leaves one of them; `None` for all.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Sequences of ids that the output never completes while it can choose something else; each has at least one.
    pub bad_words: Vec<Vec<u32>>,
    /// Seed of the generator. The random number of a token depends on (seed, choice, position) alone.
    pub seed: u64,
    /// Index among the `n` choices of one request.
    pub choice: u32,
    /// Return the logprob of the chosen token and of this many most likely ones.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    /// Plain sampling from the model's distribution.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            suppressed_until_min: Vec::new(),
            min_tokens: 0,
            allowed_token_ids: None,
            bad_words: Vec::new(),
            seed: 0,
            choice: 0,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether the largest logit of those that may be chosen is taken as it is.
    pub(crate) fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && !self.changes_logits()
    }

    /// Whether single logits are changed before one is chosen.
    pub(crate) fn changes_logits(&self) -> bool {
        !self.logit_bias.is_empty() || self.has_penalties()
    }

    /// Whether the sampler must see the sequence's tokens.
    pub fn needs_history(&self) -> bool {
        self.has_penalties() || self.bad_words.iter().any(|word| word.len() > 1)
    }

    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}
