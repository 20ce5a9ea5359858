//! `/v1/models`, one of them, and how it was loaded and handed over. All is said of the generation that serves.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, State};
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use http::header::CONTENT_TYPE;

use crate::adapters::ServedAdapter;
use crate::encoder::Encoder;
use crate::error::ApiError;
use crate::generation::{Generation, ModelCard};
use crate::handoff::Admission;
use crate::keys::{Granted, Scopes};
use crate::openai::models::{ModelList, ModelObject};
use crate::routes::Surface;
use crate::service::Service;

/// Behind a model's id: what only an admin sees of it.
const REPORTS: [(&str, Report); 2] = [("/load-report", load_report), ("/handoff", handoff_report)];

type Report = fn(&Generation) -> Result<Vec<u8>, ApiError>;

fn object<'a>(generation: &'a Generation, id: &'a str, adapter: Option<&ServedAdapter>) -> ModelObject<'a> {
    of_card(&generation.card, generation.engine.spec().max_model_len, id, adapter)
}

fn of_card<'a>(
    card: &'a ModelCard,
    max_model_len: usize,
    id: &'a str,
    adapter: Option<&ServedAdapter>,
) -> ModelObject<'a> {
    let created = adapter.map_or(card.created, |adapter| adapter.created);
    let parent = adapter.map(|_| card.names[0].as_str());
    ModelObject { id, object: "model", created, owned_by: &card.owned_by, max_model_len, parent }
}

pub(super) async fn list(State(service): State<Service>) -> Result<Response, ApiError> {
    if let Some(encoder) = service.encoder() {
        let (card, context) = (&encoder.card, encoder.spec.max_model_len);
        let data = card.names.iter().map(|name| of_card(card, context, name, None)).collect();
        return Ok(Json(ModelList { object: "list", data }).into_response());
    }
    let generation = service.serving()?;
    let adapters = generation.adapters.all();
    let models = generation.card.names.iter().map(|name| object(&generation, name, None));
    let data = models.chain(adapters.iter().map(|(name, adapter)| object(&generation, name, Some(adapter)))).collect();
    Ok(Json(ModelList { object: "list", data }).into_response())
}

/// The id may contain slashes, and therefore be followed by the name of what is asked about it.
pub(super) async fn one(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    Extension(surface): Extension<Surface>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::model_not_found())?;
    for (suffix, report) in REPORTS {
        if let Some(id) = id.strip_suffix(suffix) {
            if !surface.admin() {
                return Err(ApiError::route_not_found());
            }
            granted.require(Scopes::ADMIN)?;
            if let Some(encoder) = service.encoder() {
                return encoder_report(encoder, id, suffix);
            }
            let generation = service.serving()?;
            if !generation.has_name(Some(id)) {
                return Err(ApiError::model_not_found());
            }
            let json = HeaderValue::from_static("application/json");
            return Ok(([(CONTENT_TYPE, json)], report(&generation)?).into_response());
        }
    }
    if !surface.inference() {
        return Err(ApiError::route_not_found());
    }
    granted.require(Scopes::INFERENCE)?;
    if let Some(encoder) = service.encoder() {
        encoder.named(Some(&id))?;
        return Ok(Json(of_card(&encoder.card, encoder.spec.max_model_len, &id, None)).into_response());
    }
    let generation = service.serving()?;
    let adapter = generation.adapters.get(&id);
    if adapter.is_none() {
        generation.target(Some(&id))?;
    }
    Ok(Json(object(&generation, &id, adapter.as_ref())).into_response())
}

/// What an admin sees of an encoder: it has no hand-off.
fn encoder_report(encoder: &Encoder, id: &str, report: &str) -> Result<Response, ApiError> {
    encoder.named(Some(id))?;
    if report != REPORTS[0].0 {
        return Err(ApiError::no_handoff("an encoder has no hand-off"));
    }
    Ok(([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], encoder.card.load_report.clone())
        .into_response())
}

/// How its weights were loaded.
fn load_report(generation: &Generation) -> Result<Vec<u8>, ApiError> {
    Ok(generation.card.load_report.clone())
}

/// How it was judged against its trainer.
fn handoff_report(generation: &Generation) -> Result<Vec<u8>, ApiError> {
    let handoff = generation.handoff.get();
    let none = || match handoff.admission {
        Admission::Off => ApiError::no_handoff("hand-offs are not looked at (--handoff off)"),
        Admission::Absent => ApiError::no_handoff("the model came without a bundle: there is no handoff.json"),
        _ => ApiError::no_handoff("the hand-off is still being verified; there is no report yet"),
    };
    handoff.report.as_deref().map(<[u8]>::to_vec).ok_or_else(none)
}
