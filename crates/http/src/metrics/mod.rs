//! What `/metrics` shows.
//!
//! The HTTP side counts its own requests and connections ([`HttpMetrics`]); each generation has the histograms and counters of its
//! requests ([`ModelMetrics`], fed by a [`Meter`] per request). What the engine counts, and what is known of a hand-off
//! and of shadows, is read at scrape time. Both live generations are in the same families, told apart by a label; one
//! that is retired vanishes, and so do its series. Names with `vllm:` are those of vLLM, so that its dashboards and
//! scaling rules work; ours begin with `baton_`. No label takes its value from a request.

mod encoder;
mod engine;
mod families;
mod handoff;
mod meter;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use baton_engine::SubmitError;
use prometheus::proto::MetricFamily;
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

use crate::encoder::Encoder;
use crate::error::Refusal;
use crate::generation::Generation;
use crate::generations::{All, Generations, Role};
use crate::metrics::families::Labelled;
use crate::summary::RequestSummary;
use crate::usage::{Usage, Used};

pub(crate) use meter::{Ending, Meter};

/// Metrics of the service, model or not.
pub(crate) struct HttpMetrics {
    registry: Registry,
    /// Inference requests whose reply has not been sent to its last byte.
    pub in_flight: IntGauge,
    /// Connections that are open, on all listeners.
    pub connections: IntGauge,
    /// By matched route and status.
    requests: IntCounterVec,
    /// By the code of what was refused or failed.
    errors: IntCounterVec,
    /// By why it was not taken up.
    refused: IntCounterVec,
    /// Whether a model is loaded and taking requests.
    pub ready: IntGauge,
    /// Connections that were not served, by reason.
    pub refused_connections: IntCounterVec,
}

/// A metric that is wrong in itself is a bug of ours, found by any test that makes a service.
const VALID: &str = "names and labels are constants and distinct";

impl HttpMetrics {
    /// Everything at zero.
    pub fn new() -> Self {
        let registry = Registry::new();
        let gauge = |name, help| {
            let gauge = IntGauge::new(name, help).expect(VALID);
            registry.register(Box::new(gauge.clone())).expect(VALID);
            gauge
        };
        let counters = |name, help, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels).expect(VALID);
            registry.register(Box::new(counters.clone())).expect(VALID);
            counters
        };
        let help = "HTTP requests answered, by matched route and status.";
        let requests = counters("baton_http_requests_total", help, &["route", "status"]);
        let help = "HTTP requests refused or failed, by the code that the client was told.";
        let errors = counters("baton_http_errors_total", help, &["code"]);
        let help = "Requests for inference that were not taken up, by reason.";
        let refused = counters("baton_requests_refused_total", help, &["reason"]);
        Refusal::ALL.iter().for_each(|refusal| refused.with_label_values(&[refusal.reason()]).reset());
        let connections = gauge("baton_http_connections", "Connections that are open.");
        let help =
            "Connections closed beyond the limit, or idle to make room for others, and times the system gave none.";
        let refused_connections = counters("baton_http_connections_refused_total", help, &["reason"]);
        for reason in ["limit", "idle", "system"] {
            refused_connections.with_label_values(&[reason]).reset();
        }
        let in_flight = gauge("baton_http_requests_in_flight", "Inference requests that are being answered.");
        let ready = gauge("baton_ready", "1 while a model is loaded and taking requests.");
        #[cfg(target_os = "linux")]
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self())).expect(VALID);
        Self { registry, in_flight, connections, requests, errors, refused, ready, refused_connections }
    }

    /// Counts a request that has ended.
    pub fn answered(&self, summary: &RequestSummary) {
        self.requests.with_label_values(&[summary.route.as_str(), summary.status.to_string().as_str()]).inc();
        if let Some(code) = summary.known.error {
            self.errors.with_label_values(&[code]).inc();
        }
        if let Some(reason) = summary.known.refused {
            self.refused.with_label_values(&[reason]).inc();
        }
    }

    /// The exposition, with the metrics of all generations that requests can get, or of the encoder, and with what keys
    /// have used and what is counted outside of the service.
    pub fn expose(
        &self,
        generations: &Generations,
        encoder: Option<&Encoder>,
        usage: &Usage,
        outside: &[OutsideCounter],
    ) -> Vec<u8> {
        let mut families = self.registry.gather();
        families.extend(usage_families(usage));
        families.extend(outside.iter().map(|OutsideCounter { name, help, value }| {
            Labelled(&[]).counter(name, help, value.load(Ordering::Relaxed))
        }));
        families.extend(encoder.into_iter().flat_map(encoder::families));
        let All { generations, shadow, .. } = generations.all();
        for (role, generation) in generations.iter().filter(|(role, _)| *role != Role::Retired) {
            merge(&mut families, generation.metrics.gather(generation, *role));
            if let (Role::Candidate, Some(shadow)) = (role, &shadow) {
                families.extend(handoff::shadow_families(&Labelled(&generation.metrics.labels), shadow));
            }
        }
        let mut out = Vec::new();
        TextEncoder::new().encode(&families, &mut out).expect("memory takes all, and every family has metrics");
        out
    }
}

