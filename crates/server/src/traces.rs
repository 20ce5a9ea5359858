//! Requests as spans: what a collector is told of each, by the conventions of OpenTelemetry for generative AI, and by vLLM's
//! names where those have none. Nothing of what was said is among it.

mod collector;
mod exporter;
#[cfg(test)]
mod tests;

use std::{
    env,
    hash::{BuildHasher, RandomState},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use baton_http::{RequestObserver, RequestSummary, TraceContext};
use opentelemetry::{
    Array, InstrumentationScope, KeyValue, StringValue, Value,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::{
    Resource,
    resource::{EnvResourceDetector, TelemetryResourceDetector},
    trace::{SpanData, SpanEvents, SpanLinks},
};

use self::collector::Means;
pub use self::{collector::Endpoint, exporter::Exporter};

const NAME: &str = "baton";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Begins to send the spans of requests; `None` if OpenTelemetry is switched off as a whole.
///
/// # Errors
/// If a variable of OpenTelemetry asks for what cannot be had.
pub fn start(endpoint: &Endpoint) -> Result<Option<Exporter>> {
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    if variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        tracing::info!("requests are not traced: OTEL_SDK_DISABLED");
        return Ok(None);
    }
    if variable("OTEL_TRACES_SAMPLER").is_some_and(|sampler| sampler != "parentbased_always_on") {
        tracing::warn!(
            "OTEL_TRACES_SAMPLER is not read: a trace is recorded unless whoever began it says that it is not"
        );
    }
    let exporter = Exporter::start(endpoint, Means::of(variable)?, &resource(variable("OTEL_SERVICE_NAME")), variable)
        .context("--otlp-traces-endpoint")?;
    tracing::info!(%endpoint, "requests are traced");
    Ok(Some(exporter))
}

/// Who sends the spans: our own words, over which go those of `OTEL_RESOURCE_ATTRIBUTES`, over which goes the name.
fn resource(name: Option<String>) -> Resource {
    let instance = format!("{:016x}", RandomState::new().hash_one(std::process::id()));
    let own = [("service.name", NAME), ("service.version", VERSION), ("service.instance.id", &instance)];
    let resource = Resource::builder_empty()
        .with_attributes(own.map(|(key, value)| KeyValue::new(key, value.to_owned())))
        .with_detectors(&[Box::new(TelemetryResourceDetector), Box::new(EnvResourceDetector::new())]);
    match name {
        Some(name) => resource.with_service_name(name),
        None => resource,
    }
    .build()
}

/// Gives the spans of each request that has ended to an exporter.
pub fn observer(exporter: &Exporter) -> RequestObserver {
    let spans = exporter.spans();
    RequestObserver::new(move |summary| {
        if let (Some(trace), Some(operation)) = (summary.trace, operation(&summary.route))
            && trace.sampled
        {
            spans.send(self::spans(summary, trace, operation));
        }
    })
}

/// What is done on a route, by the names of the conventions; `None` where no model has a part in it.
fn operation(route: &str) -> Option<&'static str> {
    match route {
        "/v1/chat/completions" | "/v1/messages" | "/v1/responses" => Some("chat"),
        "/v1/completions" => Some("text_completion"),
        "/v1/embeddings" => Some("embeddings"),
        "/rerank" | "/v1/rerank" | "/v2/rerank" | "/score" | "/v1/score" => Some("rerank"),
        _ => None,
    }
}

