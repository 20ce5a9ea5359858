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
    match service.serving() {
        Ok(generation) if !generation.engine.stats().alive => Err(ApiError::engine_down()),
        _ => Ok(ok()),
    }
}

/// New inference requests are taken.
pub(super) async fn ready(State(service): State<Service>) -> Result<Json<Value>, ApiError> {
    service.ready().map(|()| ok())
}

/// The model has been loaded.
pub(super) async fn startup(State(service): State<Service>) -> Result<Json<Value>, ApiError> {
    service.serving().map(|_| ok())
}

pub(super) async fn version(State(service): State<Service>) -> Json<Value> {
    Json(json!({"version": service.config().version}))
}
