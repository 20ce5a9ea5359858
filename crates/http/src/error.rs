//! The one error type of the service. Its form on the wire is in `wire`.
//!
//! Every refusal is an [`ApiError`], made by the constructor of its kind: status, `type` and `code` are decided here
//! and nowhere else. A message says what would have been accepted and never repeats what the client sent, except the
//! name of a field.

use std::fmt::Write;
use std::time::Duration;

use baton_engine::{EngineFailure, RunError};
use http::StatusCode;

use crate::limits::Exceeded;

mod wire;

/// A refusal or failure, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
    param: Option<String>,
    message: String,
    retry: Retry,
    /// If it is a refusal that is counted as such.
    refusal: Option<Refusal>,
    /// The rest of the request is not worth reading: close the connection.
    close: bool,
}

/// Why a request that is right in itself is not taken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    QueueFull,
    QueuedTokens,
    KeyConcurrency,
    KeyRate,
    TooLong,
    Draining,
    Deadline,
}

impl Refusal {
    pub const ALL: [Self; 7] = [
        Self::QueueFull,
        Self::QueuedTokens,
        Self::KeyConcurrency,
        Self::KeyRate,
        Self::TooLong,
        Self::Draining,
        Self::Deadline,
    ];

    /// As metrics say it.
    pub fn reason(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::QueuedTokens => "queued_tokens",
            Self::KeyConcurrency => "key_concurrency",
            Self::KeyRate => "key_rate",
            Self::TooLong => "too_long",
            Self::Draining => "draining",
            Self::Deadline => "deadline",
        }
    }
}

/// Longest that a client is told to wait, in seconds.
const LONGEST_WAIT: u32 = 60;

/// As `Retry-After` has it, at least one.
fn whole_seconds(wait: Duration) -> u32 {
    (wait.as_secs_f64().ceil() as u32).max(1)
}

