//! Request ids, and one log line per request.
//!
//! The outermost layer: whatever is inside it answers, the reply carries an `x-request-id`, and the generation that
//! answers if there is one, and when its last byte is handed over, or the client has left, one line says what happened. The line holds no text of prompt or output, no
//! header but the id, of a key its name, and the route as it is matched, not as it was sent.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use parking_lot::Mutex;

use crate::admission::GuardedBody;
use crate::auth::OnBehalfOf;
use crate::error::ApiError;
use crate::keys::{Granted, Owner};
use crate::service::Service;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The digest of the generation that a request was given.
const GENERATION: HeaderName = HeaderName::from_static("x-baton-generation");
const MAX_REQUEST_ID_CHARS: usize = 128;

/// What is added to the priority of a request of a batch.
const BATCH_PRIORITY: i32 = 1 << 20;

/// Status in the log for a client that left before the reply began, as nginx writes it.
const CLIENT_LEFT: u16 = 499;

/// A request's id, and what the parts of the service add to its log line.
pub(crate) struct AccessRecord {
    request_id: HeaderValue,
    of_batch: bool,
    sender: OnceLock<(Owner, Option<Arc<str>>)>,
    generation: OnceLock<String>,
    prompt_tokens: AtomicU64,
    completion_tokens: AtomicU64,
    late: Mutex<Late>,
}

/// Times of the slowest choice, and how it failed after the head was sent.
#[derive(Default, Clone, Copy)]
struct Late {
    first_token: Duration,
    queue: Duration,
    prefill: Duration,
    decode: Duration,
    error: Option<&'static str>,
}

impl AccessRecord {
    fn new(request_id: HeaderValue, of_batch: bool) -> Self {
        let (sender, generation, late) = (OnceLock::new(), OnceLock::new(), Mutex::default());
        Self { request_id, of_batch, sender, generation, prompt_tokens: 0.into(), completion_tokens: 0.into(), late }
    }

    /// The id under which the request is answered.
    pub fn request_id(&self) -> &[u8] {
        self.request_id.as_bytes()
    }

    /// The priority in the engine of a request that asks for this one. Of a batch, for which nobody waits, it is among its
    /// own, and behind all others.
    pub fn priority(&self, asked: i32) -> i32 {
        match self.of_batch {
            true => BATCH_PRIORITY.saturating_add(asked.max(-BATCH_PRIORITY / 2)),
            false => asked,
        }
    }

    /// The request was sent by whom this was granted.
    pub fn sent_by(&self, granted: &Granted) {
        // Keys are looked at once.
        let _ = self.sender.set((granted.owner(), granted.name().cloned()));
    }

    /// Whose the request is.
    pub fn owner(&self) -> Owner {
        self.sender.get().map_or(Owner::ANYONE, |(owner, _)| *owner)
    }

    /// The request is given the generation of this digest.
    pub fn generation(&self, digest: &str) {
        // A request picks once.
        let _ = self.generation.set(digest.to_owned());
    }

    /// Tokens of all prompts.
    pub fn prompt_tokens(&self, tokens: usize) {
        self.prompt_tokens.store(tokens as u64, Ordering::Relaxed);
    }

    /// Adds the tokens of a choice.
    pub fn completion_tokens(&self, tokens: usize) {
        self.completion_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// A choice has its first token.
    pub fn first_token(&self, after: Duration) {
        let mut late = self.late.lock();
        late.first_token = late.first_token.max(after);
    }

    /// Where the time of a choice went.
    pub fn timings(&self, queue: Duration, prefill: Duration, decode: Duration) {
        let mut late = self.late.lock();
        late.queue = late.queue.max(queue);
        late.prefill = late.prefill.max(prefill);
        late.decode = late.decode.max(decode);
    }

    /// The request has failed, perhaps behind a head that says 200.
    pub fn error(&self, code: &'static str) {
        self.late.lock().error = Some(code);
    }
}

/// Writes the line when it is dropped.
struct AccessLog {
    service: Service,
    record: Arc<AccessRecord>,
    method: Method,
    route: String,
    arrival: Instant,
    status: u16,
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        let late = *self.record.late.lock();
        self.service.metrics().requests.with_label_values(&[&self.route, &self.status.to_string()]).inc();
        tracing::info!(
            target: "baton_http::access",
            request_id = self.record.request_id.to_str().unwrap_or_default(),
            method = method_name(&self.method),
            route = %self.route,
            status = self.status,
            error = late.error,
            key = self.record.sender.get().and_then(|(_, name)| name.as_deref()),
            generation = self.record.generation.get().map(|digest| &digest[..12]),
            prompt_tokens = self.record.prompt_tokens.load(Ordering::Relaxed),
            completion_tokens = self.record.completion_tokens.load(Ordering::Relaxed),
            first_token_ms = millis(late.first_token),
            queue_ms = millis(late.queue),
            prefill_ms = millis(late.prefill),
            decode_ms = millis(late.decode),
            total_ms = millis(self.arrival.elapsed()),
            "request"
        );
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A method may be any word; only the usual ones are logged.
fn method_name(method: &Method) -> &str {
    match *method {
        Method::GET | Method::HEAD | Method::POST | Method::OPTIONS | Method::PUT | Method::DELETE | Method::PATCH => {
            method.as_str()
        }
        _ => "other",
    }
}

/// The layer.
pub(crate) async fn layer(State(service): State<Service>, mut request: Request, next: Next) -> Response {
    let of_batch = request.extensions().get::<OnBehalfOf>().is_some();
    let record = Arc::new(AccessRecord::new(request_id(request.headers()), of_batch));
    request.extensions_mut().insert(record.clone());
    let mut log = AccessLog {
        service,
        record,
        method: request.method().clone(),
        route: request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned(),
        arrival: Instant::now(),
        status: CLIENT_LEFT,
    };
    let mut response = next.run(request).await;
    log.status = response.status().as_u16();
    if let Some(error) = response.extensions().get::<ApiError>() {
        log.record.error(error.code());
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, log.record.request_id.clone());
    if let Some(digest) = log.record.generation.get() {
        headers.insert(GENERATION, HeaderValue::try_from(digest).expect("hex is visible ASCII"));
    }
    response.map(|body| Body::new(GuardedBody::new(body, log)))
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
