//! A collector for traces.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread,
    time::Duration,
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, KeyValue, any_value},
    trace::v1::{ResourceSpans, span::SpanKind, status::StatusCode},
};
use prost::Message;
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    crypto::ring,
    pki_types::{PrivateKeyDer, pem::PemObject},
};
use serde_json::{Value, json};

/// A span as it arrived.
#[derive(Debug, Clone)]
pub struct Span {
    /// Of the request that it came with, in small letters.
    pub head: String,
    pub trace_id: Vec<u8>,
    pub span_id: Vec<u8>,
    pub parent_id: Vec<u8>,
    pub name: String,
    pub kind: SpanKind,
    pub start: u64,
    pub end: u64,
    pub attributes: BTreeMap<String, Value>,
    /// Of the resource that it belongs to.
    pub resource: BTreeMap<String, Value>,
    pub status: StatusCode,
}

/// Listens on a port of its own and answers everything alike.
pub struct Collector {
    pub address: SocketAddr,
    spans: Receiver<Span>,
}

impl Collector {
    /// Takes everything.
    pub fn start() -> Self {
        Self::answering(200)
    }

    /// Answers with this status.
    pub fn answering(status: u16) -> Self {
        Self::listen(move |stream| answered(stream, status))
    }

    /// Takes everything under TLS, with a certificate of its own for 127.0.0.1, which is given back as PEM.
    pub fn encrypted() -> (Self, String) {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(signing_key.serialize_pem().as_bytes()).expect("a key");
        let config = ServerConfig::builder_with_provider(ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .expect("they go together");
        let config = Arc::new(config);
        let listening = Self::listen(move |stream| {
            let connection = ServerConnection::new(config.clone()).expect("a connection");
            answered(StreamOwned::new(connection, stream), 200)
        });
        (listening, cert.pem())
    }

    /// What is read of a connection is an export; connections that break off are none.
    fn listen(answered: impl Fn(TcpStream) -> io::Result<(String, Vec<u8>)> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (sender, spans) = channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok((head, body)) = answered(stream.expect("a connection")) else { continue };
                if export(&head, &body).into_iter().any(|span| sender.send(span).is_err()) {
                    return;
                }
            }
        });
        Self { address, spans }
    }

    /// The next span.
    pub fn next(&self) -> Span {
        self.spans.recv_timeout(Duration::from_secs(30)).expect("a span")
    }

    /// Whether no span came so far that was not taken.
    pub fn is_empty(&self) -> bool {
        self.spans.try_recv().is_err()
    }
}

/// Reads one request, head and body, and answers it.
fn answered(mut stream: impl Read + Write, status: u16) -> io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let end = loop {
        let mut more = [0; 4096];
        let read = stream.read(&mut more)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&more[..read]);
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let mut body = bytes.split_off(end);
    let head = String::from_utf8(bytes).expect("text").to_ascii_lowercase();
    assert!(head.starts_with("post /v1/traces http/1.1\r\n") && head.contains("application/x-protobuf"), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
    let read = body.len();
    body.resize(length.parse().expect("a number"), 0);
    stream.read_exact(&mut body[read..]).expect("the rest");
    let answer = format!("HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    stream.write_all(answer.as_bytes()).expect("an answer");
    Ok((head, body))
}

/// The spans of an export, with the head that it came under.
fn export(head: &str, body: &[u8]) -> Vec<Span> {
    let export = ExportTraceServiceRequest::decode(body).expect("an export");
    let mut spans = Vec::new();
    for ResourceSpans { resource, scope_spans, .. } in export.resource_spans {
        let resource = attributes(resource.expect("a resource").attributes);
        for span in scope_spans.into_iter().flat_map(|scope| scope.spans) {
            spans.push(Span {
                head: head.to_owned(),
                trace_id: span.trace_id,
                span_id: span.span_id,
                parent_id: span.parent_span_id,
                name: span.name,
                kind: SpanKind::try_from(span.kind).expect("a kind"),
                start: span.start_time_unix_nano,
                end: span.end_time_unix_nano,
                attributes: attributes(span.attributes),
                resource: resource.clone(),
                status: span.status.map_or(StatusCode::Unset, |status| status.code()),
            });
        }
    }
    spans
}

fn attributes(pairs: Vec<KeyValue>) -> BTreeMap<String, Value> {
    pairs.into_iter().map(|pair| (pair.key, json(pair.value.expect("a value")))).collect()
}

fn json(value: AnyValue) -> Value {
    match value.value.expect("one value") {
        any_value::Value::StringValue(text) => json!(text),
        any_value::Value::IntValue(number) => json!(number),
        any_value::Value::DoubleValue(number) => json!(number),
        any_value::Value::ArrayValue(list) => list.values.into_iter().map(json).collect(),
        other => panic!("nothing of ours is {other:?}"),
    }
}
