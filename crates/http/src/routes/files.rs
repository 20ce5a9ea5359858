//! `/v1/files`: what batches read and leave. Every file is of the key that made it.

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Path, Request, State};
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use http::{HeaderValue, Uri};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::files::{Download, FileObject, receive};
use crate::keys::Granted;
use crate::openai::list::{Page, Paging};
use crate::service::Service;

/// Files on a page, as OpenAI has it.
const PAGE: usize = 10_000;

pub(super) async fn upload(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    request: Request,
) -> Result<Json<FileObject>, ApiError> {
    receive(&service, granted.owner(), request).await.map(Json)
}

pub(super) async fn list(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    uri: Uri,
) -> Result<Json<Page<FileObject>>, ApiError> {
    let mut fields = Fields::of_query(&uri)?;
    let paging = Paging::read(&mut fields, PAGE, PAGE)?;
    let (purpose, order) = (fields.string("purpose")?, fields.string("order")?);
    fields.finish()?;
    let mut files = service.store()?.files().list(granted.owner(), purpose.as_deref());
    match order.as_deref() {
        None | Some("desc") => {}
        Some("asc") => files.reverse(),
        Some(_) => return Err(ApiError::out_of_range("order", "asc or desc")),
    }
    paging.page(files, |file| &file.id).map(Json)
}

pub(super) async fn one(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    Path(id): Path<String>,
) -> Result<Json<FileObject>, ApiError> {
    service.store()?.files().get(&id, granted.owner()).map(Json)
}

pub(super) async fn delete(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let store = service.store()?;
    let files = store.files().clone();
    files.get(&id, granted.owner())?;
    if store.batches().uses(&id) {
        return Err(ApiError::conflict("a batch that has not ended uses the file; wait for it or cancel it"));
    }
    let reply = json!({"id": id, "object": "file", "deleted": true});
    service.disk_work(move || files.remove(&id)).await?;
    Ok(Json(reply))
}

pub(super) async fn content(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let files = service.store()?.files().clone();
    let bytes = files.get(&id, granted.owner())?.bytes;
    let file = service.disk_work(move || files.open_data(&id)).await?;
    // What a client has uploaded is never a page of ours.
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (CONTENT_DISPOSITION, HeaderValue::from_static("attachment")),
    ];
    Ok((headers, Body::new(Download::new(file, bytes))).into_response())
}
