//! Requests as spans: what a collector is told of each, by the conventions of OpenTelemetry for generative AI, and by vLLM's
//! names where those have none. Nothing of what was said is among it.

use std::{
    hash::{BuildHasher, RandomState},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use baton_http::{RequestObserver, RequestSummary, TraceContext};
use baton_otlp::{Attribute, Endpoint, Exporter, Kind, Span, Value};

const SCOPE: (&str, &str) = ("baton", env!("CARGO_PKG_VERSION"));

/// Begins to send the spans of requests.
pub fn start(endpoint: Endpoint) -> Result<Exporter> {
    let instance = format!("{:016x}", RandomState::new().hash_one(std::process::id()));
    let resource = vec![
        ("service.name", SCOPE.0.into()),
        ("service.version", SCOPE.1.into()),
        ("service.instance.id", Value::Text(instance)),
    ];
    tracing::info!(%endpoint, "requests are traced");
    Exporter::start(endpoint, resource, SCOPE).context("--otlp-traces-endpoint")
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
fn spans(summary: &RequestSummary, trace: TraceContext, operation: &'static str) -> Vec<Span> {
    let known = &summary.known;
    let at = |after: Duration| summary.arrived + after;
    let whole = Span {
        trace_id: trace.trace_id,
        span_id: trace.span_id,
        parent_id: trace.parent_id,
        name: known.model.as_ref().map_or_else(|| operation.to_owned(), |model| format!("{operation} {model}")),
        kind: Kind::Server,
        start: summary.arrived,
        end: at(summary.total),
        attributes: attributes(summary, operation),
        // A refusal is the client's, but not one that comes behind a head that says all is well.
        failed: summary.status >= 500 || (summary.status < 400 && known.error.is_some()),
    };
    let mut spans = vec![whole];
    if let (Some(submitted), Some(timings)) = (known.submitted, known.timings) {
        let mut start = at(submitted);
        for (number, (name, time)) in
            (1..).zip([("queue", timings.queue), ("prefill", timings.prefill), ("decode", timings.decode)])
        {
            spans.push(part(trace, number, name, start, time));
            start += time;
        }
    }
    spans
}

/// A part of a request. Its id counts on from the request's.
fn part(trace: TraceContext, number: u64, name: &str, start: SystemTime, time: Duration) -> Span {
    Span {
        trace_id: trace.trace_id,
        span_id: trace.span_id.wrapping_add(number).max(1),
        parent_id: Some(trace.span_id),
        name: name.to_owned(),
        kind: Kind::Internal,
        start,
        end: start + time,
        attributes: Vec::new(),
        failed: false,
    }
}

fn attributes(summary: &RequestSummary, operation: &'static str) -> Vec<Attribute> {
    let known = &summary.known;
    let mut attributes: Vec<Attribute> = vec![
        ("gen_ai.operation.name", operation.into()),
        ("gen_ai.provider.name", SCOPE.0.into()),
        ("gen_ai.request.id", summary.request_id.as_str().into()),
        ("http.request.method", summary.method.into()),
        ("http.route", summary.route.as_str().into()),
        ("http.response.status_code", u64::from(summary.status).into()),
        ("gen_ai.latency.e2e", summary.total.as_secs_f64().into()),
    ];
    if let Some(model) = &known.model {
        attributes.push(("gen_ai.request.model", model.as_str().into()));
        attributes.push(("gen_ai.response.model", model.as_str().into()));
        attributes.push(("gen_ai.usage.input_tokens", known.prompt_tokens.into()));
        attributes.push(("gen_ai.usage.cache_read.input_tokens", known.cached_tokens.into()));
        attributes.push(("gen_ai.usage.output_tokens", known.completion_tokens.into()));
    }
    if let Some(generation) = &known.generation {
        attributes.push(("baton.generation", generation.as_str().into()));
    }
    if let Some(asked) = known.asked {
        attributes.push(("gen_ai.request.n", u64::from(asked.n).into()));
        attributes.push(("gen_ai.request.temperature", f64::from(asked.temperature).into()));
        attributes.push(("gen_ai.request.top_p", f64::from(asked.top_p).into()));
        let max_tokens = asked.max_tokens.map(|tokens| ("gen_ai.request.max_tokens", Value::from(u64::from(tokens))));
        attributes.extend(max_tokens);
    }
    if !known.endings.is_empty() {
        let endings = known.endings.iter().map(|ending| (*ending).to_owned()).collect();
        attributes.push(("gen_ai.response.finish_reasons", Value::Texts(endings)));
    }
    if let Some(first_token) = known.first_token {
        attributes.push(("gen_ai.latency.time_to_first_token", first_token.as_secs_f64().into()));
    }
    if let Some(timings) = known.timings {
        attributes.push(("gen_ai.latency.time_in_queue", timings.queue.as_secs_f64().into()));
        attributes.push(("gen_ai.latency.time_in_model_prefill", timings.prefill.as_secs_f64().into()));
        attributes.push(("gen_ai.latency.time_in_model_decode", timings.decode.as_secs_f64().into()));
        let inference = timings.prefill + timings.decode;
        attributes.push(("gen_ai.latency.time_in_model_inference", inference.as_secs_f64().into()));
    }
    attributes.extend(known.error.map(|code| ("error.type", Value::from(code))));
    attributes
}
