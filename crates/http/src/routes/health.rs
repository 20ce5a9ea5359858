//! Probes and the version. A probe's work does not depend on load.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::service::Service;

fn ok() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// The process is worth keeping: fails only once the engine has stopped for good.
pub(super) async fn live(State(service): State<Service>) -> Result<Json<Value>, ApiError> {
    let alive = match service.encoder() {
        Some(encoder) => encoder.engine.stats().alive,
        None => service.serving().map_or(true, |generation| generation.engine.stats().alive),
    };
    if alive { Ok(ok()) } else { Err(ApiError::engine_down()) }
}

/// New inference requests are taken.
pub(super) async fn ready(State(service): State<Service>) -> Result<Json<Value>, ApiError> {
    service.ready().map(|()| ok())
}

/// The model has been loaded.
pub(super) async fn startup(State(service): State<Service>) -> Result<Json<Value>, ApiError> {
    match service.encoder() {
        Some(_) => Ok(ok()),
        None => service.serving().map(|_| ok()),
    }
}

pub(super) async fn version(State(service): State<Service>) -> Json<Value> {
    Json(json!({"version": service.config().version}))
}
