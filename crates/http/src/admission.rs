//! Who may enter, and who is still inside.
//!
//! An inference request holds a [`Ticket`] from its head to the last byte of its reply: the ticket rides in the
//! response body. So a drain that waits for all tickets waits for every stream.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::body::{Frame, SizeHint};
use prometheus::IntGauge;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::access::AccessRecord;
use crate::error::ApiError;
use crate::service::Service;

/// Counts what is under way.
#[derive(Debug, Default, Clone)]
pub(crate) struct Counter(watch::Sender<usize>);

/// One thing that is under way, until dropped.
#[derive(Debug)]
pub(crate) struct Ticket(watch::Sender<usize>);

impl Counter {
    /// One more.
    pub fn ticket(&self) -> Ticket {
        self.0.send_modify(|count| *count += 1);
        Ticket(self.0.clone())
    }

    /// How much is under way.
    pub fn count(&self) -> usize {
        *self.0.borrow()
    }

    /// Waits until nothing is under way.
    pub async fn idle(&self) {
        // The sender lives in `self`, so this cannot fail.
        let _ = self.0.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Waits until nothing has been under way for so long.
    pub async fn idle_for(&self, limit: Duration) {
        let mut changes = self.0.subscribe();
        loop {
            // The sender lives in `self`, so neither can fail; what comes and goes in between is a change too.
            let _ = changes.wait_for(|count| *count == 0).await;
            if timeout(limit, changes.changed()).await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// A gauge that is one higher while this lives.
pub(crate) struct Raised(IntGauge);

impl Raised {
    /// Raises it.
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The layer on inference routes.
pub(crate) async fn layer(State(service): State<Service>, request: Request, next: Next) -> Response {
    // The ticket first: a drain that begins after the check then waits for it.
    let ticket = service.in_flight().ticket();
    let record = request.extensions().get::<Arc<AccessRecord>>().cloned();
    let (mut response, raised) = match service.takes_requests() {
        Ok(()) => {
            let raised = Raised::new(&service.metrics().in_flight);
            (next.run(request).await, Some(raised))
        }
        Err(error) => (error.into_response(), None),
    };
    if let Some(record) = record {
        if let Some(error) = response.extensions().get::<ApiError>() {
            record.refused(error);
        }
        response.headers_mut().extend(service.limit_headers(&record));
    }
    response.map(|body| Body::new(GuardedBody::new(body, (raised, ticket))))
}

/// A body with something that is dropped together with it.
pub(crate) struct GuardedBody<G> {
    body: Body,
    _guard: G,
}

impl<G> GuardedBody<G> {
    /// `body`, holding `guard`.
    pub fn new(body: Body, guard: G) -> Self {
        Self { body, _guard: guard }
    }
}

impl<G: Unpin> HttpBody for GuardedBody<G> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
