//! What `/metrics` shows.
//!
//! The HTTP side counts its own requests ([`HttpMetrics`]); each generation has the histograms and counters of its
//! requests ([`ModelMetrics`], fed by a [`Meter`] per request). What the engine counts, and what is known of a hand-off
//! and of shadows, is read at scrape time. Both live generations are in the same families, told apart by a label; one
//! that is retired vanishes, and so do its series. Names with `vllm:` are those of vLLM, so that its dashboards and
//! scaling rules work; ours begin with `baton_`. No label takes its value from a request.

mod encoder;
mod engine;
mod families;
mod handoff;

use std::sync::Arc;
use std::time::Instant;

use baton_engine::{EngineFailure, SubmitError, Timings};
use prometheus::proto::MetricFamily;
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

use crate::access::AccessRecord;
use crate::encoder::Encoder;
use crate::error::ApiError;
use crate::generation::{Generation, InUse};
use crate::generations::{All, Generations, Role};
use crate::metrics::families::Labelled;

/// Metrics of the service, model or not.
pub(crate) struct HttpMetrics {
    registry: Registry,
    /// Inference requests whose reply has not been sent to its last byte.
    pub in_flight: IntGauge,
    /// By matched route and status.
    pub requests: IntCounterVec,
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
        let requests = Opts::new("baton_http_requests_total", "HTTP requests answered, by matched route and status.");
        let requests = IntCounterVec::new(requests, &["route", "status"]).expect(VALID);
        registry.register(Box::new(requests.clone())).expect(VALID);
        let refused = Opts::new(
            "baton_http_connections_refused_total",
            "Connections closed at once beyond the limit, and times the system gave none.",
        );
        let refused_connections = IntCounterVec::new(refused, &["reason"]).expect(VALID);
        registry.register(Box::new(refused_connections.clone())).expect(VALID);
        for reason in ["limit", "system"] {
            refused_connections.with_label_values(&[reason]).reset();
        }
        let in_flight = gauge("baton_http_requests_in_flight", "Inference requests that are being answered.");
        let ready = gauge("baton_ready", "1 while a model is loaded and taking requests.");
        #[cfg(target_os = "linux")]
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self())).expect(VALID);
        Self { registry, in_flight, requests, ready, refused_connections }
    }

    /// The exposition, with the metrics of all generations that requests can get, or of the encoder.
    pub fn expose(&self, generations: &Generations, encoder: Option<&Encoder>) -> Vec<u8> {
        let mut families = self.registry.gather();
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

/// Adds families to others, those of the same name together.
fn merge(families: &mut Vec<MetricFamily>, more: Vec<MetricFamily>) {
    for mut family in more {
        match families.iter_mut().find(|known| known.name() == family.name()) {
            Some(known) => known.mut_metric().extend(family.take_metric()),
            None => families.push(family),
        }
    }
}

/// How a choice ended, as the label `finished_reason` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Stop,
    Length,
    Abort,
    Error,
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
}

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
                "vllm:inter_token_latency_seconds",
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
            registry,
            labels,
        }
    }

    fn gather(&self, generation: &Generation, role: Role) -> Vec<MetricFamily> {
        let (mut families, labels, stats) = (self.registry.gather(), Labelled(&self.labels), generation.engine.stats());
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
            SubmitError::QueueFull { .. } => "queue_full",
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

/// Measures one request, and holds its generation. A choice that has not ended when the meter is dropped was aborted.
pub(crate) struct Meter {
    generation: InUse,
    arrival: Instant,
    record: Arc<AccessRecord>,
    choices: Vec<MeteredChoice>,
}

#[derive(Clone)]
struct MeteredChoice {
    prompt_tokens: usize,
    tokens: usize,
    last_token: Option<Instant>,
    ended: bool,
}

impl Meter {
    /// The engine has accepted all choices, `n` per prompt.
    pub fn new(
        generation: InUse,
        arrival: Instant,
        record: Arc<AccessRecord>,
        prompt_tokens: &[usize],
        n: usize,
    ) -> Self {
        record.prompt_tokens(prompt_tokens.iter().sum());
        generation.stats.lock().requests += 1;
        let choices = |&prompt_tokens: &usize| {
            vec![MeteredChoice { prompt_tokens, tokens: 0, last_token: None, ended: false }; n]
        };
        let choices = prompt_tokens.iter().flat_map(choices).collect();
        Self { generation, arrival, record, choices }
    }

    /// A choice has a token.
    pub fn token(&mut self, index: usize) {
        let (now, choice) = (Instant::now(), &mut self.choices[index]);
        match choice.last_token.replace(now) {
            Some(last) => self.generation.metrics.inter_token.observe((now - last).as_secs_f64()),
            None => {
                let ttft = now - self.arrival;
                self.generation.metrics.time_to_first_token.observe(ttft.as_secs_f64());
                self.generation.stats.lock().time_to_first_token.record(ttft);
                self.record.first_token(ttft);
            }
        }
        choice.tokens += 1;
    }

    /// A choice is complete. `completion_tokens`: what the client is told.
    pub fn finished(&mut self, index: usize, ending: Ending, completion_tokens: usize, timings: &Timings) {
        let metrics = &self.generation.metrics;
        self.choices[index].tokens = completion_tokens;
        self.record.timings(timings.queue, timings.prefill, timings.decode);
        metrics.queue.observe(timings.queue.as_secs_f64());
        metrics.prefill.observe(timings.prefill.as_secs_f64());
        metrics.decode.observe(timings.decode.as_secs_f64());
        metrics.inference.observe((timings.prefill + timings.decode).as_secs_f64());
        if completion_tokens > 1 {
            let intervals = u32::try_from(completion_tokens - 1).unwrap_or(u32::MAX);
            let per_token = timings.decode / intervals;
            metrics.per_output_token.observe(per_token.as_secs_f64());
            self.generation.stats.lock().time_per_output_token.record(per_token);
        }
        self.end(index, ending);
    }

    /// A choice has failed.
    pub fn failed(&mut self, index: usize, failure: &EngineFailure) {
        if *failure == EngineFailure::NonFiniteLogits {
            self.generation.metrics.corrupted.inc();
            self.generation.stats.lock().non_finite += 1;
        }
        self.end(index, Ending::Error);
    }

    /// The request as a whole ends with this error.
    pub fn error(&self, error: &ApiError) {
        self.record.error(error.code());
        self.generation.stats.lock().errors += u64::from(error.is_breakdown());
    }

    fn end(&mut self, index: usize, ending: Ending) {
        let choice = &mut self.choices[index];
        choice.ended = true;
        self.record.completion_tokens(choice.tokens);
        let reason = match ending {
            Ending::Stop => "stop",
            Ending::Length => "length",
            Ending::Abort => "abort",
            Ending::Error => "error",
        };
        let metrics = &self.generation.metrics;
        metrics.success.with_label_values(&[reason]).inc();
        metrics.e2e.observe(self.arrival.elapsed().as_secs_f64());
        metrics.prompt_tokens.observe(choice.prompt_tokens as f64);
        metrics.generation_tokens.observe(choice.tokens as f64);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        for index in 0..self.choices.len() {
            if !self.choices[index].ended {
                self.end(index, Ending::Abort);
            }
        }
    }
}