/// The request, and in it the parts that the engine tells apart.
fn spans(summary: &RequestSummary, trace: TraceContext, operation: &'static str) -> Vec<SpanData> {
    let known = &summary.known;
    let at = |after: Duration| summary.arrived + after;
    let whole = SpanData {
        parent_span_id: trace.parent_id.map_or(SpanId::INVALID, SpanId::from),
        parent_span_is_remote: trace.parent_id.is_some(),
        span_kind: SpanKind::Server,
        attributes: attributes(summary, operation),
        // A refusal is the client's, but not one that comes behind a head that says all is well.
        status: match summary.status >= 500 || (summary.status < 400 && known.error.is_some()) {
            true => Status::error(""),
            false => Status::Unset,
        },
        ..span(
            trace,
            trace.span_id,
            known.model.as_ref().map_or_else(|| operation.to_owned(), |model| format!("{operation} {model}")),
            (summary.arrived, at(summary.total)),
        )
    };
    let mut spans = vec![whole];
    if let (Some(submitted), Some(timings)) = (known.submitted, known.timings) {
        let mut start = at(submitted);
        for (number, (name, time)) in
            (1..).zip([("queue", timings.queue), ("prefill", timings.prefill), ("decode", timings.decode)])
        {
            // Ids of parts count on from the request's.
            let id = trace.span_id.wrapping_add(number).max(1);
            let part = span(trace, id, name.to_owned(), (start, start + time));
            spans.push(SpanData { parent_span_id: trace.span_id.into(), ..part });
            start += time;
        }
    }
    spans
}

/// A span inside of the service, without attributes.
fn span(trace: TraceContext, id: u64, name: String, (start_time, end_time): (SystemTime, SystemTime)) -> SpanData {
    let trace_id = TraceId::from(trace.trace_id);
    SpanData {
        span_context: SpanContext::new(trace_id, id.into(), TraceFlags::SAMPLED, false, TraceState::NONE),
        parent_span_id: SpanId::INVALID,
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.into(),
        start_time,
        end_time,
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::builder(NAME).with_version(VERSION).build(),
    }
}

fn attributes(summary: &RequestSummary, operation: &'static str) -> Vec<KeyValue> {
    let known = &summary.known;
    let mut attributes = vec![
        KeyValue::new("gen_ai.operation.name", operation),
        KeyValue::new("gen_ai.provider.name", NAME),
        KeyValue::new("gen_ai.request.id", summary.request_id.clone()),
        KeyValue::new("http.request.method", summary.method),
        KeyValue::new("http.route", summary.route.clone()),
        KeyValue::new("http.response.status_code", i64::from(summary.status)),
        KeyValue::new("gen_ai.latency.e2e", summary.total.as_secs_f64()),
    ];
    let mut add = |name: &'static str, value: Value| attributes.push(KeyValue::new(name, value));
    let number = |number: u64| Value::from(i64::try_from(number).unwrap_or(i64::MAX));
    let seconds = |time: Duration| Value::from(time.as_secs_f64());
    if let Some(model) = &known.model {
        add("gen_ai.request.model", model.clone().into());
        add("gen_ai.response.model", model.clone().into());
        add("gen_ai.usage.input_tokens", number(known.prompt_tokens));
        add("gen_ai.usage.cache_read.input_tokens", number(known.cached_tokens));
        add("gen_ai.usage.output_tokens", number(known.completion_tokens));
    }
    if let Some(generation) = &known.generation {
        add("baton.generation", generation.clone().into());
    }
    if let Some(asked) = known.asked {
        add("gen_ai.request.n", number(asked.n.into()));
        add("gen_ai.request.temperature", f64::from(asked.temperature).into());
        add("gen_ai.request.top_p", f64::from(asked.top_p).into());
        if let Some(tokens) = asked.max_tokens {
            add("gen_ai.request.max_tokens", number(tokens.into()));
        }
    }
    if !known.endings.is_empty() {
        let endings = known.endings.iter().map(|ending| StringValue::from(*ending)).collect();
        add("gen_ai.response.finish_reasons", Value::Array(Array::String(endings)));
    }
    if let Some(first_token) = known.first_token {
        add("gen_ai.latency.time_to_first_token", seconds(first_token));
    }
    if let Some(timings) = known.timings {
        add("gen_ai.latency.time_in_queue", seconds(timings.queue));
        add("gen_ai.latency.time_in_model_prefill", seconds(timings.prefill));
        add("gen_ai.latency.time_in_model_decode", seconds(timings.decode));
        add("gen_ai.latency.time_in_model_inference", seconds(timings.prefill + timings.decode));
    }
    if let Some(code) = known.error {
        add("error.type", code.into());
    }
    attributes
}
