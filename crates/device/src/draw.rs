//! The choice of a token from a row of logits: temperature, top_k, top_p, min_p, then one draw. The judge of every device
//! that does it itself.
//!
//! All in f64, so that rounding decides no cut. The draw inverts the cumulative distribution over the kept tokens by
//! ascending id. So a token depends on its row and its [`Draw`] alone. Nothing sorts the vocabulary: selection finds the
//! few tokens that a cut keeps.

use std::cmp::Ordering;

use crate::first_largest;

/// How a token is chosen from a row of logits. Values outside of the ranges are harmless.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 for the first of the largest, whatever the other fields say.
    pub temperature: f32,
    /// Keeps the k most likely, and ties with the k-th; 0 for all.
    pub top_k: u32,
    /// Keeps the smallest set of most likely tokens that reaches this probability, of equal ones the smaller ids; 1 for all.
    pub top_p: f32,
    /// Keeps tokens at least this likely relative to the most likely; 0 for all.
    pub min_p: f32,
    /// The random number, in [0, 1).
    pub uniform: f64,
}

impl Draw {
    /// The first of the largest.
    pub const LARGEST: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };

    /// Whether it is the first of the largest.
    pub fn takes_the_largest(&self) -> bool {
        // Also what is not a number divides nothing.
        self.temperature.is_nan() || self.temperature <= 0.0
    }
}

/// A token that can be drawn, with its weight relative to the most likely one.
pub type Candidate = (u32, f64);

/// Draws tokens on the host. Holds only memory that is reused.
#[derive(Debug, Default)]
pub struct Drawer {
    widened: Vec<f64>,
    selection: Vec<f64>,
    candidates: Vec<Candidate>,
}

impl Drawer {
    /// What [`Backend::choose`](crate::Backend::choose) gives for logits of `cols` columns, one draw per row.
    pub fn choose(&mut self, logits: &[f32], cols: usize, draws: &[Draw]) -> Vec<Option<u32>> {
        assert_eq!(logits.len(), draws.len() * cols, "a draw for each row");
        let rows = logits.chunks_exact(cols).zip(draws);
        rows.map(|(row, draw)| {
            let largest = first_largest(row)?;
            if draw.takes_the_largest() {
                return Some(largest);
            }
            let mut widened = std::mem::take(&mut self.widened);
            widened.clear();
            widened.extend(row.iter().map(|&l| f64::from(l)));
            let drawn = self.draw(&widened, draw);
            self.widened = widened;
            drawn
        })
        .collect()
    }

    /// The first candidate at which the cumulative weight exceeds the random number's share of the total; `None` if there is
    /// no candidate.
    pub fn draw(&mut self, logits: &[f64], draw: &Draw) -> Option<u32> {
        let candidates = self.candidates(logits, draw);
        let goal = draw.uniform * candidates.iter().map(|c| c.1).sum::<f64>();
        let mut mass = 0.0;
        let drawn = candidates.iter().find(|c| {
            mass += c.1;
            mass > goal
        });
        drawn.or(candidates.last()).map(|c| c.0)
    }

    /// The tokens that can be drawn, by ascending id. Logits may be -inf, for tokens ruled out; there is no candidate only
    /// if none is above that.
    pub fn candidates(&mut self, logits: &[f64], draw: &Draw) -> &[Candidate] {
        let Self { selection, candidates, .. } = self;
        let Draw { temperature, top_k, top_p, min_p, .. } = *draw;
        candidates.clear();
        let Some((best, max)) = first_max(logits) else { return candidates };
        if !draw.takes_the_largest() {
            let threshold = kth_largest(logits, top_k as usize, selection);
            // Relative to the maximum first: exact for large logits, and never an overflow.
            let weight = |l: f64| ((l - max) / f64::from(temperature)).exp();
            let kept = (0u32..).zip(logits).filter(|(_, l)| **l >= threshold);
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
        candidates
    }
}

/// The first of the largest logits, if one is above -inf.
fn first_max(logits: &[f64]) -> Option<(u32, f64)> {
    let mut best = None;
    let mut max = f64::NEG_INFINITY;
    for (id, &l) in (0u32..).zip(logits) {
        if l > max {
            (best, max) = (Some(id), l);
        }
    }
    best.map(|id| (id, max))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_has_its_own_draw_and_one_that_is_not_finite_has_no_token() {
        let row = [1.0, 3.0, 3.0, f32::MIN];
        let all = Draw { temperature: 1.0, ..Draw::LARGEST };
        let draws = [
            (Draw::LARGEST, 1),
            (Draw { uniform: 0.99, ..Draw::LARGEST }, 1),
            (Draw { temperature: f32::NAN, ..all }, 1),
            (Draw { temperature: -1.0, ..all }, 1),
            (all, 0),
            (Draw { uniform: 0.9999, ..all }, 2),
            (Draw { top_k: 1, ..all }, 1),
            (Draw { top_k: 1, uniform: 0.5, ..all }, 2),
            (Draw { top_p: 0.0, uniform: 0.9, ..all }, 1),
            (Draw { min_p: 1.0, uniform: 0.4, ..all }, 1),
            (Draw { min_p: 2.0, uniform: 0.9, ..all }, 1),
        ];
        let logits = row.repeat(draws.len());
        let chosen = Drawer::default().choose(&logits, row.len(), &draws.map(|(draw, _)| draw));
        assert_eq!(chosen, draws.map(|(_, token)| Some(token)));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let logits = [[0.0, bad], [0.0, 1.0]].concat();
            assert_eq!(Drawer::default().choose(&logits, 2, &[all, all]), [None, Some(0)]);
        }
    }
}
