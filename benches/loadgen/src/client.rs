//! One call at a time over HTTP/1.1, streamed and timed, or plain.

use std::{
    error::Error,
    time::{Duration, Instant},
};

use anyhow::Result;
use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header, uri::InvalidUri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client as Pool, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;

use crate::sse::EventParser;

/// A server: where it is and the key it wants.
#[derive(Debug, Clone)]
pub struct Target {
    /// Scheme and authority, `http://127.0.0.1:8000`.
    pub base: String,
    /// Sent as bearer token.
    pub api_key: Option<String>,
}

/// Why a call gave no reply.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No connection, or one that ended before the head of an answer.
    #[error("cannot reach the server: {0}")]
    Connection(String),
    /// An answer other than 200.
    #[error("{status}: {body}")]
    Status {
        /// What the server said.
        status: StatusCode,
        /// The answer's body.
        body: String,
    },
    /// An error object in a stream that had begun.
    #[error("error in the stream: {0}")]
    InStream(Value),
    /// The stream closed before `[DONE]`.
    #[error("the stream closed without [DONE]{0}")]
    Cut(String),
    /// An answer that is not of the OpenAI form.
    #[error("not an OpenAI answer: {0}")]
    Malformed(String),
}

impl CallError {
    /// What errors are counted by: a name, or `http` and the status.
    pub fn kind(&self) -> String {
        match self {
            Self::Connection(_) => "connection".into(),
            Self::Status { status, .. } => format!("http {}", status.as_u16()),
            Self::InStream(_) => "error in the stream".into(),
            Self::Cut(_) => "stream cut".into(),
            Self::Malformed(_) => "malformed answer".into(),
        }
    }
}

/// What one call gave.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    /// Joined content, or text of a completion.
    pub content: String,
    /// Joined reasoning.
    pub reasoning: String,
    /// As the server named it.
    pub finish_reason: String,
    /// Whether the server gave its usage.
    pub usage: bool,
    /// From the usage chunk; 0 without one.
    pub prompt_tokens: u64,
    /// From the usage chunk, or else the number of chunks that carry text.
    pub output_tokens: u64,
    /// From sending to the first chunk that carries text, or to `[DONE]` if none does.
    pub first_token: Duration,
    /// Between consecutive chunks that carry text.
    pub gaps: Vec<Duration>,
    /// From sending to `[DONE]`.
    pub total: Duration,
}

/// A connection pool to one server.
#[derive(Debug, Clone)]
pub struct Client {
    target: Target,
    pool: Pool<HttpConnector, Full<Bytes>>,
}

