//! The accept loop and the drain.
//!
//! Our own loop on hyper, because axum's keeps a half-sent head open for ever. HTTP/1.1 always; HTTP/2 if it is switched on,
//! agreed on by TLS or begun by a client that knows. On shutdown the listener stays open
//! while replies are under way, so that probes and new requests are told about it, and streams may end.

use std::convert::Infallible;
use std::future::{Future, pending};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::admission::{Counter, GuardedBody, Raised};
use crate::auth::OnLoopback;
use crate::batches;
use crate::places::{Arriving, Place};
use crate::routes::{Surface, router};
use crate::seldom::Seldom;
use crate::service::{ConnectionLimits, Service};
use crate::stall::{Patient, Watched};
use crate::tls::Tls;
use crate::usage;

const MAX_HEADERS: usize = 100;
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Bytes that wait on a connection of HTTP/1.1 to be sent or parsed; of an event stream also no more than 16 events.
const MAX_BUFFERED_BYTES: usize = 2 * MAX_HEAD_BYTES;

/// Requests under way on one connection of HTTP/2, and requests that it gave up before they were taken or by breaking
/// the rules: a client that has more of those is cut off.
const MAX_STREAMS: u32 = 128;
const MAX_RESETS: usize = 20;
/// Bytes of one reply that wait for a slow client of HTTP/2.
const SEND_BUFFER_BYTES: usize = 64 << 10;
/// How often a client of HTTP/2 is asked whether it is there, and how long it may take to say so.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// The first bytes of a connection of HTTP/2.
const HTTP2_BEGIN: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Pause after a look at such a beginning that is not whole, the first time; it doubles.
const PEEK_PAUSE: Duration = Duration::from_millis(5);

