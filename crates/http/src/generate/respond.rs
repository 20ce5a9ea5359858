//! Writes choices as one reply or as a stream of events.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use baton_text::Segment;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use tokio::time::timeout;

use crate::error::ApiError;
use crate::generate::{Choices, Delta, Event, Tokens, Told};
use crate::openai::shared::{Finish, Format, Whole};
use crate::sse::{self, EventStream};

/// A complete choice.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub reasoning: String,
    pub content: String,
    pub calls: Vec<Call>,
    pub tokens: Tokens,
    pub reason: Finish,
    /// Which stop string ended it.
    pub matched: Option<usize>,
    /// What it is the output for.
    pub prompt: Arc<Told>,
}

/// A call of a tool.
#[derive(Debug)]
pub(crate) struct Call {
    pub name: String,
    /// As the model wrote them: JSON, unless it was cut off.
    pub arguments: String,
}

/// The reply to a request. The head of a stream is held until there is something to say, so that a request that
/// fails at once still gets its status, but no longer than the keep-alive interval.
pub(crate) async fn respond<F: Format + Whole>(
    mut choices: Choices,
    mut format: F,
    streamed: bool,
    keep_alive: Duration,
) -> Result<Response, ApiError> {
    if streamed {
        return stream(choices, format, keep_alive).await;
    }
    let outputs = collect(&mut choices).await?;
    let body = format.whole(&outputs, &choices.usage());
    let json = HeaderValue::from_static("application/json");
    Ok(([(CONTENT_TYPE, json)], body).into_response())
}

/// The reply as a stream of events.
pub(crate) async fn stream<F: Format>(
    mut choices: Choices,
    format: F,
    keep_alive: Duration,
) -> Result<Response, ApiError> {
    let first = match timeout(keep_alive, choices.next()).await {
        Ok(Some(event)) => Some(event?),
        Ok(None) | Err(_) => None,
    };
    let body = Body::new(EventStream::new(choices, format, first, keep_alive));
    Ok((sse::HEADERS, body).into_response())
}

/// The complete choices that are told.
async fn collect(choices: &mut Choices) -> Result<Vec<Output>, ApiError> {
    let mut outputs: Vec<_> = (0..choices.len()).map(|_| Output::default()).collect();
    while let Some(event) = choices.next().await {
        let (index, tokens) = match event? {
            Event::Text { index, delta: Delta { segment, tokens } } => {
                let output = &mut outputs[index];
                match segment {
                    Segment::Reasoning(text) => output.reasoning += &text,
                    Segment::Content(text) => output.content += &text,
                    Segment::Call { name, .. } => output.calls.push(Call { name, arguments: String::new() }),
                    Segment::Arguments { index, text } => output.calls[index].arguments += &text,
                }
                (index, tokens)
            }
            Event::Finish { index, reason, matched, tokens } => {
                (outputs[index].reason, outputs[index].matched) = (reason, matched);
                (index, tokens)
            }
        };
        let all = &mut outputs[index].tokens;
        all.scores.extend(tokens.scores);
        all.ids.extend(tokens.ids);
    }
    let prompts = choices.take_prompts();
    let per_prompt = outputs.len() / prompts.len();
    for (index, output) in outputs.iter_mut().enumerate() {
        output.prompt = prompts[index / per_prompt].clone();
    }
    Ok(choices.best().into_iter().map(|index| std::mem::take(&mut outputs[index])).collect())
}