/// What the client is told about trying again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// As its library does for the status.
    Unsaid,
    /// Not before this many seconds.
    After(u32),
    /// It will fail again.
    Never,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        let (param, retry, refusal) = (None, Retry::Unsaid, None);
        Self { status, kind, code, param, message: message.into(), retry, refusal, close: false }
    }

    fn bad_request(code: &'static str, param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(printable(param)), ..Self::new(StatusCode::BAD_REQUEST, INVALID, code, message) }
    }

    /// The body is not JSON of the kind that is read here. `reason` completes "the request body …".
    pub fn body(reason: impl AsRef<str>) -> Self {
        let message = format!("the request body {}", reason.as_ref());
        Self::new(StatusCode::BAD_REQUEST, INVALID, "invalid_json", message)
    }

    /// A field has the wrong JSON type.
    pub fn wrong_type(param: &str, expected: &str) -> Self {
        Self::bad_request("invalid_type", param, format!("{} must be {expected}", printable(param)))
    }

    /// A required field is absent or null.
    pub fn missing(param: &str) -> Self {
        Self::bad_request("missing_required_parameter", param, format!("{} is required", printable(param)))
    }

    /// A value of the right type that is outside its range. `accepted` completes "… must be".
    pub fn out_of_range(param: &str, accepted: impl AsRef<str>) -> Self {
        Self::bad_request("out_of_range", param, format!("{} must be {}", printable(param), accepted.as_ref()))
    }

    /// A value that cannot be used, alone or with the others; `message` stands alone.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::bad_request("invalid_value", param, message)
    }

    /// A field that nobody knows.
    pub fn unknown_parameter(param: &str) -> Self {
        Self::bad_request("unknown_parameter", param, format!("{} is not a known parameter", printable(param)))
    }

    /// A field that is known and would change the output, but is not supported.
    pub fn unsupported(param: &str) -> Self {
        Self::bad_request("unsupported_parameter", param, format!("{} is not supported", printable(param)))
    }

    /// Prompt and output do not fit into the context.
    pub fn context_length(param: &str, prompt: usize, requested: Option<u32>, context: usize) -> Self {
        // Client libraries know by these words that a prompt is too long.
        let mut message = format!("this model's maximum context length is {context} tokens; the prompt has {prompt}");
        match requested {
            Some(tokens) => write!(message, " and {tokens} more were requested").expect("a String takes all"),
            None => message.push_str(", which leaves no room for an answer"),
        }
        Self::bad_request("context_length_exceeded", param, message).counted_as(Refusal::TooLong)
    }

    /// A text that is only read does not fit into the context.
    pub fn input_too_long(param: &str, tokens: usize, context: usize) -> Self {
        let message = format!(
            "the context holds {context} tokens; the input has {tokens}: shorten it, or ask for truncate_prompt_tokens"
        );
        Self::bad_request("context_length_exceeded", param, message).counted_as(Refusal::TooLong)
    }

    /// Prompt and output do not fit into the cache, even alone.
    pub fn cache_size(param: &str, needed_blocks: usize, total_blocks: usize) -> Self {
        let message = format!(
            "prompt and output need {needed_blocks} blocks of cache, the server has {total_blocks}; ask for fewer tokens"
        );
        Self::bad_request("context_length_exceeded", param, message).counted_as(Refusal::TooLong)
    }

    /// No or wrong key.
    pub fn invalid_api_key() -> Self {
        let message = "a valid API key is needed, in the header: Authorization: Bearer <key>";
        Self::new(StatusCode::UNAUTHORIZED, INVALID, "invalid_api_key", message)
    }

    /// No admin key, where one is needed.
    pub fn admin_key_needed() -> Self {
        let message = "an admin key (--admin-api-key, or of --api-keys-file) is needed, in the header: Authorization: Bearer <key>";
        Self::new(StatusCode::UNAUTHORIZED, INVALID, "invalid_api_key", message)
    }

    /// A key that was good once.
    pub fn expired_api_key() -> Self {
        let message = "this API key has expired; ask the operator for another";
        Self::new(StatusCode::UNAUTHORIZED, INVALID, "expired_api_key", message)
    }

    /// A key of another scope.
    pub fn insufficient_scope() -> Self {
        let message = "this API key is not for this route: those of scope inference use the model, of scope admin change \
                       what is served, of scope metrics read metrics";
        Self::new(StatusCode::FORBIDDEN, INVALID, "insufficient_scope", message)
    }

    /// No key, and the address is called by a name that a page may have made lead here.
    pub fn host_not_allowed() -> Self {
        let message =
            "without a key the server is called as localhost, by its address, or by a name of --allowed-hosts";
        Self::new(StatusCode::FORBIDDEN, INVALID, "host_not_allowed", message)
    }

    /// No key, and a browser says that a page of elsewhere asks.
    pub fn origin_not_allowed() -> Self {
        let message =
            "without a key only pages of this server and of --allowed-origins may ask for this from a browser";
        Self::new(StatusCode::FORBIDDEN, INVALID, "origin_not_allowed", message)
    }

    /// There is no such adapter; `message` says where it was looked for.
    pub fn adapter_not_found(param: &str, message: &str) -> Self {
        let error = Self::new(StatusCode::NOT_FOUND, INVALID, "adapter_not_found", message);
        Self { param: Some(param.into()), ..error }
    }

    /// `model` names none that is served.
    pub fn model_not_found() -> Self {
        let message = "no such model is served here; GET /v1/models lists those that are";
        let error = Self::new(StatusCode::NOT_FOUND, INVALID, "model_not_found", message);
        Self { param: Some("model".into()), ..error }
    }

    /// The model is of another kind than the route is for; `what` says what it can do.
    pub fn not_for_this_model(what: &str) -> Self {
        let error = Self::new(StatusCode::NOT_FOUND, INVALID, "not_for_this_model", what);
        Self { param: Some("model".into()), ..error }
    }

    /// No such route.
    pub fn route_not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, "not_found", "there is no such route")
    }

    /// The route has other methods.
    pub fn method_not_allowed() -> Self {
        let message = "the route does not take this method; the header Allow lists those it takes";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, "method_not_allowed", message)
    }

    /// The body exceeds the limit.
    pub fn request_too_large(limit: usize) -> Self {
        let message = format!("the request body may have at most {limit} bytes");
        let error = Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "request_too_large", message);
        Self { close: true, ..error }
    }

    /// The body did not arrive in time.
    pub fn request_timeout() -> Self {
        let message = "the request body did not arrive in time";
        let error = Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, "request_timeout", message);
        Self { close: true, ..error }
    }

    fn counted_as(self, refusal: Refusal) -> Self {
        Self { refusal: Some(refusal), ..self }
    }

    fn never(self) -> Self {
        Self { retry: Retry::Never, ..self }
    }

    fn unavailable(code: &'static str, after: u32, message: &str) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, code, message);
        Self { retry: Retry::After(after), ..error }
    }

    /// The queue is full, or the request waited in it too long. There may be room after this time.
    pub fn overloaded(refusal: Refusal, wait: Duration) -> Self {
        // An estimate, on which nobody shall wait for long.
        let wait = whole_seconds(wait).min(LONGEST_WAIT);
        Self::unavailable("overloaded", wait, "the server is at its limit; try again later").counted_as(refusal)
    }

    /// The key has reached a limit of its own.
    pub fn rate_limited(exceeded: Exceeded) -> Self {
        let (kind, refusal, limit, wait) = match exceeded {
            Exceeded::Concurrency(limit) => {
                let limit = format!("at most {limit} requests at once");
                ("requests", Refusal::KeyConcurrency, limit, Duration::from_secs(1))
            }
            Exceeded::Requests(limit, wait) => {
                ("requests", Refusal::KeyRate, format!("at most {limit} requests a minute (RPM)"), wait)
            }
            Exceeded::Tokens(limit, wait) => {
                ("tokens", Refusal::KeyRate, format!("at most {limit} tokens a minute (TPM)"), wait)
            }
        };
        let wait = whole_seconds(wait);
        let message = format!("rate limit reached: this key may have {limit}; please try again in {wait}s");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, kind, "rate_limit_exceeded", message);
        Self { retry: Retry::After(wait), ..error.counted_as(refusal) }
    }

    /// The request was not done within its own `deadline_ms`.
    pub fn deadline_exceeded() -> Self {
        let message = "the request was not done within its deadline_ms";
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, "deadline_exceeded", message)
            .counted_as(Refusal::Deadline)
            .never()
    }

    /// No model is loaded yet.
    pub fn model_loading() -> Self {
        Self::unavailable("model_loading", 2, "the model is still being loaded")
    }

    /// The model is still being compared with what its trainer computed, and must pass first.
    pub fn handoff_pending() -> Self {
        Self::unavailable("handoff_pending", 2, "the hand-off of the model is still being verified")
    }

    /// The model came without a bundle to compare it with, and must have one.
    pub fn handoff_absent() -> Self {
        let message = "a hand-off is required (--handoff require), and the model has no handoff.json";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, "handoff_absent", message)
    }

    /// The model does not compute what its trainer computed.
    pub fn handoff_failed(reason: &str) -> Self {
        let message = format!("the hand-off of the model has failed: {reason}");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, "handoff_failed", message)
    }

    /// There is no report on a hand-off.
    pub fn no_handoff(message: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, "handoff_not_found", message)
    }

    /// Nothing of this kind is kept under this id for this key.
    pub fn stored_not_found(kind: &str) -> Self {
        let message = format!("there is no such {kind}, or it is another key's");
        Self::new(StatusCode::NOT_FOUND, INVALID, "not_found", message)
    }

    /// There is no room for what is to be kept.
    pub fn storage_full(message: &str) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "storage_full", message)
    }

    /// So many at once are not taken.
    pub fn too_many(message: &str) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded", message);
        Self { retry: Retry::After(60), ..error }
    }

    /// The server was not started with what the request needs; `message` says with what.
    pub fn not_configured(message: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, "not_configured", message)
    }

    /// A field asks for something to be kept, and there is no place for it.
    pub fn needs_state_dir(param: &str) -> Self {
        let message = format!("{} needs a server that was started with --state-dir", printable(param));
        Self::bad_request("not_configured", param, message)
    }

    /// The response that a conversation is to go on from is not kept, or it is another key's.
    pub fn previous_not_found() -> Self {
        let param = "previous_response_id";
        Self::bad_request("previous_response_not_found", param, "there is no such response, or it is another key's")
    }

    /// What is asked for does not go together with what is under way.
    pub fn conflict(message: &str) -> Self {
        Self::new(StatusCode::CONFLICT, INVALID, "conflict", message)
    }

    /// A rollout has failed; what served before serves on.
    pub fn rollout_failed(message: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "rollout_failed", message)
    }

    /// The server is going down.
    pub fn draining() -> Self {
        let error = Self::unavailable("draining", 5, "the server is shutting down").counted_as(Refusal::Draining);
        Self { close: true, ..error }
    }

    /// The engine failed this request.
    pub fn engine(message: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "engine_error", message)
    }

    /// The engine failed this request and would do so each time.
    pub fn engine_always(message: &str) -> Self {
        Self::engine(message).never()
    }

    /// The device failed this request.
    pub fn device(error: &RunError) -> Self {
        let (code, message) = match error {
            RunError::Failed(_) => ("engine_error", "the device failed"),
            RunError::OutOfMemory(_) => ("device_out_of_memory", "the device had no memory for the request"),
            RunError::Poisoned(_) => ("device_poisoned", "the device failed, and must be set up anew"),
            RunError::Lost(_) => ("device_lost", "the device is lost"),
        };
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, code, message)
    }

    /// The device does not answer.
    pub fn device_hung() -> Self {
        let message = "the device does not answer";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "device_hung", message)
    }

    /// The engine takes no steps any more.
    pub fn engine_down() -> Self {
        Self::unavailable("engine_down", 5, "the engine has stopped")
    }

    /// As [`engine_down`](Self::engine_down), for whoever looks after the server.
    pub fn engine_down_by(failure: &EngineFailure) -> Self {
        let code = match failure {
            EngineFailure::Device(RunError::Lost(_)) => "device_lost",
            EngineFailure::Hung(_) => "device_hung",
            _ => "engine_down",
        };
        Self::unavailable(code, 5, &format!("the engine has stopped: {failure}"))
    }

    /// The device has failed, and the model is not back yet.
    pub fn rebuilding() -> Self {
        Self::unavailable("rebuilding", 2, "the device has failed, and the model is being loaded again")
    }

    /// Our own fault.
    pub fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "internal_error", "the server failed internally")
    }

    /// The same with the field by another name, for a dialect that has one.
    pub fn renamed(mut self, rename: impl FnOnce(&str) -> String) -> Self {
        if let Some(old) = &self.param {
            let new = printable(&rename(old));
            if let Some(rest) = self.message.strip_prefix(old.as_str()) {
                self.message = format!("{new}{rest}");
            }
            self.param = Some(new);
        }
        self
    }
}

/// A field's path if it looks like one, so that an error can name it; else a stand-in, since a client may write
/// anything into a name.
fn printable(param: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '[' | ']');
    if param.len() <= 120 && param.chars().all(plain) { param.to_owned() } else { "(unprintable name)".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_no_name_is_not_repeated() {
        for name in ["a b", "<script>", "é", &"x".repeat(121)] {
            let text = String::from_utf8(ApiError::unknown_parameter(name).to_json()).unwrap();
            assert!(text.contains("(unprintable name)") && !text.contains(name), "{text}");
        }
    }
}
