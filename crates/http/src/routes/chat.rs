//! `POST /v1/chat/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Extension, Request, State};
use axum::response::Response;

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::extract;
use crate::generate::{StartedChat, respond, start_chat};
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
