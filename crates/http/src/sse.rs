//! Server-sent events: the body of a streamed reply.
//!
//! Pulled by the connection, so that a slow reader holds up nobody and nothing piles up here: each pull yields one
//! event. What an event says is the format's business; each says in its own way whether a stream has ended well.

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
use serde::Serialize;
use tokio::time::{Instant, Sleep, sleep};

use crate::error::ApiError;
use crate::generate::{Choices, Event};
use crate::openai::shared::{Format, Piece, Usage};

/// Headers of every event stream. The last keeps nginx from buffering it.
pub(crate) const HEADERS: [(HeaderName, &str); 3] = [
    (CONTENT_TYPE, "text/event-stream"),
    (CACHE_CONTROL, "no-cache"),
    (HeaderName::from_static("x-accel-buffering"), "no"),
];

/// Events that wait to be sent, one to a frame.
#[derive(Default)]
pub(crate) struct Events(VecDeque<Bytes>);

impl Events {
    /// An event without a name.
    pub fn data(&mut self, data: &impl Serialize) {
        self.push(b"", data);
    }

    /// An event of this name.
    pub fn named(&mut self, name: &str, data: &impl Serialize) {
        self.push(format!("event: {name}\n").as_bytes(), data);
    }

    /// An event whose data is this text, of one line.
    pub fn text(&mut self, text: &[u8]) {
        self.0.push_back([b"data: ", text, b"\n\n"].concat().into());
    }

    fn push(&mut self, head: &[u8], data: &impl Serialize) {
        let mut frame = Vec::with_capacity(256);
        frame.extend_from_slice(head);
        frame.extend_from_slice(b"data: ");
        serde_json::to_writer(&mut frame, data).expect("writing plain data into memory cannot fail");
        frame.extend_from_slice(b"\n\n");
        self.0.push_back(frame.into());
    }
}

/// The body of a streamed reply.
pub(crate) struct EventStream<F> {
    choices: Choices,
    format: F,
    events: Events,
    ended: bool,
    keep_alive: Duration,
    /// When a comment is due, if nothing else is sent before.
    silence: Pin<Box<Sleep>>,
}

impl<F: Format> EventStream<F> {
    /// A stream that begins with the choices in order, then `first`.
    pub fn new(choices: Choices, format: F, first: Option<Event>, keep_alive: Duration) -> Self {
        let silence = Box::pin(sleep(keep_alive));
        let mut stream = Self { choices, format, events: Events::default(), ended: false, keep_alive, silence };
        // `first` is not written yet.
        let usage = Usage { completion_tokens: 0, reasoning_tokens: 0, ..stream.choices.usage() };
        for index in 0..stream.choices.len() {
            let piece = Piece::Open { index, prompt: stream.choices.prompt(index) };
            stream.format.events(&mut stream.events, &piece, &usage);
        }
        if let Some(event) = first {
            stream.event(&event);
        }
        stream
    }

    fn event(&mut self, event: &Event) {
        self.write(&event.piece());
    }

    fn write(&mut self, piece: &Piece) {
        self.format.events(&mut self.events, piece, &self.choices.usage());
    }

    fn end(&mut self, outcome: Result<(), ApiError>) {
        self.ended = true;
        match outcome {
            Ok(()) => self.write(&Piece::End(&self.choices.usage())),
            Err(error) => self.write(&Piece::Error(&error)),
        }
    }
}

impl<F: Format> HttpBody for EventStream<F> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        while this.events.0.is_empty() && !this.ended {
            match this.choices.poll_next(cx) {
                Poll::Ready(Some(Ok(event))) => this.event(&event),
                Poll::Ready(Some(Err(error))) => this.end(Err(error)),
                Poll::Ready(None) => this.end(Ok(())),
                Poll::Pending => {
                    std::task::ready!(this.silence.as_mut().poll(cx));
                    this.events.0.push_back(Bytes::from_static(b": keep-alive\n\n"));
                }
            }
        }
        let next = this.events.0.pop_front();
        if next.is_some() {
            this.silence.as_mut().reset(Instant::now() + this.keep_alive);
        }
        Poll::Ready(next.map(|bytes| Ok(Frame::data(bytes))))
    }
}
