//! `POST /v1/messages` and `/v1/messages/count_tokens`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use crate::access::AccessRecord;
use crate::anthropic::{self, MessageFormat, MessageRequest};
use crate::error::ApiError;
use crate::extract;
use crate::generate::{StartedChat, render_chat, respond, start_chat};
use crate::openai::shared::Envelope;
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
    let MessageRequest { mut chat, omit_thinking } =
        MessageRequest::read(body.object, config, &mut body.values_left, false)?;
    let ignored = std::mem::take(&mut chat.ignored);
    let (stream, stops) = (chat.params.stream, chat.params.stop.clone());
    let StartedChat { choices, target, .. } = start_chat(&service, record, arrival, chat).await.map_err(theirs)?;
    let envelope = Envelope::new("msg", &target, false);
    let format = MessageFormat::new(envelope, choices.usage().prompt_tokens, stops, omit_thinking);
    let mut response = respond(choices, format, stream, config.keep_alive).await?;
    warn(&mut response, &ignored);
    Ok(response)
}

pub(super) async fn count_tokens(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let config = service.config();
    let mut body = extract::json(request, config).await?;
    let MessageRequest { chat, .. } = MessageRequest::read(body.object, config, &mut body.values_left, true)?;
    let rendered = render_chat(&service, &record, chat).await.map_err(theirs)?;
    Ok(Json(json!({"input_tokens": rendered.prompt.ids.len()})))
}

/// What is wrong only for this model, in the words of this dialect.
fn theirs(error: ApiError) -> ApiError {
    error.renamed(anthropic::their_name)
}
