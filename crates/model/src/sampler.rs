//! From one row of logits to a token.
//!
//! Steps, in this order: logit_bias, repetition penalty, presence and frequency penalties, what is refused
//! ([`crate::choosable`]: grammar, `allowed_token_ids`, `bad_words`, `min_tokens`), temperature, top_k, top_p, min_p;
//! then one draw. All in f64, so that rounding decides no cut. Logprobs are taken before every step: they are the
//! model's own.
//!
//! The draw inverts the cumulative distribution over the kept tokens by ascending id, with the
//! request's own random number ([`crate::philox`]). So a token depends on its row of logits, its
//! request and its position alone. Nothing sorts the vocabulary: selection finds the few tokens that
//! a cut keeps.

use std::cmp::Ordering;

use baton_device::first_largest;

use crate::choosable::choosable;
use crate::philox::uniform;
use crate::{SampleRequest, SampledToken, SamplingParams, Score, ScoreRequest, SequenceFailure, TokenMask};

/// A token that can be drawn, with its weight relative to the most likely one.
type Candidate = (u32, f64);

/// Chooses tokens. Holds only memory that is reused.
#[derive(Debug, Default)]
pub struct Sampler {
    processed: Vec<f64>,
    selection: Vec<f64>,
    candidates: Vec<Candidate>,
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
        self.select(logits, mask.as_ref(), request);
        Ok((draw(&self.candidates, uniform(params.seed, params.choice, request.position)), best))
    }

    /// The probability of every token, after all steps. Logits may be -inf, for tokens ruled out.
    pub fn probabilities(&mut self, logits: &[f32], request: &SampleRequest) -> Result<Vec<f64>, SequenceFailure> {
        self.select(logits, choosable(logits.len(), request)?.as_ref(), request);
        let total: f64 = self.candidates.iter().map(|c| c.1).sum();
        let mut probabilities = vec![0.0; logits.len()];
        for (id, weight) in &self.candidates {
            probabilities[*id as usize] = weight / total;
        }
        Ok(probabilities)
    }

    /// Leaves in `candidates` the tokens that can be drawn, by ascending id; at least one. All are of the mask.
    fn select(&mut self, logits: &[f32], mask: Option<&TokenMask>, request: &SampleRequest) {
        let Self { processed, selection, candidates } = self;
        processed.clear();
        processed.extend(logits.iter().map(|&l| f64::from(l)));
        penalize(processed, request);
        if let Some(mask) = mask {
            rule_out(processed, mask);
        }

        let SamplingParams { temperature, top_k, top_p, min_p, .. } = *request.params;
        let (best, max) = first_max(processed, mask.and_then(|mask| mask.ids().next()).unwrap_or(0));
        candidates.clear();
        if temperature > 0.0 {
            let threshold = kth_largest(processed, top_k as usize, selection);
            // Relative to the maximum first: exact for large logits, and never an overflow.
            let weight = |l: f64| ((l - max) / f64::from(temperature)).exp();
            let kept = (0u32..).zip(processed.iter()).filter(|(_, l)| **l >= threshold);
            candidates.extend(kept.map(|(id, l)| (id, weight(*l))).filter(|c| c.1 > 0.0));
            if top_p < 1.0 {
                keep_nucleus(candidates, f64::from(top_p));
            }
            if min_p > 0.0 {
                candidates.retain(|c| c.1 >= f64::from(min_p));
            }
            candidates.sort_unstable_by_key(|c| c.0);
        }
        if candidates.is_empty() {
            candidates.push((best, 1.0));
        }
    }
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

/// The first of the largest logits, or `otherwise` if there is none above -inf.
fn first_max(logits: &[f64], otherwise: u32) -> (u32, f64) {
    let mut best = (otherwise, f64::NEG_INFINITY);
    for (id, &l) in (0u32..).zip(logits) {
        if l > best.1 {
            best = (id, l);
        }
    }
    best
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

/// The k-th largest logit: ties with it are kept. The smallest f64 where nothing is cut.
fn kth_largest(logits: &[f64], k: usize, scratch: &mut Vec<f64>) -> f64 {
    if k == 0 || k >= logits.len() {
        return f64::MIN;
    }
    scratch.clear();
    scratch.extend_from_slice(logits);
    *scratch.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// Most likely first; equal ones by ascending id.
fn by_weight(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Keeps the smallest set of most likely candidates whose mass reaches `p`; at least one. A small set
/// is the rule, so ever larger heads are tried instead of sorting everything.
fn keep_nucleus(candidates: &mut Vec<Candidate>, p: f64) {
    let goal = p * candidates.iter().map(|c| c.1).sum::<f64>();
    let mut head = 64;
    while !candidates.is_empty() {
        head = candidates.len().min(head);
        if head < candidates.len() {
            candidates.select_nth_unstable_by(head - 1, by_weight);
        }
        candidates[..head].sort_unstable_by(by_weight);
        let mut mass = 0.0;
        let reached = candidates[..head].iter().position(|c| {
            mass += c.1;
            mass >= goal
        });
        match reached {
            Some(last) => return candidates.truncate(last + 1),
            None if head == candidates.len() => return,
            None => head *= 8,
        }
    }
}

/// The first candidate at which the cumulative weight exceeds `u` of the total.
fn draw(candidates: &[Candidate], u: f64) -> u32 {
    let goal = u * candidates.iter().map(|c| c.1).sum::<f64>();
    let mut mass = 0.0;
    let drawn = candidates.iter().find(|c| {
        mass += c.1;
        mass > goal
    });
    drawn.or(candidates.last()).expect("at least one candidate").0
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