/// What each key has used.
fn usage_families(usage: &Usage) -> [MetricFamily; 4] {
    let keys = usage.by_key();
    let family = |name, help, count: fn(&Used) -> u64| {
        let labels: Vec<_> = keys.iter().map(|(key, used)| ([("key", key.as_str())], count(used))).collect();
        let values: Vec<_> = labels.iter().map(|(labels, count)| (labels.as_slice(), *count)).collect();
        Labelled(&[]).counters(name, help, &values)
    };
    let requests = "Requests that an engine took, by the name of their key.";
    let prompt = "Tokens of their prompts, cached ones included.";
    let cached = "Tokens of their prompts that came from the prefix cache.";
    [
        family("baton_key_requests_total", requests, |used| used.requests),
        family("baton_key_prompt_tokens_total", prompt, |used| used.prompt_tokens),
        family("baton_key_cached_tokens_total", cached, |used| used.cached_tokens),
        family("baton_key_completion_tokens_total", "Tokens that they were given.", |used| used.completion_tokens),
    ]
}

/// A counter that is kept outside of the service and shown with its own.
#[derive(Debug, Clone)]
pub struct OutsideCounter {
    /// As Prometheus has names of counters: `baton_…_total`.
    pub name: &'static str,
    /// What it counts, in a sentence.
    pub help: &'static str,
    /// The count, which never falls.
    pub value: Arc<AtomicU64>,
}

/// Adds families to others, those of the same name together.
fn merge(families: &mut Vec<MetricFamily>, more: Vec<MetricFamily>) {
    for mut family in more {
        match families.iter_mut().find(|known| known.name() == family.name()) {
            Some(known) => known.mut_metric().extend(family.take_metric()),
            None => families.push(family),
        }
    }
}

