//! What stands in for the weights of a mock: the next token is a hash of the whole context, so whatever of it is lost, doubled or
//! foreign shows in the next token. [`MockModel::solo`] is the judge of everything the engine does.

use std::sync::Arc;

use baton_model::{Adapter, SampleRequest, TokenMask};

use crate::{HiddenStates, PositionScore, PromptScores, Request};

/// What stands in for the weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MockModel {
    /// The next token is a hash of seed, adapter, context and sampling parameters.
    Hash {
        /// Two seeds are two models.
        seed: u64,
        /// Ids are below it.
        vocab_size: u32,
        /// This token comes next in about one of so many contexts.
        end: Option<(u32, u32)>,
    },
    /// The output is this text, whatever the prompt; then the end token, for ever.
    Script {
        /// Tokens of the output.
        reply: Vec<u32>,
        /// What follows them.
        end: u32,
    },
}

impl MockModel {
    /// What the context hashes to after `token`.
    pub(super) fn extend(context: u64, token: u32) -> u64 {
        mix(context, u64::from(token) + 1)
    }

    /// An adapter is another model from the first token on.
    pub(super) fn empty_context(&self, adapter: Option<&Adapter>) -> u64 {
        let digest = adapter.map(Adapter::digest).into_iter().flatten();
        match self {
            Self::Hash { seed, .. } => digest.fold(mix(*seed, 0), |context, byte| mix(context, u64::from(*byte))),
            Self::Script { .. } => 0,
        }
    }

    /// What a mask refuses gives way to the next larger id that it allows, or to the smallest.
    pub(super) fn next_token(&self, context: u64, request: &SampleRequest, mask: Option<&TokenMask>) -> u32 {
        let token = match self {
            Self::Hash { vocab_size, end, .. } => {
                let hash = mix(context, digest(request));
                match end {
                    Some((token, one_in)) if (hash >> 32).is_multiple_of(u64::from(*one_in)) => *token,
                    _ => (hash % u64::from(*vocab_size)) as u32,
                }
            }
            Self::Script { reply, end } => reply.get(request.position as usize).copied().unwrap_or(*end),
        };
        let Some(mask) = mask else { return token };
        mask.ids().find(|id| *id >= token).or(mask.ids().next()).expect("a mask allows something")
    }

    /// The first `max_tokens` tokens that a request gives, stop tokens or not, when it runs alone, without paging, batching
    /// or chunks: the judge of everything the engine does. Fewer if its grammar fails.
    pub fn solo(&self, request: &Request) -> Vec<u32> {
        let params = Arc::new(request.params.clone());
        let (mut tokens, prompt_len) = (request.prompt.clone(), request.prompt.len());
        let empty = self.empty_context(request.adapter.as_ref());
        let mut context = tokens.iter().fold(empty, |context, &token| Self::extend(context, token));
        let mut constraint = request.grammar.as_ref().map(|grammar| grammar.begin(&request.stop_token_ids));
        for position in 0..request.max_tokens {
            let history = if params.needs_history() { tokens.clone() } else { Vec::new() };
            let request = SampleRequest { params: params.clone(), position, history, prompt_len, masks: None };
            let Ok(mask) = constraint.as_mut().map(|constraint| constraint.masks(&[])).transpose() else { break };
            let mask = mask.and_then(|masks| masks.into_iter().next().flatten());
            let token = self.next_token(context, &request, mask.as_ref());
            context = Self::extend(context, token);
            tokens.push(token);
            if constraint.as_mut().is_some_and(|constraint| constraint.accept(token).is_err()) {
                break;
            }
        }
        tokens.split_off(prompt_len)
    }

    /// The scores that a request gives alone, of all positions that it asks for.
    pub fn solo_scores(&self, request: &Request, vocab_size: usize) -> Vec<PositionScore> {
        let Some(PromptScores { top, targets, hidden }) = &request.prompt_scores else { return Vec::new() };
        let mut context = self.empty_context(request.adapter.as_ref());
        let position_score = |(position, &token)| {
            context = Self::extend(context, token);
            if hidden.is_some() {
                return PositionScore { position, next: None, top: vec![], targets: vec![], hidden: state(context) };
            }
            let targets = targets.get(&position).into_iter().flatten();
            PositionScore {
                hidden: Vec::new(),
                position,
                next: request.prompt.get(position + 1).map(|&next| logprob(context, next)),
                top: likeliest(context, *top, vocab_size),
                targets: targets.map(|&id| logprob(context, id)).collect(),
            }
        };
        let last_alone = *hidden == Some(HiddenStates::Last);
        let untold = if last_alone { request.prompt.len().saturating_sub(1) } else { 0 };
        request.prompt.iter().enumerate().map(position_score).skip(untold).collect()
    }
}

/// Everything that decides a token besides the context.
fn digest(request: &SampleRequest) -> u64 {
    let p = &*request.params;
    let words = [p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty]
        .map(|x| u64::from(x.to_bits()))
        .into_iter()
        .chain([u64::from(p.top_k), u64::from(p.min_tokens), p.seed, u64::from(p.choice), u64::from(request.position)])
        .chain(p.logit_bias.iter().flat_map(|&(id, bias)| [u64::from(id), u64::from(bias.to_bits())]))
        .chain(p.suppressed_until_min.iter().map(|&id| u64::from(id)))
        .chain(p.allowed_token_ids.iter().flatten().map(|&id| u64::from(id)))
        .chain(p.bad_words.iter().flatten().map(|&id| u64::from(id)))
        .chain(request.history.iter().map(|&id| u64::from(id)))
        .chain([request.prompt_len as u64]);
    words.fold(1, mix)
}

/// A hash in place of a log-probability: it adds up to nothing, and tells contexts apart.
pub(super) fn logprob(context: u64, id: u32) -> f32 {
    (mix(context, u64::from(id)) % 100_000) as f32 / -1000.0
}

/// The hidden state of [`MockModel`]: a hash, in numbers that are exact.
pub(super) fn state(context: u64) -> Vec<f32> {
    (1..=4).map(|component| (mix(context, component) % 1024) as f32 - 512.0).collect()
}

/// As many ids as are told, in an order that is as good as any.
pub(super) fn likeliest(context: u64, top: u32, vocab_size: usize) -> Vec<(u32, f32)> {
    let ids = (0..vocab_size.min(top as usize) as u64).map(|i| (context.wrapping_add(i) % vocab_size as u64) as u32);
    ids.map(|id| (id, logprob(context, id))).collect()
}

/// A step of splitmix64.
pub(super) fn mix(state: u64, word: u64) -> u64 {
    let mut z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
