//! `/v1/responses`: made, looked at, cancelled, deleted.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Extension, Path, Request, State};
use axum::response::{IntoResponse, Response};
use http::Uri;
use serde_json::{Value, json};

use crate::access::AccessRecord;
use crate::dialect::word;
use crate::error::ApiError;
use crate::extract;
use crate::fields::Fields;
use crate::generate::{StartedChat, start_chat, stream};
use crate::keys::Granted;
use crate::openai::list::{Page, Paging};
use crate::openai::shared::Envelope;
use crate::responses::{Keeping, Record, ResponseFormat, ResponseRequest, Responses, run_in_background, their_name};
use crate::routes::warn;
use crate::service::Service;
use crate::store::Store;

pub(super) async fn create(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    Extension(granted): Extension<Granted>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrival = Instant::now();
    let config = service.config();
    let mut body = extract::json(request, config).await?;
    let mut fields = Fields::new(body.object).lenient(config.lenient);
    let store = config.store.as_ref().map(Store::responses);
    let keeping = Keeping::read(&mut fields, store.is_some())?;
    let history = match (store, &keeping.previous) {
        (Some(store), Some(previous)) => history(store, previous, &granted, config.body_limit_bytes).await?,
        _ => Vec::new(),
    };
    let request = ResponseRequest::read(fields, &history, keeping.background, config, &mut body.values_left)?;
    let ResponseRequest { mut chat, input, shown } = request;
    let ignored = std::mem::take(&mut chat.ignored);
    let streamed = chat.params.stream;
    let started = start_chat(&service, record, arrival, chat).await;
    // What is wrong only for this model, in the words of this dialect.
    let StartedChat { mut choices, generation, target } = started.map_err(|error| error.renamed(their_name))?;
    let envelope = Envelope::new("resp", &target, false);
    let mut format = ResponseFormat::new(envelope, generation, shown, &keeping);

    let owner = granted.owner();
    let record = Record { response: Value::Null, history, input };
    // A drain waits for what is to be kept.
    let ticket = service.in_flight().ticket();
    let mut response = match store.filter(|_| keeping.store) {
        Some(store) if keeping.background => {
            Json(run_in_background(store, owner, record, format, choices, ticket)).into_response()
        }
        store => {
            if let Some(store) = store.cloned() {
                format = format.keep(Box::new(move |response| {
                    store.put(owner, Record { response: response.clone(), ..record }, ticket);
                }));
            }
            match streamed {
                true => stream(choices, format, config.keep_alive).await?,
                false => Json(format.complete(&mut choices).await?).into_response(),
            }
        }
    };
    warn(&mut response, &ignored);
    Ok(response)
}

/// The conversation up to a response, which must be complete. It may be as long as a request that would hold all of it.
async fn history(
    store: &Arc<Responses>,
    previous: &str,
    granted: &Granted,
    max_bytes: usize,
) -> Result<Vec<Value>, ApiError> {
    let record = store.get(previous, granted.owner()).await?.ok_or_else(ApiError::previous_not_found)?;
    if !matches!(record.response["status"].as_str(), Some("completed" | "incomplete")) {
        return Err(ApiError::invalid("previous_response_id", "the previous response is not complete"));
    }
    let items = record.conversation();
    if items.iter().map(text_bytes).sum::<usize>() > max_bytes {
        let accepted = format!("of a response whose conversation has at most {max_bytes} bytes");
        return Err(ApiError::out_of_range("previous_response_id", accepted));
    }
    Ok(items)
}

/// Bytes of all strings in a value.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.iter().map(|(name, value)| name.len() + text_bytes(value)).sum(),
        _ => 1,
    }
}

fn not_found() -> ApiError {
    ApiError::stored_not_found("response")
}

/// The responses of the service, and the one of a path.
async fn find<'a>(service: &'a Service, granted: &Granted, id: &str) -> Result<(&'a Arc<Responses>, Record), ApiError> {
    let store = service.store()?.responses();
    let record = store.get(id, granted.owner()).await?;
    Ok((store, record.ok_or_else(not_found)?))
}

pub(super) async fn one(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    uri: Uri,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut query = Fields::of_query(&uri)?;
    if query.bool("stream")?.unwrap_or(false) {
        return Err(ApiError::unsupported("stream"));
    }
    refuse_rest(query)?;
    let (_, record) = find(&service, &granted, &id).await?;
    Ok(Json(record.response))
}

/// What may be included is there, or not at all; padding is not done.
fn refuse_rest(mut query: Fields) -> Result<(), ApiError> {
    for name in ["include", "include[]", "include_obfuscation"] {
        query.take(name);
    }
    query.finish()
}

pub(super) async fn delete(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    match service.store()?.responses().delete(&id, granted.owner()).await? {
        true => Ok(Json(json!({"id": id, "object": "response", "deleted": true}))),
        false => Err(not_found()),
    }
}

pub(super) async fn cancel(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let (store, record) = find(&service, &granted, &id).await?;
    if record.response["background"] != true {
        let message = "only responses that were made with background: true can be cancelled";
        return Err(ApiError::invalid("response_id", message));
    }
    let Some(running) = store.running(&id) else { return Ok(Json(record.response)) };
    running.cancel.cancel();
    running.ended.cancelled().await;
    let (_, record) = find(&service, &granted, &id).await?;
    Ok(Json(record.response))
}

/// Items of a page, and of the longest, as OpenAI has it.
const PAGE: usize = 20;
const LONGEST_PAGE: usize = 100;

/// The items that a response answers, those of the conversation before it included.
pub(super) async fn input_items(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    uri: Uri,
    Path(id): Path<String>,
) -> Result<Json<Page<Value>>, ApiError> {
    let mut query = Fields::of_query(&uri)?;
    let paging = Paging::read(&mut query, PAGE, LONGEST_PAGE)?;
    let ascending = word(&mut query, "order", &["desc", "asc"])? == Some("asc");
    refuse_rest(query)?;
    let (_, Record { history, input, .. }) = find(&service, &granted, &id).await?;
    let mut items = [history, input].concat();
    if !ascending {
        items.reverse();
    }
    static NO_ID: String = String::new();
    let page = paging.page(items, |item| if let Value::String(id) = &item["id"] { id } else { &NO_ID })?;
    Ok(Json(page))
}
