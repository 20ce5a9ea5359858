//! `POST /v1/completions`. Outputs are raw: reasoning is not split off.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Extension, Request, State};
use axum::response::Response;
use baton_text::TextModel;

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::extract;
use crate::generate::{Job, compile, respond, submit};
use crate::generations::Pick;
use crate::openai::completion::{CompletionFormat, CompletionRequest, DEFAULT_MAX_TOKENS, Prompt};
use crate::openai::shared::Envelope;
use crate::routes::warn;
use crate::service::Service;
use crate::shadow::Encode;

pub(super) async fn create(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrival = Instant::now();
    let config = service.config();
    let mut body = extract::json(request, config).await?;
    let request = CompletionRequest::read(body.object, config.max_n, config.lenient, &mut body.values_left)?;
    let Pick { generation, target, shadow } = service.pick(&record, request.model.as_deref())?;

    let prompts = request.prompts;
    let shadow = shadow.map(|shadow| {
        let prompt = prompts[0].clone();
        let encode: Encode = Box::new(move |candidate| encode(&candidate.text, prompt));
        (shadow, encode)
    });
    let model = Arc::clone(&generation);
    let encode_all = move || prompts.into_iter().map(|prompt| encode(&model.text, prompt)).collect();
    let prompts: Vec<_> = service.text_work(encode_all).await?;

    let params = request.params;
    let grammar = compile(&service, &generation, &params, request.structured, None).await?;
    let (stream, include_usage) = (params.stream, params.include_usage);
    let format = CompletionFormat {
        envelope: Envelope::new("cmpl", &target, stream && include_usage),
        generation: Arc::clone(&generation),
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
        grammar,
        tools: None,
        shadow,
        arrival,
        record,
    };
    let choices = submit(&service, generation, job)?;
    let mut response = respond(choices, format, stream, config.keep_alive).await?;
    warn(&mut response, &request.ignored);
    Ok(response)
}

fn encode(text: &TextModel, prompt: Prompt) -> Result<Vec<u32>, ApiError> {
    match prompt {
        Prompt::Ids(ids) => Ok(ids),
        Prompt::Text(prompt) => {
            text.encode(&prompt, true).map_err(|_| ApiError::invalid("prompt", "the prompt cannot be tokenized"))
        }
    }
}
