//! Which routes ask for which keys.
//!
//! Refusal is the default, decided on the route that was matched and not on the path as sent; the short lists of
//! public and of admin routes are here. What a key is good for, `keys` knows.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName};

use crate::access::AccessRecord;
use crate::browsers;
use crate::keys::{Owner, Scopes};
use crate::service::Service;

/// Routes that need no key.
const PUBLIC: [&str; 14] = [
    "/",
    "/page/{file}",
    "/live",
    "/ready",
    "/startup",
    "/health",
    "/health/live",
    "/health/ready",
    "/health/startup",
    "/v2/health/live",
    "/v2/health/ready",
    "/version",
    "/openapi.json",
    "/docs",
];

/// Routes that change what is served, or show how.
const ADMIN: [&str; 8] = [
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/admin/generations",
    "/admin/rollout",
    "/admin/rollout/{command}",
    "/admin/slow-requests",
    "/admin/timeline",
    "/admin/usage",
];

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// The route that is open on a loopback address.
pub(crate) const METRICS: &str = "/metrics";

/// The route whose handler asks for the scope, which depends on the end of the path.
pub(crate) const MODEL: &str = "/v1/models/{*id}";

/// Of a model, routes that any of these scopes opens; which one it takes depends on the end of the path.
pub(crate) const ANY: Scopes = Scopes::INFERENCE.and(Scopes::ADMIN);

/// Whether a request came in over a listener on a loopback address. Set by the accept loop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OnLoopback(pub bool);

/// Set on a request that the service itself makes, in place of a key: whose it is. What it may do is what the key may now.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OnBehalfOf(pub Owner);

/// Who says to have sent a request.
fn sender(headers: &HeaderMap) -> Owner {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key.trim_ascii())
    });
    // Where the clients of Anthropic's API put it.
    let sent = bearer.or_else(|| headers.get(X_API_KEY).map(|value| value.as_bytes().trim_ascii()));
    sent.map_or(Owner::ANYONE, Owner::of_key)
}

/// What a route asks for, one of these; metrics, on an address that is not loopback. `None`: nothing.
fn required(route: &str) -> Option<Scopes> {
    match route {
        _ if PUBLIC.contains(&route) => None,
        _ if ADMIN.contains(&route) => Some(Scopes::ADMIN),
        METRICS => Some(Scopes::METRICS),
        MODEL => Some(ANY),
        _ => Some(Scopes::INFERENCE),
    }
}

/// As [`required`], of a path as the API's description writes it: what [`MODEL`] is of several there.
pub(crate) fn documented_scopes(path: &str) -> Option<Scopes> {
    match path.strip_prefix("/v1/models/{id}") {
        Some("") => Some(Scopes::INFERENCE),
        Some(_) => Some(Scopes::ADMIN),
        None => required(path),
    }
}

/// The layer.
pub(crate) async fn layer(State(service): State<Service>, mut request: Request, next: Next) -> Response {
    let sender = match request.extensions().get() {
        Some(&OnBehalfOf(owner)) => owner,
        None => sender(request.headers()),
    };
    let granted = service.keys().grant(sender);
    if let Some(record) = request.extensions().get::<Arc<AccessRecord>>() {
        record.sent_by(&granted);
    }
    let on_loopback = matches!(request.extensions().get(), Some(OnLoopback(true)));
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let scopes = match route {
        Some(METRICS) if on_loopback => None,
        Some(route) => required(route),
        None => Some(ANY),
    };
    if let Some(Err(refusal)) = scopes.map(|scopes| granted.require(scopes)) {
        return refusal.into_response();
    }
    let is_public = route.is_some_and(|route| PUBLIC.contains(&route));
    if !is_public
        && granted.name().is_none()
        && let Err(refusal) = browsers::check(service.config(), on_loopback, &request)
    {
        return refusal.into_response();
    }
    request.extensions_mut().insert(granted);
    next.run(request).await
}
