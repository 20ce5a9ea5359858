//! Mixture of experts: choosing experts, bringing tokens to them, and adding up what they give.

use super::choose::top;
use super::elementwise::sigmoid;
use super::moves::row;
use super::norm::softmax;
use crate::array::Fault;

/// How router logits become weights of chosen experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gate {
    /// Experts per token.
    pub k: usize,
    /// Groups of equally many experts.
    pub groups: usize,
    /// Groups whose experts can be chosen.
    pub kept_groups: usize,
    /// A group is worth the sum of its two best experts, not only its best.
    pub two_best: bool,
    /// Scores are sigmoids, renormalised over the chosen (UNCONFIRMED: over the chosen, not over all); otherwise they
    /// are a softmax over all.
    pub sigmoid: bool,
    /// Factor on the weights.
    pub scale: f64,
    /// Added to the sum that weights are divided by.
    pub epsilon: f64,
}

impl Gate {
    /// The chosen experts of one token, best first, their weights, and the scores of all experts. `bias` is added to the
    /// scores for choosing, not for weighing.
    pub fn choose(&self, logits: &[f32], bias: Option<&[f32]>) -> (Vec<usize>, Vec<f32>, Vec<f32>) {
        let scores = match self.sigmoid {
            true => logits.iter().map(|&x| sigmoid(x)).collect(),
            false => softmax(logits, &[logits.len()], 0),
        };
        let mut worth: Vec<f32> = match bias {
            Some(bias) => scores.iter().zip(bias).map(|(s, b)| s + b).collect(),
            None => scores.clone(),
        };
        let size = worth.len() / self.groups;
        let best_of = if self.two_best { 2 } else { 1 };
        let group_worth = |g: &[f32]| top(g, best_of, true).into_iter().map(|e| g[e]).sum::<f32>();
        let kept = top(&worth.chunks_exact(size).map(group_worth).collect::<Vec<_>>(), self.kept_groups, true);
        for (_, group) in worth.chunks_exact_mut(size).enumerate().filter(|(g, _)| !kept.contains(g)) {
            group.fill(f32::NEG_INFINITY);
        }
        let chosen = top(&worth, self.k, true);
        let sum: f64 = match self.sigmoid {
            true => chosen.iter().map(|&e| f64::from(scores[e])).sum::<f64>() + self.epsilon,
            false => 1.0,
        };
        let weights = chosen.iter().map(|&e| (f64::from(scores[e]) / sum * self.scale) as f32).collect();
        (chosen, weights, scores)
    }
}

/// Softmax and choice of the best `k`, in this order, or in the other if `choose_first`: then the weights sum to one.
pub fn softmax_top_k(logits: &[f32], k: usize, choose_first: bool) -> (Vec<usize>, Vec<f32>) {
    let chosen = top(logits, k, true);
    let weights = if choose_first {
        let best: Vec<f32> = chosen.iter().map(|&e| logits[e]).collect();
        softmax(&best, &[k], 0)
    } else {
        let all = softmax(logits, &[logits.len()], 0);
        chosen.iter().map(|&e| all[e]).collect()
    };
    (chosen, weights)
}

/// Where each of the `tokens * k` choices goes when choices are sorted by expert, and how many choices each expert has.
pub fn dispatch(experts: &[i64], expert_count: usize) -> Result<(Vec<usize>, Vec<usize>), Fault> {
    let experts = experts.iter().map(|&e| row(e, expert_count, "expert")).collect::<Result<Vec<_>, _>>()?;
    let mut counts = vec![0; expert_count];
    experts.iter().for_each(|&e| counts[e] += 1);
    let mut next: Vec<usize> = counts.iter().scan(0, |sum, n| Some(std::mem::replace(sum, *sum + n))).collect();
    let mut place = |e: usize| {
        next[e] += 1;
        next[e] - 1
    };
    Ok((experts.into_iter().map(&mut place).collect(), counts))
}

