//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use baton_text::{EncoderInput, TextModel};
use http::HeaderValue;
use http::header::CONTENT_TYPE;

use crate::access::AccessRecord;
use crate::encoder::{Encoder, EncoderTask};
use crate::error::ApiError;
use crate::extract;
use crate::openai::completion::Prompt;
use crate::openai::embedding::{EmbeddingRequest, ReadUsage, reply};
use crate::routes::warn;
use crate::scoring::{Cut, unreadable};
use crate::service::Service;

pub(super) async fn create(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = extract::json(request, service.config()).await?;
    let request = EmbeddingRequest::read(body.object, service.config().lenient)?;
    let encoder = embedder(&service)?;
    let model = encoder.named(request.model.as_deref())?.to_owned();
    let width = encoder.spec.width;
    let dimensions = request.dimensions.unwrap_or(width);
    if dimensions > width {
        return Err(ApiError::out_of_range("dimensions", format!("at most {width}")));
    }

    let cut = Cut::new(request.truncation, encoder.spec.max_model_len)?;
    let several = request.inputs.len() > 1;
    let field = move |index| if several { format!("input[{index}]") } else { "input".to_owned() };
    let (text, prompts) = (Arc::clone(&encoder.text), request.inputs);
    let inputs = service
        .text_work(move || {
            let input = |(i, prompt)| input(&text, prompt, cut, || field(i));
            prompts.into_iter().enumerate().map(input).collect::<Result<Vec<_>, _>>()
        })
        .await?;
    let usage = ReadUsage::new(inputs.iter().map(|input| input.ids.len()).sum());
    let mut embeddings = encoder.compute(&service, &record, inputs, field).await?;

    let normalized = encoder.spec.normalized;
    let body = move || {
        if dimensions < width {
            embeddings.iter_mut().for_each(|embedding| shorten(embedding, dimensions, normalized));
        }
        Ok(reply(&model, &embeddings, request.encoding, usage))
    };
    let json = HeaderValue::from_static("application/json");
    let mut response = ([(CONTENT_TYPE, json)], service.text_work(body).await?).into_response();
    warn(&mut response, &request.ignored);
    Ok(response)
}

/// The model, if it embeds.
fn embedder(service: &Service) -> Result<Arc<Encoder>, ApiError> {
    match service.encoder() {
        Some(encoder) if encoder.spec.task == EncoderTask::Embed => Ok(Arc::clone(encoder)),
        Some(encoder) => Err(encoder.does_not_generate()),
        None => {
            service.serving()?;
            Err(ApiError::not_for_this_model(
                "the model served here generates texts and embeds none: POST /v1/chat/completions or /v1/completions",
            ))
        }
    }
}

/// Ids are taken as they are; a text gets the special tokens of its tokenizer.
fn input(model: &TextModel, prompt: Prompt, cut: Cut, field: impl Fn() -> String) -> Result<EncoderInput, ApiError> {
    match prompt {
        Prompt::Ids(ids) => cut.ids(ids, field),
        Prompt::Text(text) => {
            let part = model.part(&text, cut.max_tokens).map_err(|_| unreadable(&field()))?;
            cut.input(model, &part, None, field)
        }
    }
}

/// Keeps the first components, which of a Matryoshka model are an embedding of their own, with the length that the
/// model's embeddings have.
fn shorten(embedding: &mut Vec<f32>, dimensions: usize, normalized: bool) {
    embedding.truncate(dimensions);
    if normalized {
        let length = embedding.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt().max(1e-12);
        embedding.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
}
