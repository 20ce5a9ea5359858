//! `/v1/batches`. Every batch is of the key that made it.

use axum::Json;
use axum::extract::{Extension, Path, Request, State};
use http::Uri;

use crate::batches::{self, BatchObject, NewBatch};
use crate::error::ApiError;
use crate::extract;
use crate::fields::Fields;
use crate::keys::Granted;
use crate::openai::list::{Page, Paging};
use crate::service::Service;

/// Batches on a page, and on the longest, as OpenAI has it.
const PAGE: usize = 20;
const LONGEST_PAGE: usize = 100;

pub(super) async fn create(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    request: Request,
) -> Result<Json<BatchObject>, ApiError> {
    service.store()?;
    let new = NewBatch::read(extract::json(request, service.config()).await?.object)?;
    batches::start(&service, granted.owner(), new).await.map(Json)
}

pub(super) async fn list(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    uri: Uri,
) -> Result<Json<Page<BatchObject>>, ApiError> {
    let mut fields = Fields::of_query(&uri)?;
    let paging = Paging::read(&mut fields, PAGE, LONGEST_PAGE)?;
    fields.finish()?;
    let all = service.store()?.batches().list(granted.owner());
    paging.page(all, |batch| &batch.id).map(Json)
}

pub(super) async fn one(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    Path(id): Path<String>,
) -> Result<Json<BatchObject>, ApiError> {
    service.store()?.batches().get(&id, granted.owner()).map(Json)
}

pub(super) async fn cancel(
    State(service): State<Service>,
    Extension(granted): Extension<Granted>,
    Path(id): Path<String>,
) -> Result<Json<BatchObject>, ApiError> {
    batches::cancel(&service, granted.owner(), id).await.map(Json)
}