/// Ends of the groups of rows that `list` names, as counts or cumulative; a fault if they do not fit `rows`.
pub fn group_ends(list: &[i64], cumulative: bool, rows: usize) -> Result<Vec<usize>, Fault> {
    let mut end = 0i64;
    list.iter()
        .map(|&n| {
            let next = if cumulative { n } else { end + n };
            if next < end || next > rows as i64 {
                return Err(Fault::OutOfRange(format!("a group of rows {end}..{next} is outside 0..{rows}")));
            }
            end = next;
            Ok(next as usize)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATE: Gate =
        Gate { k: 2, groups: 1, kept_groups: 1, two_best: false, sigmoid: false, scale: 1.0, epsilon: 0.0 };

    fn near(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6)
    }

    #[test]
    fn softmax_scores_weigh_as_they_are() {
        let logits = [0.0, 2.0f32.ln(), 0.0, 4.0f32.ln()];
        let (chosen, weights, scores) = GATE.choose(&logits, None);
        assert_eq!(chosen, [3, 1]);
        assert!(near(&weights, &[0.5, 0.25]) && near(&scores, &[0.125, 0.25, 0.125, 0.5]));
        assert!(near(&Gate { scale: 2.0, ..GATE }.choose(&logits, None).1, &[1.0, 0.5]));
    }

    #[test]
    fn sigmoid_scores_are_renormalised_over_the_chosen() {
        let gate = Gate { sigmoid: true, ..GATE };
        let (chosen, weights, _) = gate.choose(&[0.0, -3.0f32.ln(), -100.0], None);
        assert_eq!(chosen, [0, 1]);
        assert!(near(&weights, &[0.5 / 0.75, 0.25 / 0.75]), "{weights:?}");
    }

    #[test]
    fn a_bias_chooses_but_does_not_weigh() {
        let gate = Gate { k: 1, sigmoid: true, epsilon: 0.5, ..GATE };
        let (chosen, weights, _) = gate.choose(&[0.0, 0.0, 0.0], Some(&[0.0, 0.0, 1.0]));
        assert_eq!((chosen, weights), (vec![2], vec![0.5]));
    }

    #[test]
    fn only_experts_of_the_best_groups_are_chosen() {
        let gate = Gate { groups: 2, sigmoid: true, ..GATE };
        let logits = [3.0, -5.0, 2.0, 2.0];
        assert_eq!(gate.choose(&logits, None).0, [0, 1]);
        assert_eq!(Gate { two_best: true, ..gate }.choose(&logits, None).0, [2, 3]);
    }

    #[test]
    fn choosing_before_softmax_makes_the_weights_sum_to_one() {
        let logits = [0.0, 2.0f32.ln(), 0.0, 4.0f32.ln()];
        let (experts, weights) = softmax_top_k(&logits, 2, false);
        assert!(experts == [3, 1] && near(&weights, &[0.5, 0.25]));
        let (experts, weights) = softmax_top_k(&logits, 2, true);
        assert!(experts == [3, 1] && near(&weights, &[2.0 / 3.0, 1.0 / 3.0]));
    }

    #[test]
    fn choices_are_sorted_by_expert_and_keep_their_order_within_one() {
        let (places, counts) = dispatch(&[2, 0, 2, 1, 0, 2], 4).unwrap();
        assert_eq!((places, counts), (vec![3, 0, 4, 2, 1, 5], vec![2, 1, 3, 0]));
        for bad in [-1, 4] {
            assert!(matches!(dispatch(&[0, bad], 4), Err(Fault::OutOfRange(_))));
        }
    }

    #[test]
    fn groups_of_rows_are_counts_or_ends_and_must_fit() {
        assert_eq!(group_ends(&[2, 0, 3], false, 5).unwrap(), [2, 2, 5]);
        assert_eq!(group_ends(&[2, 2, 5], true, 5).unwrap(), [2, 2, 5]);
        for (list, cumulative) in [(&[3, 3], false), (&[4, 3], true), (&[1, -1], false), (&[2, 6], true)] {
            assert!(matches!(group_ends(list, cumulative, 5), Err(Fault::OutOfRange(_))), "{list:?}");
        }
    }
}
