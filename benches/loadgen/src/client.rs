//! One call at a time over HTTP/1.1, streamed and timed, or plain.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
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

/// What one call gave.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    /// Joined content, or text of a completion.
    pub content: String,
    /// Joined reasoning.
    pub reasoning: String,
    /// As the server named it.
    pub finish_reason: String,
    /// From the usage chunk.
    pub prompt_tokens: u64,
    /// From the usage chunk.
    pub output_tokens: u64,
    /// From sending to the first chunk that carries text.
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
    pub async fn stream(&self, path: &str, body: Value) -> Result<Reply> {
        let start = Instant::now();
        let mut incoming = self.open_stream(path, body).await?;
        let mut parser = EventParser::default();
        let mut reply = Reply::default();
        let mut last: Option<Instant> = None;
        while let Some(frame) = incoming.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            for event in parser.push(&data) {
                if event == "[DONE]" {
                    ensure!(!reply.finish_reason.is_empty(), "[DONE] without a finish reason");
                    reply.total = start.elapsed();
                    return Ok(reply);
                }
                let chunk: Value = serde_json::from_str(&event).with_context(|| format!("not JSON: {event}"))?;
                if let Some(error) = chunk.get("error") {
                    bail!("error in the stream: {error}");
                }
                if reply.absorb(&chunk) {
                    let now = Instant::now();
                    match last.replace(now) {
                        None => reply.first_token = now - start,
                        Some(before) => reply.gaps.push(now - before),
                    }
                }
            }
        }
        bail!("the stream closed without [DONE]")
    }

    /// `POST path`, answered in one piece, which must be a 200.
    pub async fn whole(&self, path: &str, body: &Value) -> Result<Reply> {
        let start = Instant::now();
        let (status, answer) = self.post(path, body).await?;
        ensure!(status == StatusCode::OK, "{status}: {answer}");
        let mut reply = Reply::default();
        reply.absorb(&answer);
        ensure!(!reply.finish_reason.is_empty(), "an answer without a finish reason");
        reply.total = start.elapsed();
        reply.first_token = reply.total;
        Ok(reply)
    }

    /// As [`Self::stream`], but leaves the body to the caller, who may drop it half way.
    pub async fn open_stream(&self, path: &str, mut body: Value) -> Result<Incoming> {
        body["stream"] = Value::Bool(true);
        body["stream_options"] = serde_json::json!({"include_usage": true});
        let response = self.send(Method::POST, path, serde_json::to_vec(&body)?.into()).await?;
        let status = response.status();
        if status != StatusCode::OK {
            let body = response.into_body().collect().await?.to_bytes();
            bail!("{status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(response.into_body())
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<http::Response<Incoming>> {
        let uri: Uri = format!("{}{path}", self.target.base).parse()?;
        let mut request = Request::builder().method(method).uri(uri).header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.target.api_key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        Ok(self.pool.request(request.body(Full::new(body))?).await?)
    }
}

impl Reply {
    /// Takes over what a chunk, or a whole answer, says; whether it carried text.
    fn absorb(&mut self, chunk: &Value) -> bool {
        if let Some(usage) = chunk.get("usage").filter(|u| !u.is_null()) {
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
}
