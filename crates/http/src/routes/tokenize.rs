//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use baton_text::TextModel;
use serde::Serialize;
use serde_json::{Value, json};

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::extract;
use crate::fields::Fields;
use crate::generate::{RenderedChat, render_chat};
use crate::generation::InUse;
use crate::generations::Pick;
use crate::openai::chat_request::ChatRequest;
use crate::openai::list_params::token_id;
use crate::openai::params::refuse_rest;
use crate::routes::warn;
use crate::service::Service;

#[derive(Serialize)]
struct Tokens {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    /// As the vocabulary writes them.
    token_strs: Option<Vec<String>>,
}

/// The tokens of a text, or of the prompt that a chat becomes; the latter is read and made as for an answer.
pub(super) async fn tokenize(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let config = service.config();
    let mut body = extract::json(request, config).await?;
    let mut fields = Fields::new(body.object);
    let with_strings = fields.bool("return_token_strs")?.unwrap_or(false);
    let (generation, tokens, ignored) = match fields.string("prompt")? {
        Some(prompt) => {
            let model = fields.string("model")?;
            let special = fields.bool("add_special_tokens")?.unwrap_or(true);
            let ignored = refuse_rest(fields, config.lenient)?;
            let Pick { generation, .. } = service.pick(&record, model.as_deref())?;
            let text = generation.text.clone();
            let encode = move || {
                text.encode(&prompt, special).map_err(|_| ApiError::invalid("prompt", "the prompt cannot be tokenized"))
            };
            (generation, service.text_work(encode).await?, ignored)
        }
        None => {
            let fields = fields.into_rest();
            if !fields.contains_key("messages") {
                return Err(ApiError::missing("prompt"));
            }
            let mut chat = ChatRequest::read(fields, config.max_n, config.lenient, &mut body.values_left)?;
            let ignored = std::mem::take(&mut chat.ignored);
            let RenderedChat { prompt, generation, .. } = render_chat(&service, &record, chat).await?;
            (generation, prompt.ids, ignored)
        }
    };
    record.prompt_tokens(tokens.len());
    let tokens = service.text_work(move || Ok(Tokens::new(&generation, tokens, with_strings))).await?;
    let mut response = Json(tokens).into_response();
    warn(&mut response, &ignored);
    Ok(response)
}

impl Tokens {
    fn new(generation: &InUse, tokens: Vec<u32>, with_strings: bool) -> Self {
        let string = |&id: &u32| generation.text.token(id).unwrap_or_default();
        let token_strs = with_strings.then(|| tokens.iter().map(string).collect());
        Self { count: tokens.len(), max_model_len: generation.engine.spec().max_model_len, tokens, token_strs }
    }
}

/// The text of tokens, special ones included.
pub(super) async fn detokenize(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let config = service.config();
    let mut fields = Fields::new(extract::json(request, config).await?.object);
    let model = fields.string("model")?;
    let ids = fields.array("tokens")?;
    let ids = fields.required("tokens", ids)?;
    let ids = ids.iter().map(|id| token_id("tokens", id)).collect::<Result<Vec<_>, _>>()?;
    let ignored = refuse_rest(fields, config.lenient)?;
    let Pick { generation, .. } = service.pick(&record, model.as_deref())?;
    let text = generation.text.clone();
    let prompt = service.text_work(move || decode(&text, &ids)).await?;
    let mut response = Json(json!({"prompt": prompt})).into_response();
    warn(&mut response, &ignored);
    Ok(response)
}

fn decode(text: &TextModel, ids: &[u32]) -> Result<Value, ApiError> {
    let vocab = text.vocab_size();
    match ids.iter().all(|&id| (id as usize) < vocab) {
        true => Ok(text.decode(ids, false).into()),
        false => Err(ApiError::out_of_range("tokens", format!("token ids below {vocab}"))),
    }
}
