//! `/v1/responses`: made, looked at, cancelled, deleted.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, RawQuery, Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::access::AccessRecord;
use crate::auth::Granted;
use crate::error::ApiError;
use crate::extract;
use crate::fields::Fields;
use crate::generate::{StartedChat, start_chat, stream};
use crate::openai::shared::Envelope;
use crate::responses::{Keeping, Record, ResponseFormat, ResponseRequest, ResponseStore, run_in_background};
use crate::routes::warn;
use crate::service::Service;

type Id = Result<Path<String>, PathRejection>;

/// What is said of an id in a path.
const ID: &str = "response_id";

pub(super) async fn create(
    State(service): State<Service>,
    Extension(record): Extension<Arc<AccessRecord>>,
    Extension(granted): Extension<Granted>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrival = Instant::now();
    let config = service.config();
    let mut body = extract::json(request, config).await?;
    let mut fields = Fields::new(body.object);
    let store = config.responses.as_ref();
    let keeping = Keeping::read(&mut fields, store.is_some())?;
    let history = match (store, &keeping.previous) {
        (Some(store), Some(previous)) => history(store, previous, granted).await?,
        _ => Vec::new(),
    };
    let request = ResponseRequest::read(fields, &history, keeping.background, config, &mut body.values_left)?;
    let ResponseRequest { mut chat, input, shown } = request;
    let ignored = std::mem::take(&mut chat.ignored);
    let streamed = chat.params.stream;
    let StartedChat { mut choices, generation, target } = start_chat(&service, record, arrival, chat).await?;
    let envelope = Envelope::new("resp", &target, false);
    let mut format = ResponseFormat::new(envelope, generation, shown, &keeping);

    let record = Record { owner: granted.owner(), response: Value::Null, history, input };
    // A drain waits for what is to be kept.
    let ticket = service.in_flight().ticket();
    let mut response = match store.filter(|_| keeping.store) {
        Some(store) if keeping.background => {
            Json(run_in_background(store, record, format, choices, ticket)).into_response()
        }
        store => {
            if let Some(store) = store.cloned() {
                format = format.keep(Box::new(move |response| {
                    store.put(Record { response: response.clone(), ..record }, ticket);
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

/// The conversation up to a response, which must be complete.
async fn history(store: &Arc<ResponseStore>, previous: &str, granted: Granted) -> Result<Vec<Value>, ApiError> {
    let param = "previous_response_id";
    let record = store.get(previous, &granted.owner(), param).await?;
    match record.response["status"].as_str() {
        Some("completed" | "incomplete") => Ok(record.conversation()),
        _ => Err(ApiError::invalid(param, "the previous response is not complete")),
    }
}

fn store(service: &Service) -> Result<&Arc<ResponseStore>, ApiError> {
    let message = "no responses are kept here: the server was started without --state-dir";
    service.config().responses.as_ref().ok_or_else(|| ApiError::not_configured(message))
}

fn id(id: Id) -> Result<String, ApiError> {
    id.map(|Path(id)| id).map_err(|_| ApiError::response_not_found(ID))
}

pub(super) async fn one(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    RawQuery(query): RawQuery,
    path: Id,
) -> Result<Json<Value>, ApiError> {
    let store = store(&service)?;
    if value(query.as_deref(), "stream").is_some_and(|stream| stream != "false") {
        return Err(ApiError::unsupported("stream"));
    }
    let record = store.get(&id(path)?, &granted.owner(), ID).await?;
    Ok(Json(record.response))
}

pub(super) async fn delete(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    path: Id,
) -> Result<Json<Value>, ApiError> {
    let (store, id) = (store(&service)?, id(path)?);
    store.delete(&id, &granted.owner()).await?;
    Ok(Json(json!({"id": id, "object": "response", "deleted": true})))
}

pub(super) async fn cancel(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    path: Id,
) -> Result<Json<Value>, ApiError> {
    let (store, id) = (store(&service)?, id(path)?);
    let record = store.get(&id, &granted.owner(), ID).await?;
    if record.response["background"] != true {
        return Err(ApiError::invalid(ID, "only responses that were made with background: true can be cancelled"));
    }
    let Some(running) = store.running(&id) else { return Ok(Json(record.response)) };
    running.cancel.cancel();
    running.ended.cancelled().await;
    Ok(Json(store.get(&id, &granted.owner(), ID).await?.response))
}

/// Most items of a page, and how many it has if the request does not say.
const MAX_PAGE: usize = 100;
const PAGE: usize = 20;

/// The items that a response answers, those of the conversation before it included.
pub(super) async fn input_items(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    RawQuery(query): RawQuery,
    path: Id,
) -> Result<Json<Value>, ApiError> {
    let (store, id) = (store(&service)?, id(path)?);
    let query = query.as_deref();
    let limit = match value(query, "limit").map(str::parse) {
        None => PAGE,
        Some(Ok(limit)) if (1..=MAX_PAGE).contains(&limit) => limit,
        Some(_) => return Err(ApiError::out_of_range("limit", format!("between 1 and {MAX_PAGE}"))),
    };
    let ascending = match value(query, "order") {
        None | Some("desc") => false,
        Some("asc") => true,
        Some(_) => return Err(ApiError::out_of_range("order", "asc or desc")),
    };
    let Record { history, input, .. } = store.get(&id, &granted.owner(), ID).await?;
    let mut items = [history, input].concat();
    if !ascending {
        items.reverse();
    }
    let start = match value(query, "after") {
        None => 0,
        Some(after) => {
            let at = items.iter().position(|item| item["id"] == after);
            at.ok_or_else(|| ApiError::out_of_range("after", "the id of an item"))? + 1
        }
    };
    let page: Vec<_> = items[start..].iter().take(limit).collect();
    let end = |item: Option<&&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    let (first, last, has_more) = (end(page.first()), end(page.last()), start + page.len() < items.len());
    Ok(Json(json!({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": has_more})))
}

/// A field of a query. None of ours needs escapes.
fn value<'a>(query: Option<&'a str>, name: &str) -> Option<&'a str> {
    let pairs = query?.split('&').filter_map(|pair| pair.split_once('='));
    pairs.into_iter().find(|(given, _)| *given == name).map(|(_, value)| value)
}
