//! Answering a batch, from its check to its last result.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::auth::OnBehalfOf;
use crate::batches::batch::{BatchError, BatchObject, Counts, NewBatch, Status};
use crate::batches::input::{Line, Lines, check};
use crate::batches::results::{Outcome, Results};
use crate::batches::{Batches, Entry, LINES_AT_ONCE};
use crate::error::ApiError;
use crate::files::{Files, now};
use crate::json;
use crate::keys::Owner;
use crate::routes::{Surface, router};
use crate::service::Service;

/// How long a line waits that the service has no room for now: twice as long each time, up to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Begins a batch.
pub(crate) async fn start(service: &Service, owner: Owner, new: NewBatch) -> Result<BatchObject, ApiError> {
    let (files, batches) = (service.store()?.files().clone(), service.store()?.batches().clone());
    files.get(&new.input_file_id, owner).map_err(|_| {
        ApiError::invalid("input_file_id", "input_file_id must be the id of a file of this key, uploaded for batches")
    })?;
    batches.check_count(owner)?;
    let id = batches.folder.new_id();
    let batch = new.batch(files.new_id(), files.new_id());
    let object = batch.object(&id);
    let entry = Entry { owner, batch, cancel: CancellationToken::new() };
    let added = (id.clone(), entry.clone());
    service.disk_work(move || batches.add(added.0, added.1)).await?;
    spawn(service, id, entry);
    Ok(object)
}

/// Cancels a batch: what has been answered stays.
pub(crate) async fn cancel(service: &Service, owner: Owner, id: String) -> Result<BatchObject, ApiError> {
    let batches = service.store()?.batches().clone();
    if batches.get(&id, owner)?.status.is_final() {
        return Err(ApiError::conflict("the batch has ended"));
    }
    service
        .disk_work(move || {
            batches.change(&id, |batch| {
                if !batch.status.is_final() {
                    batch.enter(Status::Cancelling);
                }
            })?;
            let all = batches.all.lock();
            if let Some(entry) = all.get(&id) {
                entry.cancel.cancel();
            }
            Ok(all.get(&id).map(|entry| entry.batch.object(&id)))
        })
        .await?
        .ok_or_else(|| ApiError::stored_not_found("batch"))
}

/// Goes on with all batches that a process before this one began.
pub(crate) fn resume(service: &Service) {
    let Ok(store) = service.store() else { return };
    let batches = store.batches();
    if std::mem::replace(&mut *batches.resumed.lock(), true) {
        return;
    }
    let open: Vec<_> = {
        let all = batches.all.lock();
        let open = all.iter().filter(|(_, entry)| !entry.batch.status.is_final());
        open.map(|(id, entry)| (id.clone(), entry.clone())).collect()
    };
    for (id, entry) in open {
        tracing::info!(batch = id, "a batch goes on");
        if entry.batch.status == Status::Cancelling {
            entry.cancel.cancel();
        }
        spawn(service, id, entry);
    }
}

fn spawn(service: &Service, id: String, entry: Entry) {
    let Ok(store) = service.store() else { return };
    let (files, batches) = (store.files().clone(), store.batches().clone());
    let ticket = batches.running.ticket();
    let run = Run { service: service.clone(), files, batches, id, entry };
    tokio::spawn(async move {
        if let Err(error) = run.go().await {
            run.fail(&error).await;
        }
        drop(ticket);
    });
}

/// One batch under way.
struct Run {
    service: Service,
    files: Arc<Files>,
    batches: Arc<Batches>,
    id: String,
    entry: Entry,
}

/// Why no more lines are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Complete,
    Cancelled,
    Expired,
    /// The process ends, and the next one goes on.
    Drained,
}

impl End {
    /// The state that it ends in, and what is said of the lines that were not answered.
    fn closes(self) -> Option<(Status, &'static str, &'static str)> {
        match self {
            Self::Complete => Some((Status::Completed, "", "")),
            Self::Cancelled => Some((Status::Cancelled, "batch_cancelled", "the batch was cancelled before this line")),
            Self::Expired => {
                let message = "this request could not be executed before the completion window expired";
                Some((Status::Expired, "batch_expired", message))
            }
            Self::Drained => None,
        }
    }
}

