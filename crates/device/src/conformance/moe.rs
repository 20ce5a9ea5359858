//! Routed experts: chosen by scores of all kinds, or by tokens; bounded or not.

use super::inputs::{Source, activation, router_logits, uniform};
use super::{Case, Full, outputs};
use crate::{Code, DType, GroupScore, Groups, HostExperts, Result, Routing, Scoring, TokenIds, WeightFormat};

/// Tokens of a vocabulary, where they choose.
const VOCAB: usize = 11;

/// The cases of devices that offer [`crate::Op::CompressedAttention`].
pub(super) fn bounded_cases() -> impl Iterator<Item = Case> {
    use WeightFormat::{BF16, F32};
    let shapes = [
        (1, 64, 32, 8, F32),
        (19, 96, 64, 16, BF16),
        (5, 37, 23, 9, F32),
        (7, 128, 256, 8, WeightFormat::Coded(Code::E4M3)),
    ];
    let each = move |by_token| {
        shapes.map(|(rows, hidden, intermediate, experts, format)| Case::BoundedMoe {
            rows,
            hidden,
            intermediate,
            experts,
            format,
            by_token,
        })
    };
    [false, true].into_iter().flat_map(each)
}

/// Runs a [`Case::Moe`] or a [`Case::BoundedMoe`].
pub(super) fn evaluate<B: Full>(case: &Case, b: &B, inputs: DType) -> Result<Vec<f32>> {
    let plain = Routing {
        top_k: 3,
        scoring: Scoring::Softmax,
        groups: None,
        norm_topk_prob: true,
        scaling_factor: 1.5,
        by_token: None,
    };
    let (sizes, format, limit, routing) = match *case {
        Case::Moe { rows, hidden, intermediate, experts, format, groups } => {
            let scoring = match groups {
                Some(GroupScore::TwoBest) => Scoring::Sigmoid { correction_bias: uniform(4, experts, 0.1) },
                Some(GroupScore::Best) | None => Scoring::Softmax,
            };
            let norm_topk_prob = groups != Some(GroupScore::Best);
            let groups = groups.map(|score| Groups { count: 4, kept: 2, score });
            ([rows, hidden, intermediate, experts], format, None, Routing { scoring, groups, norm_topk_prob, ..plain })
        }
        Case::BoundedMoe { rows, hidden, intermediate, experts, format, by_token } => {
            let correction_bias = if by_token { Vec::new() } else { uniform(4, experts, 0.1) };
            // Three different ones each, in no order.
            let of_token = |token: usize| [5, 1, 3].map(|step| ((token * 7 + step) % experts) as u32);
            let by_token = by_token.then(|| (0..VOCAB).flat_map(of_token).collect());
            let routing = Routing { scoring: Scoring::SqrtSoftplus { correction_bias }, by_token, ..plain };
            // Products are of this order.
            ([rows, hidden, intermediate, experts], format, Some(0.25), routing)
        }
        _ => unreachable!("{case:?}"),
    };
    let [rows, hidden, intermediate, experts] = sizes;
    let by_token = routing.by_token.is_some();
    let sources = |seed: u64, shape: [usize; 2]| -> Vec<Source> {
        let scale = (shape[1] as f32).sqrt().recip();
        (0..experts).map(|e| Source::new(format, shape.to_vec(), seed + e as u64, scale)).collect()
    };
    let (gate, up) = (sources(100, [intermediate, hidden]), sources(200, [intermediate, hidden]));
    let down = sources(300, [hidden, intermediate]);
    let expert = |e: usize| [&gate[e], &up[e], &down[e]].map(Source::tensor);
    let weights = b.expert_weights(HostExperts {
        count: experts,
        held: 0..experts,
        source: &mut (0..experts).map(expert).collect::<Vec<_>>(),
        formats: [format; 3],
        limit,
        routing,
    })?;
    let x = activation(b, inputs, rows, hidden, 1)?;
    let logits = router_logits(b, inputs, rows, experts)?;
    let mut out = b.tensor(rows, hidden)?;
    if by_token {
        let ids: Vec<u32> = (0..rows).map(|row| (row * 4 % VOCAB) as u32).collect();
        b.fused_moe_by_token(&x, &logits, TokenIds::Known(&ids), &weights, &mut out)?;
    } else {
        b.fused_moe(&x, &logits, &weights, &mut out)?;
    }
    outputs(b, &[&out])
}
