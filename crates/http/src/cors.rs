//! What pages of other origins may do (CORS). Off unless origins are listed.
//!
//! A preflight is answered before keys are looked at, since a browser sends none with it. Credentials (cookies) are never
//! allowed: keys travel in headers that the page sets itself. So `*` gives a page nothing that it does not hold.
//!
//! tower-http's layer is not used: its lists of headers know no `x-stainless-*`, and it answers every OPTIONS, preflight or not.

use std::str::FromStr;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode};

use crate::service::Service;

const METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD, POST, DELETE, OPTIONS");
/// Headers of replies that pages may read, besides those that they always may.
const EXPOSED: HeaderValue =
    HeaderValue::from_static("x-request-id, retry-after, x-should-retry, x-baton-generation, warning");
/// Seconds for which a browser may remember a preflight.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");
/// What a preflight's answer depends on.
const VARIES: HeaderValue =
    HeaderValue::from_static("origin, access-control-request-method, access-control-request-headers");

/// Headers that pages may send: those of the OpenAI and Anthropic libraries.
const ALLOWED: [&str; 9] = [
    "authorization",
    "content-type",
    "x-api-key",
    "x-request-id",
    "anthropic-version",
    "anthropic-beta",
    "anthropic-dangerous-direct-browser-access",
    "openai-organization",
    "openai-project",
];
/// And those that begin so.
const ALLOWED_PREFIX: &str = "x-stainless-";
/// Names in one preflight that are looked at.
const MAX_NAMES: usize = 64;

/// An origin whose pages may use the service, as browsers write it (`https://example.org`, `http://localhost:3000`), or
/// `*` for all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(HeaderValue);

/// The text is no origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an origin is * or scheme://host or scheme://host:port, in lower case and without a path")]
pub struct OriginError;

impl FromStr for Origin {
    type Err = OriginError;

    fn from_str(text: &str) -> Result<Self, OriginError> {
        let plain = |b: u8| b.is_ascii_graphic() && !b.is_ascii_uppercase() && !b"/,*?#@\\".contains(&b);
        let listed = text.split_once("://").is_some_and(|(scheme, host)| {
            !scheme.is_empty()
                && scheme.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
                && !host.is_empty()
                && host.bytes().all(plain)
        });
        match text == "*" || listed {
            true => HeaderValue::from_str(text).map(Self).map_err(|_| OriginError),
            false => Err(OriginError),
        }
    }
}

/// What to tell a page of this origin: itself, or that all are allowed; `None` if it is not.
pub(crate) fn allowed(origins: &[Origin], headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(ORIGIN)?;
    let fits = |known: &&Origin| known.0 == "*" || known.0 == origin;
    origins.iter().find(fits).map(|known| known.0.clone())
}

/// The layer.
pub(crate) async fn layer(State(service): State<Service>, request: Request, next: Next) -> Response {
    let origins = &service.config().allowed_origins;
    if origins.is_empty() {
        return next.run(request).await;
    }
    let origin = allowed(origins, request.headers());
    let preflight =
        request.method() == Method::OPTIONS && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = match &origin {
        Some(_) if preflight => preflight_reply(request.headers()),
        _ => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.append(VARY, if preflight { VARIES } else { HeaderValue::from_static("origin") });
    if let Some(origin) = origin {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    }
    response
}

/// Allows what is on the list of the headers that are asked for.
fn preflight_reply(headers: &HeaderMap) -> Response {
    let asked = headers.get_all(ACCESS_CONTROL_REQUEST_HEADERS).iter().filter_map(|names| names.to_str().ok());
    let names = asked.flat_map(|names| names.split(',')).take(MAX_NAMES).map(|name| name.trim().to_ascii_lowercase());
    let of_stainless = |name: &str| {
        let rest = name.strip_prefix(ALLOWED_PREFIX);
        rest.is_some_and(|rest| rest.len() <= 64 && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
    };
    let granted: Vec<_> = names.filter(|name| ALLOWED.contains(&name.as_str()) || of_stainless(name)).collect();
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    let granted = HeaderValue::try_from(granted.join(", ")).ok().filter(|granted| !granted.is_empty());
    if let Some(granted) = granted {
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, granted);
    }
    response
}