impl Run {
    /// Runs until the batch has ended, or the service drains.
    async fn go(&self) -> io::Result<()> {
        let mut total = self.entry.batch.counts.total;
        if self.entry.batch.status == Status::Validating {
            match self.check().await? {
                None => return Ok(()),
                Some(Ok(lines)) => total = lines,
                Some(Err(errors)) => {
                    return self
                        .change(|batch| {
                            batch.errors = errors;
                            batch.enter(Status::Failed);
                        })
                        .await;
                }
            }
            self.change(move |batch| {
                batch.counts.total = total;
                if batch.status == Status::Validating {
                    batch.enter(Status::InProgress);
                }
            })
            .await?;
        }
        let (files, batch) = (self.files.clone(), self.entry.batch.clone());
        let results = blocking(move || Results::open(files, &batch)).await?;
        self.show(&results, total);
        let results = Arc::new(Mutex::new(results));
        let end = self.answer(&results, total).await?;
        let Some((status, code, message)) = end.closes() else { return Ok(()) };
        if end == End::Complete {
            self.change(|batch| batch.enter(Status::Finalizing)).await?;
        }
        let (lines, endpoint) = (self.lines()?, self.entry.batch.endpoint.clone());
        let (id, batch, owner) = (self.id.clone(), self.entry.batch.clone(), self.entry.owner);
        let counts = blocking(move || {
            let mut results = results.lock();
            close(&mut results, lines, &endpoint, code, message)?;
            results.publish(&id, &batch, owner)?;
            Ok(results.counts(total))
        })
        .await?;
        tracing::info!(batch = self.id, ?status, counts.completed, counts.failed, "a batch has ended");
        self.change(move |batch| {
            batch.counts = counts;
            batch.enter(status);
        })
        .await
    }

    fn lines(&self) -> io::Result<Lines> {
        let file = self.files.open_data(&self.entry.batch.input_file_id)?;
        Ok(Lines::new(file, self.service.config().body_limit_bytes))
    }

    /// How many lines there are, or what is wrong with them; `None` if the service drains before that is known.
    async fn check(&self) -> io::Result<Option<Result<u64, Vec<BatchError>>>> {
        let check = async {
            let _turn = self.batches.checking.acquire().await.map_err(io::Error::other)?;
            let (lines, endpoint) = (self.lines()?, self.entry.batch.endpoint.clone());
            blocking(move || check(lines, &endpoint)).await
        };
        tokio::select! {
            () = self.service.draining().cancelled() => Ok(None),
            checked = check => checked.map(Some),
        }
    }

    /// Answers the lines that have no result.
    async fn answer(&self, results: &Arc<Mutex<Results>>, total: u64) -> io::Result<End> {
        let router = router(self.service.clone(), Surface::WithoutAdmin);
        let endpoint: Arc<str> = self.entry.batch.endpoint.as_str().into();
        let expires = sleep(Duration::from_secs(self.entry.batch.expires_at.saturating_sub(now())));
        let mut expires = std::pin::pin!(expires);
        let mut lines = Some(self.lines()?);
        // Dropped, it ends what it answers.
        let mut running = JoinSet::new();
        loop {
            if lines.is_none() && running.is_empty() {
                return Ok(End::Complete);
            }
            tokio::select! {
                biased;
                () = self.service.draining().cancelled() => return Ok(End::Drained),
                () = self.entry.cancel.cancelled() => return Ok(End::Cancelled),
                () = &mut expires => return Ok(End::Expired),
                Some(answered) = running.join_next() => {
                    let (custom_id, outcome): (String, Outcome) = answered.map_err(io::Error::other)?;
                    let to = results.clone();
                    blocking(move || to.lock().add(&custom_id, outcome)).await?;
                    self.show(&results.lock(), total);
                }
                permit = self.batches.lines.clone().acquire_owned(), if lines.is_some() && running.len() < LINES_AT_ONCE => {
                    let permit = permit.map_err(io::Error::other)?;
                    let (mut rest, known) = (lines.take().expect("checked"), results.clone());
                    let (endpoint, path) = (endpoint.clone(), endpoint.clone());
                    let (rest, line) = blocking(move || {
                        let known = known.lock();
                        while let Some(line) = rest.next_request(&endpoint)? {
                            if !known.has(&line.custom_id) {
                                return Ok((rest, Some(line)));
                            }
                        }
                        Ok((rest, None))
                    }).await?;
                    if let Some(line) = line {
                        lines = Some(rest);
                        let asides = self.batches.asides.clone();
                        running.spawn(ask(router.clone(), self.entry.owner, path, line, permit, asides));
                    }
                }
            }
        }
    }

