//! Clients that take nothing of what is sent to them.
//!
//! On a connection ([`Patient`]): bytes wait, and the socket takes none. The connection fails then, and everything of its
//! requests ends. On one stream of HTTP/2 ([`Watched`]): the client gives no credit for it, while others of the connection
//! may go on. The reply is dropped then, which ends its work, and the stream is reset when it is asked for more.
//! Whatever little the client takes begins the time anew; time in which there is nothing to send does not count.

use std::future::Future;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// A stream whose writes fail once the other side has taken nothing for so long.
pub(crate) struct Patient<S> {
    stream: S,
    limit: Duration,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    pub fn new(stream: S, limit: Duration) -> Self {
        Self { stream, limit, stalled: None }
    }

    fn judge(&mut self, cx: &mut Context, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let limit = self.limit;
        ready!(self.stalled.get_or_insert_with(|| Box::pin(sleep(limit))).as_mut().poll(cx));
        Poll::Ready(Err(ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context, buf: &mut ReadBuf) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.judge(cx, written)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context, bufs: &[IoSlice]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.judge(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A reply that is dropped once nobody has asked for its next part for so long.
pub(crate) struct Watched(Arc<Mutex<Reply>>);

struct Reply {
    /// `None` once it is dropped.
    body: Option<Body>,
    /// When a part was given that has not been followed by a question for the next.
    given: Option<Instant>,
}

impl Watched {
    pub fn new(body: Body, limit: Duration) -> Self {
        let reply = Arc::new(Mutex::new(Reply { body: Some(body), given: None }));
        tokio::spawn(watch(Arc::downgrade(&reply), limit));
        Self(reply)
    }
}

/// Looks at the reply now and then, so that giving a part costs no timer.
async fn watch(reply: Weak<Mutex<Reply>>, limit: Duration) {
    loop {
        sleep(limit / 4).await;
        let Some(reply) = reply.upgrade() else { return };
        let mut reply = reply.lock();
        if reply.given.is_some_and(|given| given.elapsed() >= limit) {
            let abandoned = reply.body.take();
            drop(reply);
            drop(abandoned);
            return;
        }
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut reply = self.0.lock();
        let Some(body) = &mut reply.body else {
            return Poll::Ready(Some(Err(axum::Error::new(io::Error::from(ErrorKind::TimedOut)))));
        };
        let part = Pin::new(body).poll_frame(cx);
        reply.given = part.is_ready().then(Instant::now);
        part
    }

    fn is_end_stream(&self) -> bool {
        self.0.lock().body.as_ref().is_some_and(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.lock().body.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::future::poll_fn;

    use super::*;

    /// Takes what it is told to: bytes, or nothing.
    struct Told(VecDeque<Option<usize>>);

    impl AsyncWrite for Told {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context, _: &[u8]) -> Poll<io::Result<usize>> {
            self.0.pop_front().expect("it was told").map_or(Poll::Pending, |bytes| Poll::Ready(Ok(bytes)))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_byte_begins_the_time_anew_and_a_flush_does_not() {
        let limit = Duration::from_secs(3600);
        let mut stream = Patient::new(Told([None, None, Some(1), None].into()), limit);
        let deadline = |stream: &Patient<Told>| stream.stalled.as_ref().map(|sleep| sleep.deadline());
        poll_fn(|cx| {
            assert!(Pin::new(&mut stream).poll_write(cx, b"ab").is_pending());
            let first = deadline(&stream);
            assert!(first.is_some() && Pin::new(&mut stream).poll_flush(cx).is_ready());
            assert!(Pin::new(&mut stream).poll_write(cx, b"ab").is_pending());
            assert_eq!(deadline(&stream), first);
            assert!(Pin::new(&mut stream).poll_write(cx, b"ab").is_ready());
            assert_eq!(deadline(&stream), None);
            assert!(Pin::new(&mut stream).poll_write(cx, b"b").is_pending());
            assert!(deadline(&stream) > first);
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn a_write_that_waits_fails_when_the_time_is_over() {
        let mut stream = Patient::new(Told(std::iter::repeat_n(None, 100).collect()), Duration::from_millis(5));
        let written = poll_fn(|cx| Pin::new(&mut stream).poll_write(cx, b"ab")).await;
        assert_eq!(written.unwrap_err().kind(), ErrorKind::TimedOut);
    }
}
