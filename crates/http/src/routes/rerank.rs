//! `POST /v1/rerank` and `POST /score`, under all the paths that clients use for them.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use http::header::CONTENT_TYPE;

use crate::access::AccessRecord;
use crate::encoder::Encoder;
use crate::error::ApiError;
use crate::extract;
use crate::openai::rerank::{RerankRequest, ScoreRequest, rerank_reply, score_reply};
use crate::routes::warn;
use crate::scoring::{Pairs, scores};
use crate::service::Service;

pub(super) async fn rerank(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = extract::json(request, service.config()).await?;
    let request = RerankRequest::read(body.object, service.config().lenient)?;
    let encoder = scorer(&service)?;
    let model = encoder.named(request.model.as_deref())?.to_owned();
    let pairs = Pairs {
        first: vec![request.query.clone()],
        second: request.documents.clone(),
        first_field: "query",
        second_field: "documents",
        truncation: request.truncation,
    };
    let (scores, usage) = scores(&service, &encoder, &record, pairs).await?;
    let response = rerank_reply(&request, &model, &scores, usage);
    Ok(written(response, &request.ignored))
}

pub(super) async fn score(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = extract::json(request, service.config()).await?;
    let ScoreRequest { model, text_1, text_2, truncation, ignored } =
        ScoreRequest::read(body.object, service.config().lenient)?;
    let encoder = scorer(&service)?;
    let model = encoder.named(model.as_deref())?.to_owned();
    let pairs = Pairs { first: text_1, second: text_2, first_field: "text_1", second_field: "text_2", truncation };
    let (scores, usage) = scores(&service, &encoder, &record, pairs).await?;
    Ok(written(score_reply(&model, &scores, usage), &ignored))
}

/// The model, if it scores: by itself, or by the embeddings that it makes.
fn scorer(service: &Service) -> Result<Arc<Encoder>, ApiError> {
    if let Some(encoder) = service.encoder() {
        return Ok(Arc::clone(encoder));
    }
    service.serving()?;
    Err(ApiError::not_for_this_model(
        "the model served here generates texts and scores none: POST /v1/chat/completions or /v1/completions",
    ))
}

fn written(body: Vec<u8>, ignored: &[String]) -> Response {
    let json = HeaderValue::from_static("application/json");
    let mut response = ([(CONTENT_TYPE, json)], body).into_response();
    warn(&mut response, ignored);
    response
}
