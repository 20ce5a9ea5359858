//! From one row of logits to a token.
//!
//! Steps, in this order: logit_bias, repetition penalty, presence and frequency penalties, what is refused
//! ([`crate::choosable`]: grammar, `allowed_token_ids`, `bad_words`, `min_tokens`), and then what the device seam calls a
//! [`Draw`](baton_device::Draw), with the request's own random number ([`crate::philox`]): where there is nothing before it, the device makes it.
//! All in f64, so that rounding decides no cut. Logprobs are taken before every step: they are the model's own.
//!
//! So a token depends on its row of logits, its request and its position alone.

use baton_device::{Drawer, first_largest};

use crate::choosable::choosable;
use crate::{SampleRequest, SampledToken, Score, ScoreRequest, SequenceFailure, TokenMask};

/// Chooses tokens. Holds only memory that is reused.
#[derive(Debug, Default)]
pub struct Sampler {
    processed: Vec<f64>,
    drawer: Drawer,
}

impl Sampler {
    /// Chooses the next token.
    pub fn sample(&mut self, logits: &[f32], request: &SampleRequest) -> Result<SampledToken, SequenceFailure> {
        let (token, best) = self.choose(logits, request)?;
        let (logprob, top) = match request.params.logprobs {
            None => (0.0, Vec::new()),
            Some(count) => {
                let row = LogProbs::new(logits, best);
                (row.of(token), row.top(count as usize))
            }
        };
        Ok(SampledToken { token, logprob, top })
    }

    /// The next token, and the most likely one under the model alone.
    pub(crate) fn choose(&mut self, logits: &[f32], request: &SampleRequest) -> Result<(u32, u32), SequenceFailure> {
        let params = &*request.params;
        let best = first_largest(logits).ok_or(SequenceFailure::NonFiniteLogits)?;
        let mask = choosable(logits.len(), request)?;
        if params.is_greedy() {
            let token = match &mask {
                Some(mask) if !mask.allows(best) => first_max_allowed(logits, mask),
                _ => best,
            };
            return Ok((token, best));
        }
        self.process(logits, mask.as_ref(), request);
        let drawn = self.drawer.draw(&self.processed, &request.draw(0));
        Ok((drawn.unwrap_or_else(|| first_allowed(mask.as_ref())), best))
    }

    /// The probability of every token, after all steps. Logits may be -inf, for tokens ruled out.
    pub fn probabilities(&mut self, logits: &[f32], request: &SampleRequest) -> Result<Vec<f64>, SequenceFailure> {
        let mask = choosable(logits.len(), request)?;
        self.process(logits, mask.as_ref(), request);
        let candidates = self.drawer.candidates(&self.processed, &request.draw(0));
        let total: f64 = candidates.iter().map(|c| c.1).sum();
        let mut probabilities = vec![0.0; logits.len()];
        for (id, weight) in candidates {
            probabilities[*id as usize] = weight / total;
        }
        if candidates.is_empty() {
            probabilities[first_allowed(mask.as_ref()) as usize] = 1.0;
        }
        Ok(probabilities)
    }

    /// Leaves in `processed` the logits as they are drawn from.
    fn process(&mut self, logits: &[f32], mask: Option<&TokenMask>, request: &SampleRequest) {
        self.processed.clear();
        self.processed.extend(logits.iter().map(|&l| f64::from(l)));
        penalize(&mut self.processed, request);
        if let Some(mask) = mask {
            rule_out(&mut self.processed, mask);
        }
    }
}

/// What is taken where no logit is above -inf.
fn first_allowed(mask: Option<&TokenMask>) -> u32 {
    mask.and_then(|mask| mask.ids().next()).unwrap_or(0)
}

/// The bit of each lane in a word of a mask. Comparing with constants compiles to vector code, shifting by lane does not.
const BITS: [u32; 32] = {
    let mut bits = [0; 32];
    let mut lane = 0;
    while lane < 32 {
        bits[lane] = 1 << lane;
        lane += 1;
    }
    bits
};