/// Connections at most, or half of those that there may be, that were accepted and not looked at yet. Without a bound those who
/// come in a flood would take the places of others whose request has arrived and was not read yet.
const MOST_UNREAD: usize = 64;

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
    let config = service.config();
    let close = CancellationToken::new();
    let terms = Terms {
        app: router(service.clone(), surface),
        on_loopback,
        tls: config.tls.clone(),
        http2: config.http2,
        limits: config.connection_limits.clone(),
        close: close.clone(),
    };
    let connections = Counter::default();
    batches::resume(&service);
    tokio::spawn(usage::keep(service.clone()));
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
    let (mut too_many, mut not_accepted) = (Seldom::default(), Seldom::default());
    let unread = Arc::new(Semaphore::new((terms.limits.connections / 2).clamp(1, MOST_UNREAD)));
    loop {
        let next = async {
            let unread = unread.clone().acquire_owned().await.expect("it is never closed");
            (unread, listener.accept().await)
        };
        let (unread, accepted) = tokio::select! {
            next = next => next,
            () = &mut drained => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let (place, full) = service.places().take();
                if full {
                    let closed = if place.is_some() { "idle" } else { "limit" };
                    service.metrics().refused_connections.with_label_values(&[closed]).inc();
                    if let Some(times) = too_many.one_more(Instant::now()) {
                        let limit = terms.limits.connections;
                        tracing::warn!(
                            limit,
                            times,
                            "there are too many connections: one is closed, an idle one if there is any"
                        );
                    }
                }
                let Some(place) = place.map(Arc::new) else { continue };
                let ticket = (connections.ticket(), Raised::new(&service.metrics().connections));
                let close = terms.close.child_token();
                let connection = connection(stream, Terms { close: close.clone(), ..terms.clone() }, place.clone());
                tokio::spawn(async move {
                    let mut connection = pin!(connection);
                    // What has arrived is known when the system was asked, which is when whoever yields goes on.
                    tokio::select! {
                        biased;
                        () = connection.as_mut() => return,
                        () = yield_now() => drop(unread),
                    }
                    tokio::select! {
                        biased;
                        () = place.evicted() => {
                            close.cancel();
                            // The end of a reply may be on its way to a slow reader.
                            let _ = timeout(LAST_WORDS, connection).await;
                        }
                        () = connection.as_mut() => {}
                    }
                    drop(ticket);
                });
            }
            Err(error) if is_of_the_connection(&error) => {}
            Err(error) => {
                service.metrics().refused_connections.with_label_values(&["system"]).inc();
                if let Some(times) = not_accepted.one_more(Instant::now()) {
                    tracing::warn!(%error, times, "connections are not accepted");
                }
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    close.cancel();
    let stopped = async {
        if let Ok(store) = service.store() {
            store.batches().stopped().await;
        }
    };
    let _ = timeout(2 * LAST_WORDS, async { tokio::join!(connections.idle(), stopped) }).await;
    // A disk that does not answer is not waited for either.
    let _ = timeout(5 * LAST_WORDS, usage::save(&service)).await;
    Ok(())
}

/// Whether only the connection that was being accepted has failed.
fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// What every connection of a listener is given.
#[derive(Clone)]
struct Terms {
    app: Router,
    on_loopback: OnLoopback,
    tls: Option<Tls>,
    /// HTTP/2 may be spoken.
    http2: bool,
    limits: ConnectionLimits,
    /// Cancelled when connections are to end.
    close: CancellationToken,
}

async fn connection(stream: TcpStream, terms: Terms, place: Arc<Place>) {
    // A token is a small packet that must not wait for the next.
    let _ = stream.set_nodelay(true);
    let ConnectionLimits { head_timeout, stall_timeout, .. } = terms.limits;
    match &terms.tls {
        Some(tls) => {
            let accepting = tls.accept(Patient::new(stream, stall_timeout), terms.http2);
            match timeout(head_timeout, accepting).await {
                Ok(Ok((stream, http2))) => talk(stream, http2, terms, place).await,
                Ok(Err(error)) => tracing::debug!(%error, "a handshake failed"),
                Err(_) => {}
            }
        }
        None if terms.http2 => {
            if let Ok(Ok(http2)) = timeout(head_timeout, begins_as_http2(&stream)).await {
                talk(Patient::new(stream, stall_timeout), http2, terms, place).await;
            }
        }
        None => talk(Patient::new(stream, stall_timeout), false, terms, place).await,
    }
}

/// Whether a client that was told nothing speaks HTTP/2: it begins as no request of HTTP/1.1 can.
async fn begins_as_http2(stream: &TcpStream) -> io::Result<bool> {
    let (mut begin, mut pause) = ([0; HTTP2_BEGIN.len()], PEEK_PAUSE);
    loop {
        let seen = stream.peek(&mut begin).await?;
        if seen == 0 || !HTTP2_BEGIN.starts_with(&begin[..seen]) {
            return Ok(false);
        }
        if seen == begin.len() {
            return Ok(true);
        }
        // What has been seen stays readable: there is nothing to be woken by.
        sleep(pause).await;
        pause *= 2;
    }
}

async fn talk(stream: impl AsyncRead + AsyncWrite + Unpin, http2: bool, terms: Terms, place: Arc<Place>) {
    let Terms { app, on_loopback, close, limits, .. } = terms;
    let ConnectionLimits { head_timeout, stall_timeout, .. } = limits;
    let under_way = Counter::default();
    let requests = under_way.clone();
    let answer = service_fn(move |request: Request<Incoming>| {
        let progress = place.request();
        let mut request = request.map(|body| Body::new(Arriving::new(Body::new(body), progress.clone())));
        request.extensions_mut().insert(on_loopback);
        let (app, guard) = (app.clone(), (requests.ticket(), progress));
        async move {
            let mut response = app.oneshot(request).await.unwrap_or_else(|never| match never {});
            if http2 {
                response = response.map(|body| Body::new(Watched::new(body, stall_timeout)));
            }
            Ok::<_, Infallible>(response.map(|body| GuardedBody::new(body, guard)))
        }
    });
    let stream = TokioIo::new(stream);
    let ended = if http2 {
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEAD_BYTES as u32)
            .max_pending_accept_reset_streams(MAX_RESETS)
            .max_local_error_reset_streams(MAX_RESETS)
            .max_send_buf_size(SEND_BUFFER_BYTES)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .serve_connection(stream, answer);
        drive(connection, http2::Connection::graceful_shutdown, Some((&under_way, head_timeout)), close).await
    } else {
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(head_timeout)
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEAD_BYTES)
            .max_buf_size(MAX_BUFFERED_BYTES)
            .serve_connection(stream, answer);
        drive(connection, http1::Connection::graceful_shutdown, None, close).await
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Lets a connection run. Once it is idle or is to close it takes no new requests; what it has taken goes on until the
/// connection is to close, and a little longer. Only a connection whose requests are counted is ever found idle.
async fn drive<C: Future<Output = hyper::Result<()>>>(
    connection: C,
    take_no_more: impl Fn(Pin<&mut C>),
    under_way: Option<(&Counter, Duration)>,
    close: CancellationToken,
) -> hyper::Result<()> {
    let idle_for = async |limit: Option<Duration>| match under_way {
        Some((under_way, patience)) => under_way.idle_for(limit.unwrap_or(patience)).await,
        None => pending().await,
    };
    let mut connection = pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = idle_for(None) => {}
        () = close.cancelled() => {}
    }
    take_no_more(connection.as_mut());
    let last_words = async {
        close.cancelled().await;
        sleep(LAST_WORDS).await;
    };
    tokio::select! {
        ended = connection => ended,
        // A client that has not even begun to speak does not say good-bye.
        () = idle_for(Some(LAST_WORDS)) => Ok(()),
        () = last_words => Ok(()),
    }
}
