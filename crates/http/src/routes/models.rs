//! `/v1/models` and one of them.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;
use crate::openai::models::{ModelList, ModelObject};
use crate::service::{Served, Service};

fn object<'a>(served: &'a Served, id: &'a str) -> ModelObject<'a> {
    let (card, max_model_len) = (&served.card, served.engine.spec().max_model_len);
    ModelObject { id, object: "model", created: card.created, owned_by: &card.owned_by, max_model_len }
}

pub(super) async fn list(State(service): State<Service>) -> Result<Response, ApiError> {
    let served = service.loaded().ok_or_else(ApiError::model_loading)?;
    let data = served.card.names.iter().map(|name| object(&served, name)).collect();
    Ok(Json(ModelList { object: "list", data }).into_response())
}

/// The id may contain slashes.
pub(super) async fn one(
    State(service): State<Service>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let served = service.loaded().ok_or_else(ApiError::model_loading)?;
    let Path(id) = id.map_err(|_| ApiError::model_not_found())?;
    let name = served.name(Some(&id))?;
    Ok(Json(object(&served, &name)).into_response())
}