/// Metrics of one generation.
pub(crate) struct ModelMetrics {
    registry: Registry,
    labels: [(&'static str, String); 3],
    success: IntCounterVec,
    rejections: IntCounterVec,
    corrupted: IntCounter,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    per_output_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    longest: Histogram,
    params_n: Histogram,
    params_max_tokens: Histogram,
}

/// What vLLM has called this before, and what dashboards of that time ask for.
const INTER_TOKEN: &str = "vllm:inter_token_latency_seconds";
const INTER_TOKEN_BEFORE: &str = "vllm:time_per_output_token_seconds";

const TTFT_SECONDS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const INTER_TOKEN_SECONDS: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const LATENCY_SECONDS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

impl ModelMetrics {
    /// Metrics of a model by its canonical name and its generation's label, for contexts of at most `max_model_len`
    /// tokens.
    pub fn new(model_name: &str, generation: &str, max_model_len: usize) -> Self {
        let registry = Registry::new();
        let labels = labels(model_name, generation);
        let opts = |name: &str, help: &str| {
            labels.iter().fold(Opts::new(name, help), |opts, (name, value)| opts.const_label(*name, value))
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let opts = HistogramOpts { common_opts: opts(name, help), buckets: buckets.to_vec() };
            let histogram = Histogram::with_opts(opts).expect(VALID);
            registry.register(Box::new(histogram.clone())).expect(VALID);
            histogram
        };
        let counters = |name: &str, help: &str, label: &str, values: &[&str]| {
            let counters = IntCounterVec::new(opts(name, help), &[label]).expect(VALID);
            registry.register(Box::new(counters.clone())).expect(VALID);
            values.iter().for_each(|value| _ = counters.with_label_values(&[*value]));
            counters
        };
        let latency = |name, help| histogram(name, help, &LATENCY_SECONDS);
        let lengths = one_two_five(max_model_len);

        let reasons = ["stop", "length", "abort", "error", "repetition"];
        let success = counters("vllm:request_success_total", "Choices that ended.", "finished_reason", &reasons);
        let reasons = ["queue_full", "draining", "too_long"];
        let rejections =
            counters("vllm:admission_rejections_total", "Requests the engine refused.", "reason", &reasons);
        let help = "Choices that failed on values that are not finite.";
        let corrupted = IntCounter::with_opts(opts("vllm:corrupted_requests_total", help)).expect(VALID);
        registry.register(Box::new(corrupted.clone())).expect(VALID);
        Self {
            success,
            rejections,
            corrupted,
            time_to_first_token: histogram(
                "vllm:time_to_first_token_seconds",
                "From the arrival of a request to its first token.",
                &TTFT_SECONDS,
            ),
            inter_token: histogram(
                INTER_TOKEN,
                "Between two tokens of a choice, as taken by the client's connection.",
                &INTER_TOKEN_SECONDS,
            ),
            per_output_token: histogram(
                "vllm:request_time_per_output_token_seconds",
                "Mean time per token after the first, per choice.",
                &INTER_TOKEN_SECONDS,
            ),
            e2e: latency("vllm:e2e_request_latency_seconds", "From the arrival of a request to the end of a choice."),
            queue: latency("vllm:request_queue_time_seconds", "From submission to the first step."),
            prefill: latency("vllm:request_prefill_time_seconds", "From the first step to the first token."),
            decode: latency("vllm:request_decode_time_seconds", "From the first token to the end."),
            inference: latency("vllm:request_inference_time_seconds", "From the first step to the end."),
            prompt_tokens: histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", &lengths),
            generation_tokens: histogram("vllm:request_generation_tokens", "Tokens of a choice.", &lengths),
            longest: histogram(
                "vllm:request_max_num_generation_tokens",
                "Tokens of a request's longest choice.",
                &lengths,
            ),
            params_n: histogram("vllm:request_params_n", "Choices asked for per prompt.", &[1.0, 2.0, 5.0, 10.0, 20.0]),
            params_max_tokens: histogram(
                "vllm:request_params_max_tokens",
                "Tokens asked for at most, by requests that say so.",
                &lengths,
            ),
            registry,
            labels,
        }
    }

    fn gather(&self, generation: &Generation, role: Role) -> Vec<MetricFamily> {
        let (mut families, labels, stats) = (self.registry.gather(), Labelled(&self.labels), generation.engine.stats());
        let mut before = families.iter().find(|family| family.name() == INTER_TOKEN).expect("it is registered").clone();
        before.set_name(INTER_TOKEN_BEFORE.to_owned());
        families.push(before);
        families.extend(engine::families(
            &labels,
            &stats,
            generation.engine.spec(),
            generation.adapters.gauges(&stats),
        ));
        families.extend(handoff::families(&labels, role, &generation.handoff.get()));
        families
    }

    /// The engine has refused a request.
    pub fn rejected(&self, error: &SubmitError) {
        let reason = match error {
            SubmitError::QueueFull { .. } | SubmitError::QueuedTokens { .. } => "queue_full",
            SubmitError::Draining => "draining",
            SubmitError::TooLong { .. } | SubmitError::DoesNotFit { .. } => "too_long",
            _ => return,
        };
        self.rejections.with_label_values(&[reason]).inc();
    }
}

/// What tells the series of one model from those of another.
fn labels(model_name: &str, generation: &str) -> [(&'static str, String); 3] {
    let labels = [("model_name", model_name), ("engine", "0"), ("generation", generation)];
    labels.map(|(name, value)| (name, value.to_owned()))
}

/// 1, 2, 5, 10, 20, 50, … up to `max`.
fn one_two_five(max: usize) -> Vec<f64> {
    let decades = (0..).map(|exponent| 10_f64.powi(exponent));
    decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|m| m * decade)).take_while(|edge| *edge <= max as f64).collect()
}
