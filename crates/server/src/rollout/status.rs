//! Where a rollout stands, as JSON, and what is observed of it, as values.

use std::time::Duration;

use baton_http::{GenerationStats, Latencies, Observed, Traffic};
use serde_json::{Value, json};

use super::candidate::Serving;
use super::ledger::Ledger;
use super::policy::{Rollout, Rollouts};
use super::rules::{Figures, Latency, Observation};

/// What the policy looks at.
pub fn observation(observed: &Observed, broken: Option<String>) -> Observation {
    let shadow = &observed.shadow;
    let of = |stats: &GenerationStats| Figures {
        requests: stats.requests,
        errors: stats.errors,
        non_finite: stats.non_finite,
        latency: latency(&stats.time_to_first_token, &stats.time_per_output_token),
    };
    Observation {
        serving: of(&observed.serving),
        candidate: observed.candidate.as_ref().map(of).unwrap_or_default(),
        shadows: shadow.started,
        shadow_failed: shadow.failed,
        shadow_non_finite: shadow.non_finite,
        compared: shadow.compared,
        compared_tokens: shadow.compared_tokens,
        agreed_tokens: shadow.agreed_tokens,
        shadow_serving: latency(&shadow.serving_time_to_first_token, &shadow.serving_time_per_output_token),
        shadow_candidate: latency(&shadow.candidate_time_to_first_token, &shadow.candidate_time_per_output_token),
        broken,
    }
}

fn latency(first: &Latencies, rest: &Latencies) -> Latency {
    Latency {
        to_first_token: first.median(),
        first_tokens: first.count(),
        per_output_token: rest.median(),
        output_tokens: rest.count(),
    }
}

/// The answer of `GET /admin/rollout`.
pub fn json(rollouts: &Rollouts, serving: Option<&Serving>, ledger: &Ledger, now: Duration) -> Value {
    let serving = serving.map(|s| json!({"model": s.model, "generation": s.generation, "names": s.names}));
    let current = rollouts.current.as_ref().map(|rollout| of(rollout, now));
    let (id, phase) = (ledger.rollout, ledger.phase.map(|phase| phase.name()));
    json!({
        "object": "rollout",
        "id": (id > 0).then_some(id),
        // The journal knows of rollouts before the last restart.
        "phase": current.as_ref().map_or(json!(phase.unwrap_or("none")), |current| current["phase"].clone()),
        "serving": serving,
        "rollout": current,
        "promotions": ledger.promotions,
        "transitions": ledger.recent,
    })
}

fn of(rollout: &Rollout, now: Duration) -> Value {
    let (plan, (requests, time)) = (rollout.plan(), rollout.progress(now));
    let stage = rollout.stage.map(|number| {
        let stage = &plan.stages[number];
        json!({
            "number": number + 1,
            "of": plan.stages.len(),
            "requests": {"seen": requests, "wanted": stage.requests},
            "seconds": {"passed": time.as_secs(), "wanted": stage.seconds},
        })
    });
    let traffic = match rollout.traffic {
        Traffic::None => json!({"kind": "none"}),
        Traffic::Shadow(share) => json!({"kind": "shadow", "share": share}),
        Traffic::Share(share) => json!({"kind": "share", "share": share}),
    };
    let gate = rollout.verdict.as_ref().map(|verdict| {
        let parity = verdict.parity.map(|parity| {
            json!({
                "max_abs_logprob_diff": parity.max_abs_logprob_diff,
                "kl": parity.kl,
                "top1_agreement": parity.top1_agreement,
            })
        });
        json!({"admitted": verdict.admitted, "summary": verdict.summary, "parity": parity})
    });
    let seen = &rollout.last;
    json!({
        "id": rollout.id,
        "phase": rollout.phase,
        "model": plan.model,
        "name": plan.name,
        "generation": rollout.generation,
        "traffic": traffic,
        "stage": stage,
        "waits_for_command": rollout.waits(),
        "ended": rollout.phase.is_terminal(),
        "reason": rollout.reason,
        "gate": gate,
        "plan": plan,
        "observed": {
            "serving": figures(&seen.serving),
            "candidate": figures(&seen.candidate),
            "shadow": {
                "requests": seen.shadows,
                "failed": seen.shadow_failed,
                "non_finite": seen.shadow_non_finite,
                "compared": seen.compared,
                "agreement": seen.agreement(),
                "serving": times(&seen.shadow_serving),
                "candidate": times(&seen.shadow_candidate),
            },
        },
    })
}

fn figures(figures: &Figures) -> Value {
    let rate = (figures.requests > 0).then(|| figures.errors as f64 / figures.requests as f64);
    json!({
        "requests": figures.requests,
        "errors": figures.errors,
        "error_rate": rate,
        "non_finite": figures.non_finite,
        "median": times(&figures.latency),
    })
}

fn times(latency: &Latency) -> Value {
    let ms = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1e3);
    json!({"ttft_ms": ms(latency.to_first_token), "tpot_ms": ms(latency.per_output_token)})
}
