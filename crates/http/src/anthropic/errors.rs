//! Errors in Anthropic's form, on its routes only.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::Response;
use http::header::CONTENT_LENGTH;
use http::{HeaderName, HeaderValue, StatusCode};
use serde::Serialize;

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::json;

pub(crate) const ROUTES: &str = "/v1/messages";

/// Where its clients look for the id of a request.
const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// The error object.
pub(super) fn object(error: &ApiError) -> impl Serialize + '_ {
    #[derive(Serialize)]
    struct Body<'a> {
        r#type: &'static str,
        error: Object<'a>,
    }
    #[derive(Serialize)]
    struct Object<'a> {
        r#type: &'static str,
        message: &'a str,
    }
    Body { r#type: "error", error: Object { r#type: kind(error.status()), message: error.message() } }
}

fn kind(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "api_error",
    }
}

/// The layer: rewrites what handlers, inner layers and the router refuse. Status and headers stay.
pub(crate) async fn layer(request: Request, next: Next) -> Response {
    let ours = match request.extensions().get::<MatchedPath>() {
        Some(route) => within(route.as_str()),
        None => within(request.uri().path()),
    };
    if !ours {
        return next.run(request).await;
    }
    let id = request.extensions().get::<Arc<AccessRecord>>().cloned();
    let mut response = next.run(request).await;
    if let Some(id) = id.and_then(|record| HeaderValue::from_bytes(record.request_id()).ok()) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let Some(body) = response.extensions().get::<ApiError>().map(|error| json::write(&object(error))) else {
        return response;
    };
    response.headers_mut().remove(CONTENT_LENGTH);
    *response.body_mut() = Body::from(body);
    response
}

fn within(path: &str) -> bool {
    path.strip_prefix(ROUTES).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
