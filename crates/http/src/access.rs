//! Request ids, and what a request leaves behind when it has ended.
//!
//! The outermost layer: whatever is inside it answers, the reply carries an `x-request-id`, and the generation that
//! answers if there is one. When its last byte is handed over, or the client has left, and nothing of it runs in the
//! background any more, the service is given its [`RequestSummary`].

use std::mem;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use baton_engine::Timings;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use parking_lot::Mutex;

use crate::admission::GuardedBody;
use crate::auth::OnBehalfOf;
use crate::error::{ApiError, Refusal};
use crate::keys::{Granted, Owner};
use crate::limits::KeyLimits;
use crate::service::Service;
use crate::summary::{Asked, Known, RequestSummary};
use crate::trace_context::TraceContext;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The digest of the generation that a request was given.
const GENERATION: HeaderName = HeaderName::from_static("x-baton-generation");
const MAX_REQUEST_ID_CHARS: usize = 128;

/// Status in the log for a client that left before the reply began, as nginx writes it.
const CLIENT_LEFT: u16 = 499;

/// A request: its id, and what the parts of the service find out about it. It has ended when the last who holds this lets go:
/// its reply, or what it left to run in the background.
pub(crate) struct AccessRecord {
    service: Service,
    request_id: HeaderValue,
    trace: Option<TraceContext>,
    method: &'static str,
    route: String,
    of_batch: bool,
    sender: OnceLock<(Owner, KeyLimits)>,
    arrived: SystemTime,
    arrival: Instant,
    status: AtomicU16,
    known: Mutex<Known>,
}

impl AccessRecord {
    fn new(service: Service, request: &Request) -> Self {
        // Without a trace around it, and nobody to send one to, there is none.
        let begun_here = || service.config().observer.is_some().then(TraceContext::root);
        let (headers, extensions) = (request.headers(), request.extensions());
        Self {
            request_id: request_id(headers),
            trace: TraceContext::incoming(headers).or_else(begun_here),
            method: method_name(request.method()),
            route: extensions.get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned(),
            of_batch: extensions.get::<OnBehalfOf>().is_some(),
            sender: OnceLock::new(),
            arrived: SystemTime::now(),
            arrival: Instant::now(),
            status: AtomicU16::new(CLIENT_LEFT),
            known: Mutex::default(),
            service,
        }
    }

    /// The id under which the request is answered.
    pub fn request_id(&self) -> &[u8] {
        self.request_id.as_bytes()
    }

    /// Whether it is a line of a batch, for which nobody waits.
    pub fn of_batch(&self) -> bool {
        self.of_batch
    }

    /// The request was sent by whom this was granted.
    pub fn sent_by(&self, granted: &Granted) {
        // Keys are looked at once.
        let _ = self.sender.set((granted.owner(), granted.limits()));
        self.known.lock().key = granted.name().cloned();
    }

    /// Whose the request is.
    pub fn owner(&self) -> Owner {
        self.sender.get().map_or(Owner::ANYONE, |(owner, _)| *owner)
    }

    /// What its key's requests may take.
    pub fn limits(&self) -> KeyLimits {
        self.sender.get().map_or(KeyLimits::default(), |(_, limits)| *limits)
    }

    /// The request is given the generation of this digest, and is answered under this name.
    pub fn generation(&self, digest: &str, model: &str) {
        let mut known = self.known.lock();
        (known.generation, known.model) = (Some(digest.to_owned()), Some(model.to_owned()));
    }

    /// Time since the request came.
    pub fn elapsed(&self) -> Duration {
        self.arrival.elapsed()
    }

    /// An engine was given the request at that time, and has taken it; if it generates, with these parameters. The time is that
    /// before it was given: by the time this is called the engine may be far ahead.
    pub fn submitted(&self, given: Duration, asked: Option<Asked>) {
        let mut known = self.known.lock();
        (known.submitted, known.asked) = (Some(given), asked);
    }

    /// Tokens of all prompts.
    pub fn prompt_tokens(&self, tokens: usize) {
        self.known.lock().prompt_tokens = tokens as u64;
    }

    /// Adds tokens of a prompt that came from the prefix cache.
    pub fn cached_tokens(&self, tokens: usize) {
        self.known.lock().cached_tokens += tokens as u64;
    }

    /// A choice has ended, with so many tokens.
    pub fn ended(&self, reason: &'static str, tokens: usize) {
        let mut known = self.known.lock();
        known.completion_tokens += tokens as u64;
        known.endings.push(reason);
    }

    /// A choice has its first token.
    pub fn first_token(&self, after: Duration) {
        let first = &mut self.known.lock().first_token;
        *first = (*first).max(Some(after));
    }

    /// Where the time of a choice went.
    pub fn timings(&self, timings: &Timings) {
        self.known.lock().timings(timings);
    }

    /// The request was not taken up, perhaps behind a head that says 200.
    pub fn refused(&self, error: &ApiError) {
        self.known.lock().refused = error.refusal().map(Refusal::reason);
    }

    /// The request has failed, perhaps behind a head that says 200.
    pub fn error(&self, code: &'static str) {
        self.known.lock().error = Some(code);
    }
}

impl Drop for AccessRecord {
    fn drop(&mut self) {
        self.service.ended(&RequestSummary {
            request_id: self.request_id.to_str().unwrap_or_default().to_owned(),
            trace: self.trace,
            method: self.method,
            route: mem::take(&mut self.route),
            status: *self.status.get_mut(),
            arrived: self.arrived,
            total: self.arrival.elapsed(),
            known: mem::take(self.known.get_mut()),
        });
    }
}

/// A method may be any word; only the usual ones are told.
fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

/// The layer.
pub(crate) async fn layer(State(service): State<Service>, mut request: Request, next: Next) -> Response {
    let record = Arc::new(AccessRecord::new(service, &request));
    request.extensions_mut().insert(record.clone());
    let mut response = next.run(request).await;
    record.status.store(response.status().as_u16(), Ordering::Relaxed);
    if let Some(error) = response.extensions().get::<ApiError>() {
        record.error(error.code());
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, record.request_id.clone());
    if let Some(digest) = &record.known.lock().generation {
        headers.insert(GENERATION, HeaderValue::try_from(digest).expect("hex is visible ASCII"));
    }
    response.map(|body| Body::new(GuardedBody::new(body, record)))
}

/// The client's id if it is one, else one of our own. It is a label for people, and what decides between two generations; never a key.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let mut given = headers.get_all(REQUEST_ID).iter();
    let fits = |id: &&HeaderValue| {
        (1..=MAX_REQUEST_ID_CHARS).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    match (given.next().filter(fits), given.next()) {
        (Some(id), None) => id.clone(),
        _ => HeaderValue::try_from(format!("req_{:032x}", rand::random::<u128>())).expect("hex is visible ASCII"),
    }
}
