//! API keys.
//!
//! Refusal is the default, decided on the route that was matched and not on the path as sent; the short list of
//! public routes is here. What is compared are SHA-256 digests, in constant time and against every key.

use std::fmt;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::error::ApiError;
use crate::service::Service;

/// Routes that need no key.
const PUBLIC: [&str; 10] = [
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
];

/// The route that is open on a loopback address.
const METRICS: &str = "/metrics";

/// A key as the operator gave it. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// A key; `None` if it is empty or cannot be sent in a header.
    pub fn new(key: String) -> Option<Self> {
        (!key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic())).then_some(Self(key))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// Whether a request came in over a listener on a loopback address. Set by the accept loop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OnLoopback(pub bool);

/// Digests of the accepted keys; none: no key is asked for.
pub(crate) struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// The digests of these keys.
    pub fn new(keys: &[ApiKey]) -> Self {
        Self(keys.iter().map(|key| Sha256::digest(&key.0).into()).collect())
    }

    fn accept(&self, headers: &HeaderMap) -> bool {
        let bearer = headers.get(AUTHORIZATION).and_then(|value| {
            let (scheme, key) = value.as_bytes().split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(key.trim_ascii())
        });
        let Some(key) = bearer else { return false };
        let digest: [u8; 32] = Sha256::digest(key).into();
        let found = self.0.iter().fold(Choice::from(0), |found, known| found | known.ct_eq(&digest));
        found.into()
    }
}

/// The layer.
pub(crate) async fn layer(State(service): State<Service>, request: Request, next: Next) -> Response {
    let keys = service.keys();
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let public = route.is_some_and(|route| PUBLIC.contains(&route));
    let on_loopback = matches!(request.extensions().get(), Some(OnLoopback(true)));
    let open = keys.0.is_empty() || public || (route == Some(METRICS) && on_loopback);
    if open || keys.accept(request.headers()) {
        next.run(request).await
    } else {
        ApiError::invalid_api_key().into_response()
    }
}
