//! What is observed of two generations, and the rules that a candidate must keep.
//!
//! Counts are since the candidate was staged. Rates count from the beginning of the traffic under way, so that a long
//! good time does not hide what goes wrong now.

use std::time::Duration;

use baton_http::Parity;

use super::plan::Rules;

/// Counts and median times, as far as rules need them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observation {
    pub serving: Figures,
    pub candidate: Figures,
    /// Answers of the candidate that nobody saw: given to it, failed, failed on values that are not finite.
    pub shadows: u64,
    pub shadow_failed: u64,
    pub shadow_non_finite: u64,
    /// Of these, compared with what the client got.
    pub compared: u64,
    pub compared_tokens: u64,
    pub agreed_tokens: u64,
    /// Times of what was compared.
    pub shadow_serving: Latency,
    pub shadow_candidate: Latency,
    /// Why the candidate cannot serve any more: its engine stopped, or its hand-off is revoked.
    pub broken: Option<String>,
}

/// One generation from its clients' side.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figures {
    pub requests: u64,
    /// Failed by the generation's own fault.
    pub errors: u64,
    pub non_finite: u64,
    pub latency: Latency,
}

/// Medians, and how many times they are of.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Latency {
    pub to_first_token: Option<Duration>,
    pub first_tokens: u64,
    pub per_output_token: Option<Duration>,
    pub output_tokens: u64,
}

impl Observation {
    /// Requests and failures of the candidate, seen and unseen.
    fn tried(&self) -> (u64, u64) {
        (self.candidate.requests + self.shadows, self.candidate.errors + self.shadow_failed)
    }

    /// Tokens that agree, of those compared.
    pub fn agreement(&self) -> Option<f64> {
        (self.compared_tokens > 0).then(|| self.agreed_tokens as f64 / self.compared_tokens as f64)
    }
}

/// The rule that a candidate breaks, with the figures; `baseline` is what had been seen when its traffic began.
pub fn broken(rules: &Rules, seen: &Observation, baseline: &Observation) -> Option<String> {
    if let Some(reason) = &seen.broken {
        return Some(reason.clone());
    }
    let non_finite = seen.candidate.non_finite + seen.shadow_non_finite;
    if rules.nan_logits && non_finite > 0 {
        return Some(format!("nan_logits: {non_finite} answers failed on logits that are not finite"));
    }
    let (all, before) = (seen.tried(), baseline.tried());
    let (requests, errors) = (all.0.saturating_sub(before.0), all.1.saturating_sub(before.1));
    let rate = errors as f64 / requests as f64;
    if let Some(most) = rules.max_error_rate
        && requests >= rules.min_requests
        && rate > most
    {
        return Some(format!("max_error_rate {most}: {errors} of {requests} requests failed ({rate:.4})"));
    }
    if let Some(most) = rules.max_latency_ratio {
        let pairs = [(seen.shadow_serving, seen.shadow_candidate), (seen.serving.latency, seen.candidate.latency)];
        let slow = pairs.iter().find_map(|(serving, candidate)| slower(serving, candidate, most, rules.min_requests));
        if let Some(figures) = slow {
            return Some(format!("max_latency_ratio {most}: {figures}"));
        }
    }
    if let (Some(least), Some(agreement)) = (rules.min_shadow_agreement, seen.agreement())
        && seen.compared >= rules.min_requests
        && agreement < least
    {
        let (agreed, tokens) = (seen.agreed_tokens, seen.compared_tokens);
        return Some(format!("min_shadow_agreement {least}: {agreed} of {tokens} tokens agree ({agreement:.4})"));
    }
    None
}

fn slower(serving: &Latency, candidate: &Latency, most: f64, min: u64) -> Option<String> {
    let ratio = |what: &str, counts: [u64; 2], times: [Option<Duration>; 2]| {
        let [Some(serving), Some(candidate)] = times else { return None };
        let ratio = candidate.as_secs_f64() / serving.as_secs_f64().max(f64::MIN_POSITIVE);
        let words = || {
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            format!("{what} takes {:.2} ms where {:.2} ms are served ({ratio:.2})", ms(candidate), ms(serving))
        };
        (counts.iter().all(|&count| count >= min) && ratio > most).then(words)
    };
    let (s, c) = (serving, candidate);
    ratio("the first token", [s.first_tokens, c.first_tokens], [s.to_first_token, c.to_first_token])
        .or_else(|| ratio("a token", [s.output_tokens, c.output_tokens], [s.per_output_token, c.per_output_token]))
}

/// The rule that what the gate measured breaks.
pub fn broken_parity(rules: &Rules, parity: Option<Parity>) -> Option<String> {
    let limits = [rules.max_parity_logprob_diff, rules.max_parity_kl, rules.min_parity_top1];
    let Some(parity) = parity else {
        let unmeasured =
            "the plan has rules on parity, and none was measured; it takes a bundle and --handoff warn or require";
        return limits.iter().any(Option::is_some).then(|| unmeasured.to_owned());
    };
    let above = |name: &str, limit: Option<f64>, value: f64| {
        limit.filter(|&most| value > most || value.is_nan()).map(|most| format!("{name} {most}: it is {value:.3e}"))
    };
    let too_few = |least: &f64| parity.top1_agreement < *least || parity.top1_agreement.is_nan();
    above("max_parity_logprob_diff", limits[0], parity.max_abs_logprob_diff)
        .or_else(|| above("max_parity_kl", limits[1], parity.kl))
        .or_else(|| {
            let least = limits[2].filter(too_few)?;
            Some(format!("min_parity_top1 {least}: it is {:.4}", parity.top1_agreement))
        })
}
