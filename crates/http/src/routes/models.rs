//! `/v1/models`, one of them, and how it was loaded.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, State};
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use http::header::CONTENT_TYPE;

use crate::adapters::ServedAdapter;
use crate::auth::{Granted, Scope};
use crate::error::ApiError;
use crate::openai::models::{ModelList, ModelObject};
use crate::service::{Served, Service};

/// Behind a model's id: how it was loaded.
const LOAD_REPORT: &str = "/load-report";

fn object<'a>(served: &'a Served, id: &'a str, adapter: Option<&ServedAdapter>) -> ModelObject<'a> {
    let (card, max_model_len) = (&served.card, served.engine.spec().max_model_len);
    let created = adapter.map_or(card.created, |adapter| adapter.created);
    let parent = adapter.map(|_| card.names[0].as_str());
    ModelObject { id, object: "model", created, owned_by: &card.owned_by, max_model_len, parent }
}

pub(super) async fn list(State(service): State<Service>) -> Result<Response, ApiError> {
    let served = service.loaded().ok_or_else(ApiError::model_loading)?;
    let adapters = served.adapters.all();
    let models = served.card.names.iter().map(|name| object(&served, name, None));
    let data = models.chain(adapters.iter().map(|(name, adapter)| object(&served, name, Some(adapter)))).collect();
    Ok(Json(ModelList { object: "list", data }).into_response())
}

/// The id may contain slashes, and therefore be followed by the name of what is asked about it.
pub(super) async fn one(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::model_not_found())?;
    if let Some(id) = id.strip_suffix(LOAD_REPORT) {
        granted.require(Scope::Admin)?;
        return load_report(&service, id);
    }
    granted.require(Scope::Inference)?;
    let served = service.loaded().ok_or_else(ApiError::model_loading)?;
    let adapter = served.adapters.get(&id);
    if adapter.is_none() {
        served.target(Some(&id))?;
    }
    Ok(Json(object(&served, &id, adapter.as_ref())).into_response())
}

fn load_report(service: &Service, id: &str) -> Result<Response, ApiError> {
    let served = service.loaded().ok_or_else(ApiError::model_loading)?;
    if !served.card.names.iter().any(|name| name == id) {
        return Err(ApiError::model_not_found());
    }
    let json = HeaderValue::from_static("application/json");
    Ok(([(CONTENT_TYPE, json)], served.card.load_report.clone()).into_response())
}
