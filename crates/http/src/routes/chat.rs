//! `POST /v1/chat/completions`, and the prompt that such a request becomes.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::extract;
use crate::generate::{RenderedChat, StartedChat, render_chat, respond, start_chat};
use crate::openai::chat::ChatFormat;
use crate::openai::chat_request::ChatRequest;
use crate::openai::shared::Envelope;
use crate::openai::tokens::{TokenStyle, TokensTold};
use crate::routes::warn;
use crate::service::Service;

pub(super) async fn create(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrival = Instant::now();
    let config = service.config();
    let mut body = extract::json(request, config).await?;
    let mut request = ChatRequest::read(body.object, config.max_n, config.lenient, &mut body.values_left)?;
    let ignored = std::mem::take(&mut request.ignored);
    let (stream, logprobs) = (request.params.stream, request.params.logprobs.is_some());
    let (include_usage, continuous_usage) = (request.params.include_usage, request.params.continuous_usage);
    let tokens = TokensTold::new(&request.params);
    let StartedChat { choices, generation, target } = start_chat(&service, record, arrival, request).await?;
    let envelope = Envelope::new("chatcmpl", &target, stream && include_usage).continuous_usage(continuous_usage);
    let format = ChatFormat { envelope, style: TokenStyle::new(generation, tokens), logprobs };
    let mut response = respond(choices, format, stream, config.keep_alive).await?;
    warn(&mut response, &ignored);
    Ok(response)
}

/// `POST /v1/chat/completions/render`: the prompt's text and tokens, by vLLM's names. The request is read as a chat is.
pub(super) async fn render(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let config = service.config();
    let mut body = extract::json(request, config).await?;
    let request = ChatRequest::read(body.object, config.max_n, config.lenient, &mut body.values_left)?;
    let ignored = request.ignored.clone();
    let RenderedChat { prompt, generation, target } = render_chat(&service, &record, request).await?;
    let max_model_len = generation.engine.spec().max_model_len;
    let mut response = Json(json!({
        "model": target.name,
        "prompt": prompt.text,
        "token_ids": prompt.ids,
        "count": prompt.ids.len(),
        "max_model_len": max_model_len,
    }))
    .into_response();
    warn(&mut response, &ignored);
    Ok(response)
}
