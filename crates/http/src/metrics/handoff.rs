//! Metrics of hand-offs and rollouts.

use prometheus::proto::MetricFamily;

use crate::generations::Role;
use crate::handoff::{Admission, Handoff};
use crate::metrics::families::Labelled;
use crate::observed::ShadowStats;

fn flag(set: bool) -> f64 {
    f64::from(u8::from(set))
}

/// What is known of one generation.
pub(super) fn families(labels: &Labelled, role: Role, handoff: &Handoff) -> Vec<MetricFamily> {
    let state = |state: &'static str| [("state", state)];
    let states = Admission::STATES.map(state);
    let admission = handoff.admission.state();
    let values: Vec<(&[(&str, &str)], f64)> =
        states.iter().map(|label| (label.as_slice(), flag(label[0].1 == admission))).collect();
    let role = [("role", role.name())];
    let mut families = vec![
        labels.gauges("baton_generation_info", "1; the generation's part is a label.", &[(&role, 1.0)]),
        labels.gauges("baton_handoff_state", "1 for where the hand-off stands.", &values),
        labels.counter("baton_canary_runs_total", "Replays of golden cases.", handoff.canary.runs),
        labels.gauge("baton_canary_drift", "1 if the last replay was out of tolerance.", flag(handoff.canary.drifted)),
    ];
    if let Some(parity) = &handoff.parity {
        families.extend([
            labels.gauge(
                "baton_parity_max_abs_logprob_diff",
                "Largest difference of a log-probability from the trainer's, in nats.",
                parity.max_abs_logprob_diff,
            ),
            labels.gauge("baton_parity_kl", "KL divergence from the trainer, in nats.", parity.kl),
            labels.gauge(
                "baton_parity_top1_agreement",
                "Part of the positions whose best token is the trainer's.",
                parity.top1_agreement,
            ),
        ]);
    }
    families
}

/// What a candidate has shown unseen.
pub(super) fn shadow_families(labels: &Labelled, stats: &ShadowStats) -> Vec<MetricFamily> {
    let requests = [
        ("equal", stats.equal),
        ("different", stats.compared - stats.equal),
        ("uncompared", stats.uncompared),
        ("failed", stats.failed),
        ("skipped", stats.skipped),
    ];
    let tokens = [("agreed", stats.agreed_tokens), ("behind", stats.compared_tokens - stats.agreed_tokens)];
    let counters = |name: &str, help: &str, results: &[(&'static str, u64)]| {
        let results: Vec<_> = results.iter().map(|&(result, count)| ([("result", result)], count)).collect();
        let values: Vec<(&[(&str, &str)], u64)> =
            results.iter().map(|(label, count)| (label.as_slice(), *count)).collect();
        labels.counters(name, help, &values)
    };
    vec![
        counters("baton_shadow_requests_total", "Requests answered unseen, by result.", &requests),
        counters("baton_shadow_tokens_total", "Tokens compared, up to and behind the first difference.", &tokens),
    ]
}
