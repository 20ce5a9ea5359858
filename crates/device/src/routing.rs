//! Choosing experts from router logits: the rule of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
//!
//! A pure function on one row, so that every host-side backend chooses the same experts.

/// How router logits choose and weigh experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// Groups the experts are split into, in order; 1 for none.
    pub n_group: usize,
    /// Groups that stay eligible, by the sum of their two best biased scores.
    pub topk_group: usize,
    /// Added to the sigmoid scores for choosing, not for weighing; one per expert.
    pub correction_bias: Vec<f32>,
    /// Divide the chosen weights by their sum.
    pub norm_topk_prob: bool,
    /// Factor on the weights, after normalising.
    pub scaling_factor: f32,
}

/// The experts of one token with their weights, by ascending expert; ties go to the lower expert.
pub fn select_experts(logits: &[f32], routing: &Routing) -> Vec<(usize, f32)> {
    let experts = logits.len();
    let scores: Vec<f32> = logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect();
    let mut choice: Vec<f32> = scores.iter().zip(&routing.correction_bias).map(|(s, b)| s + b).collect();

    if routing.n_group > 1 {
        let size = experts / routing.n_group;
        let group_score = |g: usize| {
            let mut best = choice[g * size..(g + 1) * size].to_vec();
            best.sort_by(|a, b| b.total_cmp(a));
            best.iter().take(2).sum::<f32>()
        };
        let kept = top(&(0..routing.n_group).map(group_score).collect::<Vec<_>>(), routing.topk_group);
        for g in (0..routing.n_group).filter(|g| !kept.contains(g)) {
            choice[g * size..(g + 1) * size].fill(f32::NEG_INFINITY);
        }
    }

    let mut chosen = top(&choice, routing.top_k);
    chosen.sort_unstable();
    let sum: f32 = chosen.iter().map(|&e| scores[e]).sum();
    let norm = if routing.norm_topk_prob { 1.0 / (sum + 1e-20) } else { 1.0 };
    chosen.into_iter().map(|e| (e, scores[e] * norm * routing.scaling_factor)).collect()
}

/// Indices of the `k` largest, best first, ties to the lower index.
fn top(values: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    order.truncate(k);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routing() -> Routing {
        Routing {
            top_k: 2,
            n_group: 2,
            topk_group: 1,
            correction_bias: vec![0.0; 4],
            norm_topk_prob: true,
            scaling_factor: 2.0,
        }
    }

    #[test]
    fn a_group_wins_by_its_two_best_not_by_its_best() {
        // Group 0 has the single best expert, group 1 the better pair.
        let chosen = select_experts(&[3.0, -3.0, 2.0, 2.0], &routing());
        assert_eq!(chosen.iter().map(|c| c.0).collect::<Vec<_>>(), [2, 3]);
        assert!((chosen[0].1 - 1.0).abs() < 1e-6, "two equal experts share the scaling factor: {chosen:?}");
    }

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let biased = Routing { n_group: 1, correction_bias: vec![0.0, 0.0, 0.0, 9.0], ..routing() };
        let chosen = select_experts(&[1.0, 0.0, -1.0, -2.0], &biased);
        assert_eq!(chosen.iter().map(|c| c.0).collect::<Vec<_>>(), [0, 3]);
        assert!(chosen[0].1 > chosen[1].1, "{chosen:?}");
    }
}
