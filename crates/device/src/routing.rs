//! Choosing experts from router logits: softmax scores as in Mixtral (arXiv 2401.04088), Qwen3 and
//! DeepSeek-V2 (arXiv 2405.04434), sigmoid scores as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
//!
//! A pure function on one row, so that every host-side backend chooses the same experts.

/// How router logits choose and weigh experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// What a logit is worth.
    pub scoring: Scoring,
    /// Restricts the choice to the best groups of experts; `None` for no groups.
    pub groups: Option<Groups>,
    /// Divide the chosen weights by their sum.
    pub norm_topk_prob: bool,
    /// Factor on the weights, after normalising.
    pub scaling_factor: f32,
    /// Experts of each token, `[vocab, top_k]`, distinct in a row: then these, and not the scores, choose (DeepSeek-V4).
    pub by_token: Option<Vec<u32>>,
}

/// From router logits to scores, which weigh the experts and, unless biased, choose them.
#[derive(Debug, Clone, PartialEq)]
pub enum Scoring {
    /// The softmax over all experts.
    Softmax,
    /// The sigmoid of each logit.
    Sigmoid {
        /// Added to the scores for choosing, not for weighing; one per expert.
        correction_bias: Vec<f32>,
    },
    /// `sqrt(ln(1 + e^logit))` (DeepSeek-V4).
    SqrtSoftplus {
        /// As above; empty where tokens choose.
        correction_bias: Vec<f32>,
    },
}

impl Scoring {
    /// What weighs the experts.
    fn scores(&self, logits: &[f32]) -> Vec<f32> {
        let each = |score: fn(f32) -> f32| logits.iter().map(|&logit| score(logit)).collect();
        match self {
            Scoring::Softmax => softmax(logits),
            Scoring::Sigmoid { .. } => each(|logit| 1.0 / (1.0 + (-logit).exp())),
            // Where e^logit is beyond f32, the logarithm is the logit.
            Scoring::SqrtSoftplus { .. } => each(|logit| (logit.max(0.0) + (-logit.abs()).exp().ln_1p()).sqrt()),
        }
    }

    fn correction_bias(&self) -> Option<&[f32]> {
        match self {
            Scoring::Softmax => None,
            Scoring::Sigmoid { correction_bias } | Scoring::SqrtSoftplus { correction_bias } => Some(correction_bias),
        }
    }
}

/// Groups of equally many experts, in order; only experts of the best groups can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// How many there are; divides the experts.
    pub count: usize,
    /// How many stay eligible.
    pub kept: usize,
    /// What makes a group good.
    pub score: GroupScore,
}

/// What makes a group of experts good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert (DeepSeek-V2).
    Best,
    /// The sum of its two best experts (DeepSeek-V3).
    TwoBest,
}

/// The experts of one token with their weights, by ascending expert; ties go to the lower expert.
pub fn select_experts(logits: &[f32], routing: &Routing) -> Vec<(usize, f32)> {
    let scores = routing.scoring.scores(logits);
    let mut choice = match routing.scoring.correction_bias() {
        None => scores.clone(),
        Some(bias) => scores.iter().zip(bias).map(|(score, bias)| score + bias).collect(),
    };
    if let Some(groups) = &routing.groups {
        leave_best_groups(&mut choice, groups);
    }

    weighed(&scores, top(&choice, routing.top_k), routing)
}

/// The experts of a token that names them, as [`select_experts`] gives them.
///
/// # Panics
/// If the routing has none by token.
pub fn weigh_experts(logits: &[f32], token: u32, routing: &Routing) -> Vec<(usize, f32)> {
    let by_token = routing.by_token.as_ref().expect("experts by token");
    let experts = &by_token[token as usize * routing.top_k..][..routing.top_k];
    weighed(&routing.scoring.scores(logits), experts.iter().map(|&expert| expert as usize).collect(), routing)
}

fn weighed(scores: &[f32], mut chosen: Vec<usize>, routing: &Routing) -> Vec<(usize, f32)> {
    chosen.sort_unstable();
    let sum: f32 = chosen.iter().map(|&e| scores[e]).sum();
    let norm = if routing.norm_topk_prob { 1.0 / (sum + 1e-20) } else { 1.0 };
    chosen.into_iter().map(|e| (e, scores[e] * norm * routing.scaling_factor)).collect()
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum: f32 = exp.iter().sum();
    exp.iter().map(|e| e / sum).collect()
}