    /// Shows how far it is.
    fn show(&self, results: &Results, total: u64) {
        if let Some(entry) = self.batches.all.lock().get_mut(&self.id) {
            entry.batch.counts = results.counts(total);
        }
    }

    async fn change(&self, change: impl FnOnce(&mut super::Batch) + Send + 'static) -> io::Result<()> {
        let (batches, id) = (self.batches.clone(), self.id.clone());
        blocking(move || batches.change(&id, change)).await
    }

    /// The batch cannot go on.
    async fn fail(&self, error: &io::Error) {
        tracing::error!(batch = self.id, %error, "a batch has failed");
        let (code, message) = match error.kind() {
            io::ErrorKind::QuotaExceeded => ("storage_full", "there is no room for more results"),
            io::ErrorKind::NotFound => ("input_gone", "the input file is gone"),
            _ => ("storage_error", "the server could not read or write the files of the batch"),
        };
        let error = BatchError { code: code.into(), message: message.into(), param: None, line: None };
        // What was answered can be had all the same, if the disk still gives it.
        let (files, id, batch, owner) =
            (self.files.clone(), self.id.clone(), self.entry.batch.clone(), self.entry.owner);
        let counts = blocking(move || {
            let results = Results::open(files, &batch)?;
            results.publish(&id, &batch, owner)?;
            Ok(results.counts(0))
        });
        let counts = counts.await.unwrap_or_default();
        let failed = self.change(move |batch| {
            batch.counts = Counts { total: batch.counts.total, ..counts };
            batch.errors = vec![error];
            batch.enter(Status::Failed);
        });
        if let Err(error) = failed.await {
            tracing::error!(batch = self.id, %error, "that a batch has failed cannot be written");
        }
    }
}

/// Gives every line without a result one that says why.
fn close(
    results: &mut Results,
    mut lines: Lines,
    endpoint: &str,
    code: &'static str,
    message: &'static str,
) -> io::Result<()> {
    while let Some(line) = lines.next_request(endpoint)? {
        if !results.has(&line.custom_id) {
            results.add(&line.custom_id, Outcome::Unanswered { code, message })?;
        }
    }
    Ok(())
}

/// Sends a line through the routes, again for as long as there is no room for it.
async fn ask(
    router: Router,
    owner: Owner,
    path: Arc<str>,
    line: Line,
    mut permit: OwnedSemaphorePermit,
    asides: Arc<Semaphore>,
) -> (String, Outcome) {
    let Line { custom_id, body } = line;
    let mut refused =
        ["stream", "background"].into_iter().filter(|name| body.get(*name).is_some_and(|value| value == true));
    let refused = refused.next().map(|name| ApiError::invalid(name, format!("{name} cannot be true in a batch")));
    let body = Bytes::from(json::write(&body));
    let mut pause = FIRST_PAUSE;
    loop {
        let response = match &refused {
            Some(error) => axum::response::IntoResponse::into_response(error.clone()),
            None => {
                let mut request = Request::post(&*path).body(Body::from(body.clone())).expect("a path of ours");
                request.extensions_mut().insert(OnBehalfOf(owner));
                router.clone().oneshot(request).await.unwrap_or_else(|never| match never {})
            }
        };
        let status = response.status();
        if let Some(wait) = response.extensions().get::<ApiError>().and_then(ApiError::retry_after) {
            let wait = wait.max(pause).min(LONGEST_PAUSE);
            // Others' lines need not wait until this one's key has room, or the engine; but each holds its body, so only so
            // many step aside.
            if let Ok(aside) = asides.clone().try_acquire_owned() {
                let permits = permit.semaphore().clone();
                drop(permit);
                sleep(wait).await;
                permit = permits.acquire_owned().await.expect("it is never closed");
                drop(aside);
            } else {
                sleep(wait).await;
            }
            pause = (2 * pause).min(LONGEST_PAUSE);
            continue;
        }
        let request_id = response.headers().get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
        let request_id = request_id.to_owned();
        let outcome = match response.into_body().collect().await {
            Ok(body) => Outcome::Reply { status: status.as_u16(), request_id, body: body.to_bytes() },
            Err(_) => Outcome::Unanswered { code: "reply_lost", message: "the reply could not be read" },
        };
        return (custom_id, outcome);
    }
}

/// Runs work on the disk off the threads that serve.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}
