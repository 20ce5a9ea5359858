//! `POST /v1/completions`. Outputs are raw: reasoning is not split off.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Extension, Request, State};
use axum::response::Response;

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::extract;
use crate::generate::{Echo, Encoding, Job, bad_words, compile, respond, submit};
use crate::generation::Generation;
use crate::generations::Pick;
use crate::openai::completion::{CompletionFormat, CompletionRequest, DEFAULT_MAX_TOKENS, Prompt};
use crate::openai::shared::Envelope;
use crate::openai::tokens::{TokenStyle, TokensTold};
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

    let (mut params, prompts) = (request.params, request.prompts);
    let encoding = Encoding::new(&params, true, Some(DEFAULT_MAX_TOKENS));
    let shadow = shadow.map(|shadow| {
        let prompt = prompts[0].clone();
        let encode: Encode = Box::new(move |candidate| Ok(encode(candidate, prompt, encoding)?.0));
        (shadow, encode)
    });
    let (model, words) = (Arc::clone(&generation), std::mem::take(&mut params.bad_words));
    let (echo, skip_special_tokens) = (params.echo, params.skip_special_tokens);
    let work = move || {
        let (mut all_ids, mut echoes) = (Vec::with_capacity(prompts.len()), Vec::new());
        for prompt in prompts {
            let (ids, given) = encode(&model, prompt, encoding)?;
            if echo {
                echoes.push(Echo::new(&model.text, &ids, given, skip_special_tokens));
            }
            all_ids.push(ids);
        }
        Ok((all_ids, echoes, bad_words(&model.text, &words)?))
    };
    let (prompts, echoes, bad_words) = service.text_work(work).await?;

    let grammar = compile(&service, &generation, &params, request.structured, None).await?;
    let (stream, include_usage) = (params.stream, params.include_usage);
    let envelope = Envelope::new("cmpl", &target, stream && include_usage);
    let format = CompletionFormat {
        envelope: envelope.continuous_usage(params.continuous_usage),
        style: TokenStyle::new(Arc::clone(&generation), TokensTold::new(&params)),
        logprobs: params.logprobs.is_some(),
        several: prompts.len() > 1 || params.n > 1,
    };
    let job = Job {
        prompts,
        params,
        echoes,
        bad_words,
        adapter: target.adapter,
        default_max_tokens: Some(DEFAULT_MAX_TOKENS),
        field: "prompt",
        reasoning: None,
        tools: None,
        grammar,
        shadow,
        arrival,
        record,
    };
    let choices = submit(&service, generation, job)?;
    let mut response = respond(choices, format, stream, config.keep_alive).await?;
    warn(&mut response, &request.ignored);
    Ok(response)
}

/// The ids of a prompt, and its text if it is the text of all of them.
fn encode(generation: &Generation, prompt: Prompt, encoding: Encoding) -> Result<(Vec<u32>, Option<String>), ApiError> {
    match prompt {
        Prompt::Ids(mut ids) => {
            encoding.truncate(generation, &mut ids);
            Ok((ids, None))
        }
        Prompt::Text(text) => {
            let refusal = |_| ApiError::invalid("prompt", "the prompt cannot be tokenized");
            let (ids, cut) = encoding.ids(generation, &text).map_err(refusal)?;
            Ok((ids, (!cut).then_some(text)))
        }
    }
}