/// Makes the experts outside the best groups ineligible.
fn leave_best_groups(choice: &mut [f32], groups: &Groups) {
    let size = choice.len() / groups.count;
    let score = |group: &[f32]| match groups.score {
        GroupScore::Best => group.iter().copied().fold(f32::NEG_INFINITY, f32::max),
        GroupScore::TwoBest => top(group, 2).into_iter().map(|e| group[e]).sum(),
    };
    let kept = top(&choice.chunks_exact(size).map(score).collect::<Vec<_>>(), groups.kept);
    for (_, group) in choice.chunks_exact_mut(size).enumerate().filter(|(g, _)| !kept.contains(g)) {
        group.fill(f32::NEG_INFINITY);
    }
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

    fn routing(scoring: Scoring, score: GroupScore) -> Routing {
        let groups = Some(Groups { count: 2, kept: 1, score });
        Routing { top_k: 2, scoring, groups, norm_topk_prob: true, scaling_factor: 2.0, by_token: None }
    }

    fn sigmoid(correction_bias: [f32; 4]) -> Scoring {
        Scoring::Sigmoid { correction_bias: correction_bias.into() }
    }

    fn experts(chosen: &[(usize, f32)]) -> Vec<usize> {
        chosen.iter().map(|c| c.0).collect()
    }

    #[test]
    fn a_group_wins_by_its_two_best_or_by_its_best() {
        // Group 0 has the single best expert, group 1 the better pair.
        let logits = [0.3, -3.0, 0.2, 0.2];
        for scoring in [Scoring::Softmax, sigmoid([0.0; 4])] {
            let chosen = select_experts(&logits, &routing(scoring.clone(), GroupScore::TwoBest));
            assert_eq!(experts(&chosen), [2, 3], "{scoring:?}");
            assert!((chosen[0].1 - 1.0).abs() < 1e-6, "two equal experts share the scaling factor: {chosen:?}");
            assert_eq!(experts(&select_experts(&logits, &routing(scoring, GroupScore::Best))), [0, 1]);
        }
    }

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let biased = Routing { groups: None, ..routing(sigmoid([0.0, 0.0, 0.0, 9.0]), GroupScore::Best) };
        let chosen = select_experts(&[1.0, 0.0, -1.0, -2.0], &biased);
        assert_eq!(experts(&chosen), [0, 3]);
        assert!(chosen[0].1 > chosen[1].1, "{chosen:?}");
    }

    #[test]
    fn a_token_chooses_its_experts_and_logits_weigh_them() {
        let logits = [30.0, -100.0, 0.0, 2.0];
        let scoring = Scoring::SqrtSoftplus { correction_bias: Vec::new() };
        let by_token = Some(vec![0, 1, 3, 2]);
        let rule = Routing { groups: None, by_token, ..routing(scoring, GroupScore::Best) };
        let [first, second] = [0, 1].map(|token| weigh_experts(&logits, token, &rule));
        assert_eq!((experts(&first), experts(&second)), (vec![0, 1], vec![2, 3]));
        assert!((first[0].1 - 2.0).abs() < 1e-6 && first[1].1 < 1e-12, "{first:?}");
        let scores = [0.0_f32, 2.0].map(|logit| (1.0 + logit.exp()).ln().sqrt());
        for ((_, weight), score) in second.iter().zip(scores) {
            assert!((weight - 2.0 * score / (scores[0] + scores[1])).abs() < 1e-6, "{second:?}");
        }
    }

    #[test]
    fn softmax_weights_are_shares_of_all_experts_unless_normalised() {
        let logits = [1.0_f32, 2.0, 3.0, 4.0].map(f32::ln);
        let rule = Routing { groups: None, scaling_factor: 1.0, ..routing(Scoring::Softmax, GroupScore::Best) };
        for (norm_topk_prob, expected) in [(false, [0.3, 0.4]), (true, [3.0 / 7.0, 4.0 / 7.0])] {
            let chosen = select_experts(&logits, &Routing { norm_topk_prob, ..rule.clone() });
            assert_eq!(experts(&chosen), [2, 3]);
            assert!(chosen.iter().zip(expected).all(|(c, e)| (c.1 - e).abs() < 1e-6), "{chosen:?}");
        }
    }
}
