//! `POST /v1/completions`. Outputs are raw: reasoning is not split off.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Extension, Request, State};
use axum::response::Response;
use baton_text::TextModel;

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::extract;
use crate::generate::{Job, respond, submit};
use crate::openai::completion::{CompletionFormat, CompletionRequest, DEFAULT_MAX_TOKENS, Prompt};
use crate::openai::shared::Envelope;
use crate::routes::warn;
use crate::service::Service;

pub(super) async fn create(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrival = Instant::now();
    let (config, served) = (service.config(), service.served()?);
    let body = extract::json(request, config).await?;
    let request = CompletionRequest::read(body.object, config.max_n, config.lenient)?;
    let target = served.target(request.model.as_deref())?;

    let (text, prompts) = (served.text.clone(), request.prompts);
    let prompts = service.text_work(move || encode(&text, prompts)).await?;

    let params = request.params;
    let (stream, include_usage) = (params.stream, params.include_usage);
    let format = CompletionFormat {
        envelope: Envelope::new("cmpl", &target, stream && include_usage),
        text: served.text.clone(),
        logprobs: params.logprobs.is_some(),
        several: prompts.len() > 1 || params.n > 1,
    };
    let job = Job {
        prompts,
        params,
        adapter: target.adapter,
        default_max_tokens: Some(DEFAULT_MAX_TOKENS),
        field: "prompt",
        reasoning: None,
        arrival,
        record,
    };
    let generation = submit(&service, &served, job)?;
    let mut response = respond(generation, format, stream, include_usage, config.keep_alive).await?;
    warn(&mut response, &request.ignored);
    Ok(response)
}

fn encode(text: &TextModel, prompts: Vec<Prompt>) -> Result<Vec<Vec<u32>>, ApiError> {
    let encode = |prompt| match prompt {
        Prompt::Ids(ids) => Ok(ids),
        Prompt::Text(prompt) => {
            text.encode(&prompt, true).map_err(|_| ApiError::invalid("prompt", "the prompt cannot be tokenized"))
        }
    };
    prompts.into_iter().map(encode).collect()
}
