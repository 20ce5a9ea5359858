//! The accept loop and the drain.
//!
//! Our own loop on hyper, because axum's keeps a half-sent head open for ever. On shutdown the listener stays open
//! while replies are under way, so that probes and new requests are told about it, and streams may end.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::admission::Counter;
use crate::auth::OnLoopback;
use crate::routes::{Surface, router};
use crate::service::Service;

/// How long a request's head may take to arrive, idle time of the connection before it included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_HEADERS: usize = 100;
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Pause after the system refused a connection for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// At the end of a drain: how long error frames may take to be sent, and how long connections may take to close.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Serves until `shutdown`, then drains: not ready and refusing at once, it lets replies under way finish for at most
/// `drain_timeout`, ends the rest with an error, and returns.
///
/// # Errors
/// If the listener has no address any more.
pub async fn serve(
    listener: TcpListener,
    service: Service,
    surface: Surface,
    shutdown: CancellationToken,
    drain_timeout: Duration,
) -> io::Result<()> {
    let on_loopback = OnLoopback(listener.local_addr()?.ip().is_loopback());
    let app = router(service.clone(), surface);
    let connections = Counter::default();
    let close = CancellationToken::new();
    let drained = async {
        shutdown.cancelled().await;
        service.drain();
        if timeout(drain_timeout, service.in_flight().idle()).await.is_err() {
            service.kill_switch().cancel();
            // A client that does not read its error frame is not waited for.
            let _ = timeout(LAST_WORDS, service.in_flight().idle()).await;
        }
    };
    let mut drained = pin!(drained);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut drained => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let ticket = connections.ticket();
                let connection = connection(stream, app.clone(), on_loopback, close.clone());
                tokio::spawn(async move {
                    connection.await;
                    drop(ticket);
                });
            }
            Err(error) if is_of_the_connection(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    close.cancel();
    let _ = timeout(2 * LAST_WORDS, connections.idle()).await;
    Ok(())
}

/// Whether only the connection that was being accepted has failed.
fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

async fn connection(stream: TcpStream, app: Router, on_loopback: OnLoopback, close: CancellationToken) {
    // A token is a small packet that must not wait for the next.
    let _ = stream.set_nodelay(true);
    let answer = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(on_loopback);
        let app = app.clone();
        async move { Ok::<_, Infallible>(app.oneshot(request).await.unwrap_or_else(|never| match never {})) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = close.cancelled() => {
            connection.as_mut().graceful_shutdown();
            timeout(LAST_WORDS, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}