/// The first of the largest logits that the mask allows, of finite ones. As in [`first_largest`], maxima side by side.
fn first_max_allowed(logits: &[f32], mask: &TokenMask) -> u32 {
    let mut max = [f32::NEG_INFINITY; 32];
    let mut raise = |chunk: &[f32], word: u32| {
        for ((&l, &bit), max) in chunk.iter().zip(&BITS).zip(&mut max) {
            let l = if word & bit != 0 { l } else { f32::NEG_INFINITY };
            *max = if l > *max { l } else { *max };
        }
    };
    let (chunks, rest) = logits.as_chunks::<32>();
    for (chunk, &word) in chunks.iter().zip(mask.words()).filter(|(_, word)| **word != 0) {
        raise(chunk, word);
    }
    raise(rest, mask.words().get(chunks.len()).copied().unwrap_or(0));

    let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let words = (0u32..).step_by(32).zip(logits.chunks(32).zip(mask.words()));
    let first = words.filter(|(_, (_, word))| **word != 0).find_map(|(start, (chunk, word))| {
        let lane = chunk.iter().zip(&BITS).position(|(&l, bit)| l == max && word & bit != 0)?;
        Some(start + lane as u32)
    });
    first.unwrap_or(0)
}

/// Only what the mask allows keeps its logit.
fn rule_out(logits: &mut [f64], mask: &TokenMask) {
    let words = mask.words().iter().copied().chain(std::iter::repeat(0));
    for (chunk, word) in logits.chunks_mut(32).zip(words).filter(|(_, word)| *word != u32::MAX) {
        for (l, bit) in chunk.iter_mut().zip(&BITS) {
            *l = if word & bit != 0 { *l } else { f64::NEG_INFINITY };
        }
    }
}

/// Every step that changes single logits. Ids outside the vocabulary have no logit to change.
fn penalize(logits: &mut [f64], request: &SampleRequest) {
    let params = &*request.params;
    for &(id, bias) in &params.logit_bias {
        if let Some(l) = logits.get_mut(id as usize) {
            *l += f64::from(bias);
        }
    }
    let repetition = f64::from(params.repetition_penalty);
    if repetition != 1.0 {
        for (id, _) in occurrences(&request.history) {
            if let Some(l) = logits.get_mut(id as usize) {
                *l = if *l > 0.0 { *l / repetition } else { *l * repetition };
            }
        }
    }
    let (presence, frequency) = (f64::from(params.presence_penalty), f64::from(params.frequency_penalty));
    if presence != 0.0 || frequency != 0.0 {
        for (id, count) in occurrences(request.history.get(request.prompt_len..).unwrap_or_default()) {
            if let Some(l) = logits.get_mut(id as usize) {
                *l -= presence + frequency * count as f64;
            }
        }
    }
}

/// Distinct ids with how often each occurs.
fn occurrences(ids: &[u32]) -> Vec<(u32, usize)> {
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    sorted.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect()
}

/// What a row says of the ids in question.
pub(crate) fn score(logits: &[f32], request: &ScoreRequest) -> Result<Score, SequenceFailure> {
    let best = first_largest(logits).ok_or(SequenceFailure::NonFiniteLogits)?;
    let row = LogProbs::new(logits, best);
    let logprobs = request.ids.iter().map(|&id| row.of(id)).collect();
    Ok(Score { logprobs, top: row.top(request.top as usize), hidden: Vec::new() })
}

/// Log-probabilities of a row that is finite.
struct LogProbs<'a> {
    logits: &'a [f32],
    best: u32,
    /// The logarithm of the sum of all exponentials.
    normalizer: f64,
}

impl<'a> LogProbs<'a> {
    /// `best`: where the largest logit is.
    fn new(logits: &'a [f32], best: u32) -> Self {
        let max = logits[best as usize];
        let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
        Self { logits, best, normalizer: f64::from(max) + sum.ln() }
    }

    fn of(&self, id: u32) -> f32 {
        (f64::from(self.logits[id as usize]) - self.normalizer) as f32
    }

    /// The `count` most likely ids, best first; of equals the smaller id.
    fn top(&self, count: usize) -> Vec<(u32, f32)> {
        match count {
            0 => return Vec::new(),
            1 => return vec![(self.best, self.of(self.best))],
            _ => {}
        }
        let logit = |id: &u32| self.logits[*id as usize];
        let order = |a: &u32, b: &u32| logit(b).total_cmp(&logit(a)).then(a.cmp(b));
        let mut ids: Vec<u32> = (0..self.logits.len() as u32).collect();
        let count = count.min(ids.len());
        if count < ids.len() {
            ids.select_nth_unstable_by(count - 1, order);
        }
        ids.truncate(count);
        ids.sort_unstable_by(order);
        ids.into_iter().map(|id| (id, self.of(id))).collect()
    }
}
