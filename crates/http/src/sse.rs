//! Server-sent events: the body of a streamed reply.
//!
//! Pulled by the connection, so that a slow reader holds up nobody and nothing piles up here: each pull yields one
//! event. Ends with `[DONE]` if and only if all choices have ended well; an error is an event of its own, and then
//! the stream closes without `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::HttpBody;
use bytes::Bytes;
use http::HeaderName;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use hyper::body::Frame;
use tokio::time::{Instant, Sleep, sleep};

use crate::error::ApiError;
use crate::generate::{Choices, Event};
use crate::openai::shared::{Format, Piece};

/// Headers of every event stream. The last keeps nginx from buffering it.
pub(crate) const HEADERS: [(HeaderName, &str); 3] = [
    (CONTENT_TYPE, "text/event-stream"),
    (CACHE_CONTROL, "no-cache"),
    (HeaderName::from_static("x-accel-buffering"), "no"),
];

/// The body of a streamed reply.
pub(crate) struct EventStream<F> {
    choices: Choices,
    format: F,
    include_usage: bool,
    frames: VecDeque<Bytes>,
    ended: bool,
    keep_alive: Duration,
    /// When a comment is due, if nothing else is sent before.
    silence: Pin<Box<Sleep>>,
}

impl<F: Format> EventStream<F> {
    /// A stream that begins with the choices in order, then `first`.
    pub fn new(choices: Choices, format: F, first: Option<Event>, include_usage: bool, keep_alive: Duration) -> Self {
        let silence = Box::pin(sleep(keep_alive));
        let (frames, ended) = (VecDeque::new(), false);
        let mut stream = Self { choices, format, include_usage, frames, ended, keep_alive, silence };
        for index in 0..stream.choices.len() {
            stream.write(&Piece::Open { index });
        }
        if let Some(event) = first {
            stream.event(&event);
        }
        stream
    }

    fn event(&mut self, event: &Event) {
        self.write(&match event {
            Event::Text { index, delta } => {
                Piece::Text { index: *index, segment: &delta.segment, scores: &delta.scores }
            }
            Event::Finish { index, reason, scores } => Piece::Finish { index: *index, reason: *reason, scores },
        });
    }

    fn write(&mut self, piece: &Piece) {
        let mut json = Vec::with_capacity(256);
        self.format.chunk(&mut json, piece);
        if !json.is_empty() {
            self.frames.push_back(frame(&json));
        }
    }

    fn end(&mut self, outcome: Result<(), ApiError>) {
        self.ended = true;
        match outcome {
            Ok(()) => {
                if self.include_usage {
                    self.write(&Piece::Usage(&self.choices.usage()));
                }
                self.frames.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
            }
            Err(error) => self.frames.push_back(frame(&error.to_json())),
        }
    }
}

fn frame(json: &[u8]) -> Bytes {
    [b"data: ", json, b"\n\n"].concat().into()
}

impl<F: Format> HttpBody for EventStream<F> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        while this.frames.is_empty() && !this.ended {
            match this.choices.poll_next(cx) {
                Poll::Ready(Some(Ok(event))) => this.event(&event),
                Poll::Ready(Some(Err(error))) => this.end(Err(error)),
                Poll::Ready(None) => this.end(Ok(())),
                Poll::Pending => {
                    std::task::ready!(this.silence.as_mut().poll(cx));
                    this.frames.push_back(Bytes::from_static(b": keep-alive\n\n"));
                }
            }
        }
        let next = this.frames.pop_front();
        if next.is_some() {
            this.silence.as_mut().reset(Instant::now() + this.keep_alive);
        }
        Poll::Ready(next.map(|bytes| Ok(Frame::data(bytes))))
    }
}