impl Client {
    /// A client of `target`; connects on the first call.
    pub fn new(target: Target) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self { target, pool: Pool::builder(TokioExecutor::new()).build(connector) }
    }

    /// `GET path`, status and body.
    pub async fn get(&self, path: &str) -> Result<(StatusCode, String)> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, String::from_utf8(body.to_vec())?))
    }

    /// `POST path` with a JSON body, status and JSON answer.
    pub async fn post(&self, path: &str, body: &Value) -> Result<(StatusCode, Value)> {
        let response = self.send(Method::POST, path, serde_json::to_vec(body)?.into()).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, serde_json::from_slice(&body)?))
    }

    /// `POST path`, streamed: sets `stream` and asks for usage, reads to `[DONE]`.
    pub async fn stream(&self, path: &str, body: Value) -> Result<Reply, CallError> {
        self.stream_watched(path, body, || ()).await
    }

    /// As [`Self::stream`], calling `on_text` at each chunk that carries text.
    pub(crate) async fn stream_watched(&self, path: &str, body: Value, on_text: impl Fn()) -> Result<Reply, CallError> {
        let start = Instant::now();
        let mut incoming = self.open_stream(path, body).await?;
        let mut parser = EventParser::default();
        let mut reply = Reply::default();
        let mut last: Option<Instant> = None;
        while let Some(frame) = incoming.frame().await {
            let frame = frame.map_err(|e| CallError::Cut(format!(": {e}")))?;
            let Ok(data) = frame.into_data() else { continue };
            for event in parser.push(&data) {
                if event == "[DONE]" {
                    reply.end(start.elapsed())?;
                    return Ok(reply);
                }
                let chunk: Value =
                    serde_json::from_str(&event).map_err(|_| CallError::Malformed(format!("not JSON: {event}")))?;
                if let Some(error) = chunk.get("error") {
                    return Err(CallError::InStream(error.clone()));
                }
                if reply.absorb(&chunk) {
                    on_text();
                    let now = Instant::now();
                    match last.replace(now) {
                        None => reply.first_token = now - start,
                        Some(before) => reply.gaps.push(now - before),
                    }
                }
            }
        }
        Err(CallError::Cut(String::new()))
    }

    /// `POST path`, answered in one piece, which must be a 200.
    pub async fn whole(&self, path: &str, body: &Value) -> Result<Reply, CallError> {
        let start = Instant::now();
        let response = self.answer(path, body).await?;
        let body = response.collect().await.map_err(|e| CallError::Connection(describe(&e)))?.to_bytes();
        let answer = serde_json::from_slice(&body).map_err(|e| CallError::Malformed(e.to_string()))?;
        let mut reply = Reply::default();
        reply.absorb(&answer);
        reply.end(start.elapsed())?;
        reply.first_token = reply.total;
        Ok(reply)
    }

    /// As [`Self::stream`], but leaves the body to the caller, who may drop it half way.
    pub async fn open_stream(&self, path: &str, mut body: Value) -> Result<Incoming, CallError> {
        body["stream"] = Value::Bool(true);
        body["stream_options"] = serde_json::json!({"include_usage": true});
        self.answer(path, &body).await
    }

    /// The body of an answer with status 200.
    async fn answer(&self, path: &str, body: &Value) -> Result<Incoming, CallError> {
        let body = serde_json::to_vec(body).expect("a JSON value is written").into();
        let response = self.send(Method::POST, path, body).await?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok(response.into_body());
        }
        let body = response.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        Err(CallError::Status { status, body: String::from_utf8_lossy(&body).into_owned() })
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<http::Response<Incoming>, CallError> {
        let url = format!("{}{path}", self.target.base);
        let refused = |e: &dyn Error| CallError::Connection(format!("{url}: {}", describe(e)));
        let uri: Uri = url.parse().map_err(|e: InvalidUri| refused(&e))?;
        let mut request = Request::builder().method(method).uri(uri).header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.target.api_key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(Full::new(body)).map_err(|e| refused(&e))?;
        self.pool.request(request).await.map_err(|e| refused(&e))
    }
}

/// An error and its causes in one line.
fn describe(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

impl Reply {
    /// Time per output token after the first; none for a reply of one.
    pub fn per_output_token(&self) -> Option<Duration> {
        let after_first = self.output_tokens.checked_sub(1).filter(|&n| n > 0)?;
        Some((self.total - self.first_token).div_f64(after_first as f64))
    }

    /// Takes over what a chunk, or a whole answer, says; whether it carried text.
    fn absorb(&mut self, chunk: &Value) -> bool {
        if let Some(usage) = chunk.get("usage").filter(|u| !u.is_null()) {
            self.usage = true;
            self.prompt_tokens = usage["prompt_tokens"].as_u64().unwrap_or(0);
            self.output_tokens = usage["completion_tokens"].as_u64().unwrap_or(0);
        }
        let choice = &chunk["choices"][0];
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish_reason = reason.to_owned();
        }
        let message = choice.get("delta").unwrap_or(&choice["message"]);
        let content = message["content"].as_str().or(choice["text"].as_str()).unwrap_or("");
        let reasoning = message["reasoning_content"].as_str().unwrap_or("");
        self.content.push_str(content);
        self.reasoning.push_str(reasoning);
        !content.is_empty() || !reasoning.is_empty()
    }

    /// Closes a reply that took `total`.
    fn end(&mut self, total: Duration) -> Result<(), CallError> {
        if self.finish_reason.is_empty() {
            return Err(CallError::Malformed("it ends without a finish reason".into()));
        }
        self.total = total;
        let text = self.first_token > Duration::ZERO;
        if !text {
            self.first_token = total;
        }
        if !self.usage {
            self.output_tokens = self.gaps.len() as u64 + u64::from(text);
        }
        Ok(())
    }
}
