//! The one way in which a request body becomes JSON.
//!
//! Bytes are counted while they are read, and nothing beyond the limit is kept. The content type is not looked at:
//! what is not JSON fails as JSON, and that no page of elsewhere sends it `browsers` sees to.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, EXPECT};
use http_body_util::BodyExt;
use serde_json::{Map, Value};
use tokio::time::timeout;

use crate::error::ApiError;
use crate::json::{self, MAX_VALUES};
use crate::service::ServiceConfig;

/// How much of a body that is too large is read and thrown away, and for how long, so that a client which is still
/// sending gets to see the refusal instead of a broken connection.
const DISCARD_BYTES: usize = 256 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(10);

/// A body as an object, and how many JSON values the request may still have, in documents inside its strings.
pub(crate) struct JsonBody {
    pub object: Map<String, Value>,
    pub values_left: usize,
}

/// Reads the body of a request.
pub(crate) async fn json(request: Request, config: &ServiceConfig) -> Result<JsonBody, ApiError> {
    let (parts, body) = request.into_parts();
    let bytes = match timeout(config.body_timeout, read(&parts.headers, body, config.body_limit_bytes)).await {
        Ok(bytes) => bytes?,
        Err(_) => return Err(ApiError::request_timeout()),
    };
    let mut values_left = MAX_VALUES;
    let object = json::parse_object(&bytes, &mut values_left)?;
    Ok(JsonBody { object, values_left })
}

/// The length that a body is announced with.
pub(crate) fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok())
}

/// Gives up a body, so that a client that is sending it gets to see why.
pub(crate) fn refuse_body(headers: &HeaderMap, body: Body) {
    // A client that asks before it sends has sent nothing yet.
    if !headers.contains_key(EXPECT) {
        discard(body);
    }
}

async fn read(headers: &HeaderMap, mut body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let announced = announced(headers);
    if announced.is_some_and(|length| length > limit as u64) {
        refuse_body(headers, body);
        return Err(ApiError::request_too_large(limit));
    }
    let mut bytes = Vec::with_capacity(announced.unwrap_or_default().min(64 << 10) as usize);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::body("could not be read to its end"))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            discard(body);
            return Err(ApiError::request_too_large(limit));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

/// Reads on, keeping nothing, while the refusal is sent.
fn discard(mut body: Body) {
    tokio::spawn(timeout(DISCARD_TIME, async move {
        let mut read = 0;
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.into_data().map_or(0, |data| data.len());
            if read > DISCARD_BYTES {
                break;
            }
        }
    }));
}
