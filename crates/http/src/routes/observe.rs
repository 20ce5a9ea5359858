//! Where the time went: the slowest requests, and what the engine does from step to step; and who used how much.

use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Uri};
use serde_json::Value;
use tokio::time::sleep;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::service::Service;
use crate::timeline::Timeline;

/// Seconds that a timeline may be recorded.
const SECONDS: std::ops::RangeInclusive<i64> = 1..=60;

/// `GET /admin/slow-requests`.
pub(super) async fn slow_requests(State(service): State<Service>) -> Json<Value> {
    Json(service.slow_requests().list(Instant::now()))
}

/// `GET /admin/usage`: as JSON, or as a table.
pub(super) async fn usage(State(service): State<Service>, uri: Uri) -> Result<Response, ApiError> {
    let mut fields = Fields::of_query(&uri)?;
    let format = fields.string("format")?;
    fields.finish()?;
    match format.as_deref() {
        None | Some("json") => Ok(Json(service.usage().json()).into_response()),
        Some("csv") => {
            Ok(([(CONTENT_TYPE, HeaderValue::from_static("text/csv"))], service.usage().csv()).into_response())
        }
        Some(_) => Err(ApiError::out_of_range("format", "json or csv")),
    }
}

/// `GET /admin/timeline`: a recording of the next seconds. A client that leaves ends it.
pub(super) async fn timeline(State(service): State<Service>, uri: Uri) -> Result<Response, ApiError> {
    let mut fields = Fields::of_query(&uri)?;
    let seconds = fields.integer("seconds", SECONDS)?.unwrap_or(1);
    fields.finish()?;
    service.serving()?;
    let timeline = Timeline::begin(service.generations())?;
    sleep(Duration::from_secs(seconds as u64)).await;
    let write = timeline.finish();
    let trace = service.text_work(move || Ok(write())).await?;
    Ok(([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], trace).into_response())
}
