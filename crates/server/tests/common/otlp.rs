//! A collector for traces, which reads what it is sent by the protocol's own field numbers, written down here once more.

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

use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    crypto::ring,
    pki_types::{PrivateKeyDer, pem::PemObject},
};
use serde_json::{Value, json};

/// A span as it arrived.
#[derive(Debug, Clone)]
pub struct Span {
    pub trace_id: Vec<u8>,
    pub span_id: Vec<u8>,
    pub parent_id: Vec<u8>,
    pub name: String,
    pub kind: u64,
    pub start: u64,
    pub end: u64,
    pub attributes: BTreeMap<String, Value>,
    /// Of the resource that it belongs to.
    pub resource: BTreeMap<String, Value>,
    pub status: u64,
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
    fn listen(answered: impl Fn(TcpStream) -> io::Result<Vec<u8>> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (sender, spans) = channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(body) = answered(stream.expect("a connection")) else { continue };
                if export(&body).into_iter().any(|span| sender.send(span).is_err()) {
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

/// Reads one request and answers it.
fn answered(mut stream: impl Read + Write, status: u16) -> io::Result<Vec<u8>> {
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
    Ok(body)
}

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl<'a> Field<'a> {
    fn bytes(&self) -> &'a [u8] {
        match self {
            Field::Bytes(bytes) => bytes,
            Field::Number(number) => panic!("{number} where bytes are expected"),
        }
    }

    fn number(&self) -> u64 {
        match self {
            Field::Number(number) => *number,
            Field::Bytes(bytes) => panic!("{bytes:?} where a number is expected"),
        }
    }

    fn text(&self) -> String {
        String::from_utf8(self.bytes().to_vec()).expect("UTF-8")
    }
}

/// The fields of a message, by number.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let (byte, rest) = bytes.split_first().expect("a whole number");
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return value;
            }
        }
    }
    fn take<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
        let (taken, rest) = bytes.split_at(length);
        *bytes = rest;
        taken
    }
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let field = match key & 7 {
            0 => Field::Number(varint(&mut bytes)),
            1 => Field::Number(u64::from_le_bytes(take(&mut bytes, 8).try_into().expect("8 bytes"))),
            2 => {
                let length = varint(&mut bytes) as usize;
                Field::Bytes(take(&mut bytes, length))
            }
            5 => Field::Number(u32::from_le_bytes(take(&mut bytes, 4).try_into().expect("4 bytes")).into()),
            kind => panic!("wire type {kind}"),
        };
        fields.push((key >> 3, field));
    }
    fields
}

/// The fields of this number, as messages.
fn messages(bytes: &[u8], number: u64) -> Vec<&[u8]> {
    fields(bytes).iter().filter(|(n, _)| *n == number).map(|(_, field)| field.bytes()).collect()
}

/// `ExportTraceServiceRequest`.
fn export(body: &[u8]) -> Vec<Span> {
    let mut spans = Vec::new();
    for resource_spans in messages(body, 1) {
        let resource = messages(resource_spans, 1);
        let resource = attributes(messages(resource[0], 1));
        for scope_spans in messages(resource_spans, 2) {
            spans.extend(messages(scope_spans, 2).into_iter().map(|bytes| span(bytes, &resource)));
        }
    }
    spans
}

fn span(bytes: &[u8], resource: &BTreeMap<String, Value>) -> Span {
    let fields = fields(bytes);
    let field = |number: u64| fields.iter().find(|(n, _)| *n == number).map(|(_, field)| field);
    let bytes_of = |number| field(number).map_or_else(Vec::new, |field| field.bytes().to_vec());
    let number_of = |number| field(number).map_or(0, Field::number);
    let status = field(15).map_or(0, |status| {
        self::fields(status.bytes()).iter().find(|(n, _)| *n == 3).map_or(0, |(_, code)| code.number())
    });
    Span {
        trace_id: bytes_of(1),
        span_id: bytes_of(2),
        parent_id: bytes_of(4),
        name: field(5).expect("a name").text(),
        kind: number_of(6),
        start: number_of(7),
        end: number_of(8),
        attributes: attributes(messages(bytes, 9)),
        resource: resource.clone(),
        status,
    }
}

fn attributes(pairs: Vec<&[u8]>) -> BTreeMap<String, Value> {
    let pair = |bytes: &[u8]| {
        let fields = fields(bytes);
        let of = |number: u64| &fields.iter().find(|(n, _)| *n == number).expect("key and value").1;
        (of(1).text(), any(of(2).bytes()))
    };
    pairs.into_iter().map(pair).collect()
}

/// `AnyValue`.
fn any(bytes: &[u8]) -> Value {
    let fields = fields(bytes);
    let (number, field) = fields.first().expect("one value");
    match number {
        1 => json!(field.text()),
        3 => json!(field.number() as i64),
        4 => json!(f64::from_bits(field.number())),
        5 => messages(field.bytes(), 1).into_iter().map(any).collect(),
        other => panic!("a value of kind {other}"),
    }
}
