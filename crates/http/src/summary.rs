//! What is known of a request when it has ended: its log line, its trace and its place among the slowest are made of this.
//!
//! Invariant: it holds no text of prompt or output, and no word of the request but its id and the name of a model that is
//! served; of a key its name.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_engine::Timings;
use serde_json::{Value, json};

use crate::trace_context::TraceContext;

/// See the head of the file. Durations are since the arrival, unless they say otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestSummary {
    /// At most 128 visible ASCII characters.
    pub request_id: String,
    /// Where it stands in a trace, if it is part of one.
    pub trace: Option<TraceContext>,
    /// The method, if it is a usual one, else `other`.
    pub method: &'static str,
    /// The route as it was matched.
    pub route: String,
    /// Of the reply's head; 499 if the client left before there was one.
    pub status: u16,
    /// When it arrived, by the wall clock.
    pub arrived: SystemTime,
    /// Until the last byte of the reply was handed over, or the client left, and nothing ran in the background any more.
    pub total: Duration,
    /// What the service found out on the way.
    pub known: Known,
}

/// What the parts of the service add on the way.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Known {
    /// The name of its key, if that is one of ours.
    pub key: Option<Arc<str>>,
    /// The digest of the generation that it was given.
    pub generation: Option<String>,
    /// The name it is answered under.
    pub model: Option<String>,
    /// What it asked for, once an engine has taken it to generate.
    pub asked: Option<Asked>,
    /// When the engine that took it was given it.
    pub submitted: Option<Duration>,
    /// When the last choice had its first token.
    pub first_token: Option<Duration>,
    /// Where the time of the choice that took longest went.
    pub timings: Option<Timings>,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// How many of them came from the prefix cache.
    pub cached_tokens: u64,
    /// Tokens of all choices.
    pub completion_tokens: u64,
    /// How each choice ended, as the label `finished_reason` says it.
    pub endings: Vec<&'static str>,
    /// The code of its failure, perhaps behind a head that says 200.
    pub error: Option<&'static str>,
    /// Why it was not taken up, if so, as `baton_requests_refused_total` says it.
    pub refused: Option<&'static str>,
}

/// Parameters of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Asked {
    /// Choices per prompt.
    pub n: u32,
    /// If the request says so.
    pub max_tokens: Option<u32>,
    /// As it was sampled with.
    pub temperature: f32,
    /// As it was sampled with.
    pub top_p: f32,
}

impl Known {
    /// Takes where the time of a choice went.
    pub(crate) fn timings(&mut self, timings: &Timings) {
        let whole = |timings: &Timings| timings.queue + timings.prefill + timings.decode;
        if self.timings.as_ref().is_none_or(|longest| whole(longest) <= whole(timings)) {
            self.timings = Some(*timings);
        }
    }
}

impl RequestSummary {
    /// Writes the line of the access log.
    pub(crate) fn log(&self) {
        let known = &self.known;
        let timings = known.timings.as_ref();
        // A request that never got to a model has no tokens rather than none.
        let tokens = |count: u64| known.generation.is_some().then_some(count);
        tracing::info!(
            target: "baton_http::access",
            request_id = self.request_id,
            trace_id = self.trace.map(|trace| format!("{:032x}", trace.trace_id)),
            method = self.method,
            route = %self.route,
            status = self.status,
            error = known.error,
            key = known.key.as_deref(),
            model = known.model.as_deref(),
            generation = known.generation.as_deref().map(label),
            prompt_tokens = tokens(known.prompt_tokens),
            cached_tokens = tokens(known.cached_tokens),
            completion_tokens = tokens(known.completion_tokens),
            first_token_ms = known.first_token.map(millis),
            queue_ms = timings.map(|timings| millis(timings.queue)),
            prefill_ms = timings.map(|timings| millis(timings.prefill)),
            decode_ms = timings.map(|timings| millis(timings.decode)),
            total_ms = millis(self.total),
            "request"
        );
    }

    /// The same for an admin.
    pub(crate) fn json(&self) -> Value {
        let known = &self.known;
        let millis = |time: Option<Duration>| time.map(millis);
        json!({
            "request_id": self.request_id,
            "trace_id": self.trace.map(|trace| format!("{:032x}", trace.trace_id)),
            "route": self.route,
            "status": self.status,
            "error": known.error,
            "key": known.key.as_deref(),
            "model": known.model,
            "generation": known.generation,
            "arrived": self.arrived.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            "prompt_tokens": known.prompt_tokens,
            "cached_tokens": known.cached_tokens,
            "completion_tokens": known.completion_tokens,
            "finish_reasons": known.endings,
            "submitted_ms": millis(known.submitted),
            "first_token_ms": millis(known.first_token),
            "queue_ms": millis(known.timings.map(|timings| timings.queue)),
            "prefill_ms": millis(known.timings.map(|timings| timings.prefill)),
            "decode_ms": millis(known.timings.map(|timings| timings.decode)),
            "total_ms": millis(Some(self.total)),
        })
    }
}

/// A digest's first digits.
fn label(digest: &str) -> &str {
    &digest[..digest.len().min(12)]
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Is told of every request that has ended, on the thread that served it: it must not wait.
#[derive(Clone)]
pub struct RequestObserver(Arc<dyn Fn(&RequestSummary) + Send + Sync>);

impl RequestObserver {
    /// Calls this.
    pub fn new(observe: impl Fn(&RequestSummary) + Send + Sync + 'static) -> Self {
        Self(Arc::new(observe))
    }

    pub(crate) fn observe(&self, summary: &RequestSummary) {
        (self.0)(summary);
    }
}

impl fmt::Debug for RequestObserver {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("RequestObserver(…)")
    }
}
