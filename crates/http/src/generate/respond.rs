//! Writes a generation as one reply or as a stream of events.

use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use baton_text::Segment;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use tokio::time::timeout;

use crate::error::ApiError;
use crate::generate::{Delta, Event, Generation, Score};
use crate::openai::shared::{Finish, Format};
use crate::sse::{self, EventStream};

/// A complete choice.
#[derive(Debug)]
pub(crate) struct Output {
    pub reasoning: String,
    pub content: String,
    pub scores: Vec<Score>,
    pub reason: Finish,
}

/// The reply to a request. The head of a stream is held until there is something to say, so that a generation that
/// fails at once still gets its status, but no longer than the keep-alive interval.
pub(crate) async fn respond<F: Format>(
    mut generation: Generation,
    format: F,
    stream: bool,
    include_usage: bool,
    keep_alive: Duration,
) -> Result<Response, ApiError> {
    if !stream {
        let outputs = collect(&mut generation).await?;
        let mut body = Vec::new();
        format.whole(&mut body, &outputs, &generation.usage());
        let json = HeaderValue::from_static("application/json");
        return Ok(([(CONTENT_TYPE, json)], body).into_response());
    }
    let first = match timeout(keep_alive, generation.next()).await {
        Ok(Some(event)) => Some(event?),
        Ok(None) | Err(_) => None,
    };
    let body = Body::new(EventStream::new(generation, format, first, include_usage, keep_alive));
    Ok((sse::HEADERS, body).into_response())
}

async fn collect(generation: &mut Generation) -> Result<Vec<Output>, ApiError> {
    let empty =
        || Output { reasoning: String::new(), content: String::new(), scores: Vec::new(), reason: Finish::Length };
    let mut outputs: Vec<_> = (0..generation.len()).map(|_| empty()).collect();
    while let Some(event) = generation.next().await {
        match event? {
            Event::Text { index, delta: Delta { segment, scores } } => {
                let output = &mut outputs[index];
                match segment {
                    Segment::Reasoning(text) => output.reasoning += &text,
                    Segment::Content(text) => output.content += &text,
                }
                output.scores.extend(scores);
            }
            Event::Finish { index, reason, scores } => {
                outputs[index].reason = reason;
                outputs[index].scores.extend(scores);
            }
        }
    }
    Ok(outputs)
}
