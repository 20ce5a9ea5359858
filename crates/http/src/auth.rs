//! API keys and what they are good for.
//!
//! Refusal is the default, decided on the route that was matched and not on the path as sent; the short lists of
//! public and of admin routes are here. What is compared are SHA-256 digests, in constant time and against every key.
//!
//! Without inference keys every client may ask for inference. Nobody is an admin without a key.

use std::fmt;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::error::ApiError;
use crate::service::{Service, ServiceConfig};

/// Routes that need no key.
const PUBLIC: [&str; 12] = [
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
const ADMIN: [&str; 7] = [
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/admin/generations",
    "/admin/rollout",
    "/admin/rollout/{command}",
    "/admin/slow-requests",
    "/admin/timeline",
];

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// The route that is open on a loopback address.
pub(crate) const METRICS: &str = "/metrics";

/// The route whose handler asks for the scope, which depends on the end of the path.
pub(crate) const MODEL: &str = "/v1/models/{*id}";

/// What a route asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// To use the model.
    Inference,
    /// To change what is served, or see how.
    Admin,
    /// One of the two.
    Any,
}

/// Whose something is: all who send the same key are one. It goes to disk as a digest, from which no key can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Owner([u8; 32]);

impl Owner {
    /// Those who send no key that is known, where none is asked for.
    pub const ANYONE: Self = Self([0; 32]);

    /// The sender of the key of this SHA-256 digest.
    #[cfg(test)]
    pub const fn of_digest(digest: [u8; 32]) -> Self {
        Self(digest)
    }
}

impl From<Owner> for String {
    fn from(owner: Owner) -> Self {
        owner.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl TryFrom<String> for Owner {
    type Error = &'static str;

    fn try_from(hex: String) -> Result<Self, Self::Error> {
        let refusal = "an owner is 64 hexadecimal digits";
        let digit = |digit: u8| char::from(digit).to_digit(16).ok_or(refusal);
        let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
        let bytes: Vec<u8> = pairs
            .iter()
            .map(|&[high, low]| Ok((digit(high)? << 4 | digit(low)?) as u8))
            .collect::<Result<_, Self::Error>>()?;
        bytes.try_into().ok().filter(|_| rest.is_empty()).map(Self).ok_or(refusal)
    }
}

/// What the sender of a request may do. Set on every request by the layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Granted {
    inference: bool,
    admin: bool,
    /// The key is one of ours, of whatever scope.
    known: bool,
    owner: Owner,
}

impl Granted {
    /// Whose the request is, and what it asks to be kept.
    pub fn owner(self) -> Owner {
        self.owner
    }

    /// `Ok` if the scope is granted.
    pub fn require(self, scope: Scope) -> Result<(), ApiError> {
        let granted = match scope {
            Scope::Inference => self.inference,
            Scope::Admin => self.admin,
            Scope::Any => self.inference || self.admin,
        };
        match scope {
            _ if granted => Ok(()),
            _ if self.known => Err(ApiError::insufficient_scope()),
            Scope::Admin => Err(ApiError::admin_key_needed()),
            _ => Err(ApiError::invalid_api_key()),
        }
    }
}

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

/// Set on a request that the service itself makes, in place of a key: whose it is. What it may do is what the key may now.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OnBehalfOf(pub Owner);

/// Digests of the accepted keys.
pub(crate) struct Keys {
    /// None: no key is asked for.
    inference: Vec<[u8; 32]>,
    admin: Vec<[u8; 32]>,
}

impl Keys {
    /// The digests of a service's keys.
    pub fn new(config: &ServiceConfig) -> Self {
        let digests = |keys: &[ApiKey]| keys.iter().map(|key| Sha256::digest(&key.0).into()).collect();
        Self { inference: digests(&config.api_keys), admin: digests(&config.admin_api_keys) }
    }

    fn grant(&self, headers: &HeaderMap) -> Granted {
        let bearer = headers.get(AUTHORIZATION).and_then(|value| {
            let (scheme, key) = value.as_bytes().split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(key.trim_ascii())
        });
        // Where the clients of Anthropic's API put it.
        let sent = bearer.or_else(|| headers.get(X_API_KEY).map(|value| value.as_bytes().trim_ascii()));
        self.grant_to(sent.map_or(Owner::ANYONE, |key| Owner(Sha256::digest(key).into())))
    }

    /// What the sender of the key of this digest may do.
    fn grant_to(&self, sender: Owner) -> Granted {
        let found = |keys: &[[u8; 32]]| -> bool {
            keys.iter().fold(Choice::from(0), |found, known| found | known.ct_eq(&sender.0)).into()
        };
        let [inference, admin] = [found(&self.inference), found(&self.admin)];
        let known = inference || admin;
        let owner = if known { sender } else { Owner::ANYONE };
        Granted { inference: inference || self.inference.is_empty(), admin, known, owner }
    }
}

/// What a route asks for; metrics, on an address that is not loopback. `None`: nothing.
fn required(route: &str) -> Option<Scope> {
    match route {
        _ if PUBLIC.contains(&route) => None,
        _ if ADMIN.contains(&route) => Some(Scope::Admin),
        METRICS | MODEL => Some(Scope::Any),
        _ => Some(Scope::Inference),
    }
}

/// As [`required`], of a path as the API's description writes it: what [`MODEL`] is of several there.
pub(crate) fn documented_scope(path: &str) -> Option<Scope> {
    match path.strip_prefix("/v1/models/{id}") {
        Some("") => Some(Scope::Inference),
        Some(_) => Some(Scope::Admin),
        None => required(path),
    }
}

/// The layer.
pub(crate) async fn layer(State(service): State<Service>, mut request: Request, next: Next) -> Response {
    let granted = match request.extensions().get() {
        Some(&OnBehalfOf(owner)) => service.keys().grant_to(owner),
        None => service.keys().grant(request.headers()),
    };
    let on_loopback = matches!(request.extensions().get(), Some(OnLoopback(true)));
    let scope = match request.extensions().get::<MatchedPath>().map(MatchedPath::as_str) {
        Some(METRICS) if on_loopback => None,
        Some(route) => required(route),
        None => Some(Scope::Any),
    };
    if let Some(Err(refusal)) = scope.map(|scope| granted.require(scope)) {
        return refusal.into_response();
    }
    request.extensions_mut().insert(granted);
    next.run(request).await
}
