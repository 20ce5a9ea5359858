//! `POST /v1/chat/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Extension, Request, State};
use axum::response::Response;
use baton_text::{ChatInput, TextError, TextModel};
use chrono::NaiveDateTime;

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::extract;
use crate::generate::{Job, Reasoning, respond, submit};
use crate::generations::Pick;
use crate::openai::chat::ChatFormat;
use crate::openai::chat_request::ChatRequest;
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
    let request = ChatRequest::read(body.object, config.max_n, config.lenient, &mut body.values_left)?;
    let Pick { generation, target, shadow } = service.pick(&record, request.model.as_deref())?;

    let chat = ChatInput {
        messages: request.messages.into(),
        tools: None,
        add_generation_prompt: request.add_generation_prompt,
        continue_final_message: request.continue_final_message,
        kwargs: request.template_kwargs,
    };
    let now = chrono::Local::now().naive_local();
    let shadow = shadow.map(|shadow| {
        let chat = chat.clone();
        let encode: Encode = Box::new(move |candidate| Ok(encode(&candidate.text, &chat, now)?.0));
        (shadow, encode)
    });
    let model = Arc::clone(&generation);
    let (prompt, starts_inside) = service.text_work(move || encode(&model.text, &chat, now)).await?;

    let params = request.params;
    let (stream, include_usage) = (params.stream, params.include_usage);
    let format = ChatFormat {
        envelope: Envelope::new("chatcmpl", &target, stream && include_usage),
        generation: Arc::clone(&generation),
        logprobs: params.logprobs.is_some(),
    };
    let job = Job {
        prompts: vec![prompt],
        params,
        adapter: target.adapter,
        default_max_tokens: generation.card.defaults.max_new_tokens,
        field: "messages",
        reasoning: generation.text.reasoning_markers().map(|markers| Reasoning { markers, starts_inside }),
        shadow,
        arrival,
        record,
    };
    let choices = submit(&service, generation, job)?;
    let mut response = respond(choices, format, stream, include_usage, config.keep_alive).await?;
    warn(&mut response, &request.ignored);
    Ok(response)
}

/// The prompt's ids, and whether it ends inside reasoning.
fn encode(text: &TextModel, chat: &ChatInput, now: NaiveDateTime) -> Result<(Vec<u32>, bool), ApiError> {
    let refuse = |error: TextError| ApiError::invalid("messages", error.to_string());
    let rendered = text.render_chat(chat, now).map_err(refuse)?;
    let prompt = text.encode_chat(&rendered).map_err(refuse)?;
    Ok((prompt, text.prompt_opens_reasoning(chat, &rendered)))
}
