//! Headers that every reply has, refusals too: what browsers may do with it.
//!
//! A route that sets one of them itself keeps its own: a page has a policy of its own, and static files may be cached.

use axum::body::Body;
use axum::response::Response;
use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS};
use http::{HeaderName, HeaderValue};

const HEADERS: [(HeaderName, HeaderValue); 5] = [
    // Replies say what their client alone may see.
    (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    // Shown as a document, a reply loads nothing and stands in nobody's frame.
    (CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'")),
    (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
];

/// The layer.
pub(crate) async fn layer(mut response: Response<Body>) -> Response<Body> {
    for (name, value) in HEADERS {
        response.headers_mut().entry(name).or_insert(value);
    }
    response
}
