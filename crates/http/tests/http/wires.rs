//! TLS and HTTP/2, on real sockets, with certificates made here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_http::{Tls, TlsError};
use bytes::Bytes;
use http::{Request, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::harness::{CHAT, CONTENT, PATIENCE, Server, Setup, chat_body, request, with};

/// What a connection of HTTP/2 begins with.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// An authority, and what it has signed for this machine.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: rcgen::Certificate,
}

impl Authority {
    fn new() -> Self {
        let (mut params, key) = (CertificateParams::new(Vec::new()).unwrap(), KeyPair::generate().unwrap());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    fn sign(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        (CertificateParams::new(vec![name.into()]).unwrap().signed_by(&key, &self.issuer).unwrap(), key)
    }

    fn tls(&self, clients: Option<&Self>) -> Tls {
        let (certificate, key) = self.sign("localhost");
        let clients = clients.map(|authority| authority.certificate.pem());
        Tls::new(certificate.pem().as_bytes(), key.serialize_pem().as_bytes(), clients.as_deref().map(str::as_bytes))
            .unwrap()
    }

    /// A client that trusts this authority, offers these protocols and shows a certificate of `own`.
    async fn connect(
        &self,
        server: &Server,
        protocols: &[&str],
        own: Option<&Self>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let builder = builder.with_root_certificates(roots);
        let mut config = match own {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let (certificate, key) = authority.sign("client");
                let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
                builder.with_client_auth_cert(vec![certificate.der().clone()], key).unwrap()
            }
        };
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, server.connect().await).await
    }
}

async fn http2_server() -> Server {
    let mut setup = Setup { reply: "word ".repeat(150), ..Setup::default() };
    setup.config.http2 = true;
    setup.start().await
}

async fn http2(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> SendRequest<Full<Bytes>> {
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn chat(fields: Value) -> Request<Full<Bytes>> {
    let body = with(chat_body(), fields).to_string();
    Request::post(format!("http://localhost{CHAT}")).body(Full::new(body.into())).unwrap()
}

async fn answer(client: &mut SendRequest<Full<Bytes>>, request: Request<Full<Bytes>>) -> (StatusCode, String) {
    let response = client.send_request(request).await.unwrap();
    assert_eq!(response.version(), Version::HTTP_2);
    let status = response.status();
    (status, String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap())
}

/// Sends bytes and reads until the server closes.
async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> Vec<u8> {
    let _ = stream.write_all(bytes).await;
    let mut reply = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut reply)).await.expect("the server closes");
    reply
}

#[tokio::test]
async fn http2_and_http1_give_the_same_replies_on_one_port() {
    let server = http2_server().await;
    let mut client = http2(server.connect().await).await;
    let fields = json!({"seed": 1, "max_tokens": 20});
    let (status, body) = answer(&mut client, chat(fields.clone())).await;
    let plain = server.chat(fields).await;
    assert_eq!((status.as_u16(), plain.status), (200, 200));
    let choices = |body: &str| serde_json::from_str::<Value>(body).unwrap()["choices"].clone();
    assert_eq!(choices(&body), choices(&plain.body));
    let (_, streamed) = answer(&mut client, chat(json!({"stream": true, "max_tokens": 20}))).await;
    assert!(streamed.ends_with("data: [DONE]\n\n"), "{streamed}");

    // A refusal that closes a connection of HTTP/1.1 ends one request here.
    let large = Request::post(format!("http://localhost{CHAT}")).body(Full::new(vec![b' '; 9 << 20].into())).unwrap();
    assert_eq!(answer(&mut client, large).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    let get = Request::get("http://localhost/v1/models").body(Full::default()).unwrap();
    let response = client.send_request(get).await.unwrap();
    assert!(response.status() == 200 && response.headers().contains_key("x-request-id"));

    let mut replies = JoinSet::new();
    for _ in 0..100 {
        let mut client = client.clone();
        replies.spawn(async move { answer(&mut client, chat(json!({"max_tokens": 5}))).await.0 });
    }
    assert!(replies.join_all().await.iter().all(|status| *status == 200), "many on one connection");
    server.blocks_are_free().await;
}

#[tokio::test]
async fn http2_is_not_spoken_unless_switched_on() {
    let server = Setup::default().start().await;
    let reply = exchange(server.connect().await, PREFACE).await;
    assert!(reply.is_empty() || reply.starts_with(b"HTTP/1.1 400"), "{}", String::from_utf8_lossy(&reply));
    assert_eq!(server.chat(json!({})).await.status, 200);
}

#[tokio::test]
async fn a_stream_of_http2_that_is_reset_frees_its_blocks_and_no_others() {
    let mut setup = Setup { reply: "word ".repeat(400), ..Setup::default() };
    setup.config.http2 = true;
    let server = setup.start().await;
    server.control.delay_steps(Duration::from_millis(20));
    let mut client = http2(server.connect().await).await;
    let mut bodies = Vec::new();
    for _ in 0..4 {
        let mut body = client.send_request(chat(json!({"stream": true}))).await.unwrap().into_body();
        body.frame().await.unwrap().unwrap();
        bodies.push(body);
    }
    // Nobody is done before three have left.
    server.control.hang();
    let stays = bodies.pop().unwrap();
    drop(bodies);
    while !server.get("/metrics").await.body.contains("baton_http_requests_in_flight 1\n") {}
    server.control.delay_steps(Duration::ZERO);
    server.control.release();
    let rest = stays.collect().await.unwrap().to_bytes();
    assert!(rest.ends_with(b"data: [DONE]\n\n"));
    server.blocks_are_free().await;
    assert_eq!(server.engine.stats().finished.aborted, 3);
}

#[tokio::test]
async fn r19_a_drain_lets_streams_of_http2_finish_and_refuses_new_ones() {
    let server = http2_server().await;
    server.control.delay_steps(Duration::from_millis(20));
    let mut client = http2(server.connect().await).await;
    let mut body = client.send_request(chat(json!({"stream": true}))).await.unwrap().into_body();
    body.frame().await.unwrap().unwrap();
    server.shutdown.cancel();
    while server.get("/ready").await.status == 200 {}
    assert_eq!(answer(&mut client, chat(json!({}))).await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert!(!server.served.is_finished());
    server.control.delay_steps(Duration::ZERO);
    assert!(body.collect().await.unwrap().to_bytes().ends_with(b"data: [DONE]\n\n"));
    timeout(PATIENCE, server.served).await.unwrap().unwrap().unwrap();
}

/// A frame without flags' meaning checked: length, type, flags, stream.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The code of the last GOAWAY frame in what a server sent.
fn goaway(mut bytes: &[u8]) -> Option<u32> {
    let mut code = None;
    while bytes.len() >= 9 {
        let length = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]) as usize;
        let Some(payload) = bytes.get(9..9 + length) else { break };
        if bytes[3] == 7 {
            code = Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
        }
        bytes = &bytes[9 + length..];
    }
    code
}

#[tokio::test]
async fn s12_a_client_that_resets_what_it_asks_for_is_cut_off() {
    const ENHANCE_YOUR_CALM: u32 = 0xb;
    let server = http2_server().await;
    let mut bytes = [PREFACE, &frame(4, 0, 0, &[])].concat();
    for stream in (1..2000).step_by(2) {
        // GET http://x/live by the static table, at once given up.
        bytes.extend(frame(1, 5, stream, &[0x82, 0x86, 0x04, 5, b'/', b'l', b'i', b'v', b'e', 0x41, 1, b'x']));
        bytes.extend(frame(3, 0, stream, &8_u32.to_be_bytes()));
    }
    assert_eq!(goaway(&exchange(server.connect().await, &bytes).await), Some(ENHANCE_YOUR_CALM));
    assert_eq!(server.get("/live").await.status, 200);
}

#[tokio::test]
async fn s12_heads_of_http2_are_limited() {
    let server = http2_server().await;
    let mut client = http2(server.connect().await).await;
    let large =
        Request::get("http://localhost/live").header("x-large", "x".repeat(70 << 10)).body(Full::default()).unwrap();
    match client.send_request(large).await {
        Ok(response) => assert_eq!(response.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
        Err(error) => assert!(!error.is_timeout()),
    }
    assert_eq!(server.get("/live").await.status, 200);
}

#[tokio::test]
async fn a_client_that_only_connects_is_not_waited_for() {
    let authority = Authority::new();
    let plain = http2_server().await;
    let mut setup = Setup::default();
    (setup.config.tls, setup.config.http2) = (Some(authority.tls(None)), true);
    let encrypted = setup.start().await;
    let settled = [PREFACE, &frame(4, 0, 0, &[]), &frame(4, 1, 0, &[])].concat();
    let silent = authority.connect(&encrypted, &["h2"], None).await.unwrap();
    let begin = Instant::now();
    tokio::join!(
        async { exchange(plain.connect().await, b"").await },
        async { exchange(plain.connect().await, &PREFACE[..5]).await },
        async { exchange(plain.connect().await, &settled).await },
        async { exchange(encrypted.connect().await, b"").await },
        async { exchange(silent, b"").await },
    );
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn tls_carries_both_protocols_and_nothing_else_gets_in() {
    let authority = Authority::new();
    let mut setup = Setup::default();
    (setup.config.tls, setup.config.http2) = (Some(authority.tls(None)), true);
    let server = setup.start().await;

    let stream = authority.connect(&server, &["h2", "http/1.1"], None).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (status, body) = answer(&mut http2(stream).await, chat(json!({}))).await;
    assert!(status == 200 && body.contains(CONTENT), "{body}");

    for protocols in [&["http/1.1"][..], &[]] {
        let stream = authority.connect(&server, protocols, None).await.unwrap();
        let reply = exchange(stream, &request("POST", CHAT, "", chat_body().to_string().as_bytes())).await;
        let reply = String::from_utf8(reply).unwrap();
        assert!(reply.starts_with("HTTP/1.1 200") && reply.contains(CONTENT), "{reply}");
    }

    // Whoever trusts another authority, or speaks without encryption, gets nowhere.
    assert!(Authority::new().connect(&server, &["h2"], None).await.is_err());
    let plain = exchange(server.connect().await, &request("GET", "/live", "", b"")).await;
    assert!(!String::from_utf8_lossy(&plain).contains("HTTP/"), "{plain:?}");
}

#[tokio::test]
async fn without_http2_tls_agrees_on_http1_only() {
    let authority = Authority::new();
    let mut setup = Setup::default();
    setup.config.tls = Some(authority.tls(None));
    let server = setup.start().await;
    let stream = authority.connect(&server, &["h2", "http/1.1"], None).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert!(authority.connect(&server, &["h2"], None).await.is_err());
}

#[tokio::test]
async fn where_authorities_are_named_a_client_must_show_a_certificate_of_theirs() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let mut setup = Setup::default();
    setup.config.tls = Some(authority.tls(Some(&clients)));
    let server = setup.start().await;
    let bytes = request("GET", "/live", "", b"");
    let stream = authority.connect(&server, &[], Some(&clients)).await.unwrap();
    assert!(exchange(stream, &bytes).await.starts_with(b"HTTP/1.1 200"));
    for own in [None, Some(&authority)] {
        // With TLS 1.3 a client learns of the refusal when it reads.
        if let Ok(stream) = authority.connect(&server, &[], own).await {
            assert!(exchange(stream, &bytes).await.is_empty());
        }
    }
}

#[tokio::test]
async fn a_certificate_is_replaced_while_connections_go_on() {
    let (first, second) = (Authority::new(), Authority::new());
    let mut setup = Setup { reply: "word ".repeat(150), ..Setup::default() };
    (setup.config.tls, setup.config.http2) = (Some(first.tls(None)), true);
    let tls = setup.config.tls.clone().unwrap();
    let server = setup.start().await;
    server.control.delay_steps(Duration::from_millis(5));
    let mut client = http2(first.connect(&server, &["h2"], None).await.unwrap()).await;
    let mut body = client.send_request(chat(json!({"stream": true}))).await.unwrap().into_body();
    body.frame().await.unwrap().unwrap();
    tls.replace(&second.tls(None));
    for protocols in [&["h2"][..], &["http/1.1"]] {
        assert!(first.connect(&server, protocols, None).await.is_err());
        let stream = second.connect(&server, protocols, None).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocols[0].as_bytes()));
    }
    server.control.delay_steps(Duration::ZERO);
    assert!(body.collect().await.unwrap().to_bytes().ends_with(b"data: [DONE]\n\n"));
}

#[tokio::test]
async fn r23_who_does_not_shake_hands_is_not_waited_for() {
    let mut setup = Setup::default();
    (setup.config.tls, setup.config.http2) = (Some(Authority::new().tls(None)), true);
    setup.config.connection_limits.head_timeout = Duration::from_millis(200);
    let server = setup.start().await;
    // Nothing, and the first bytes of a hello.
    for begin in [&b""[..], &[22, 3, 1, 2, 0, 1, 0]] {
        let reply = exchange(server.connect().await, begin).await;
        assert!(reply.is_empty(), "{reply:?}");
    }
}

#[test]
fn what_is_no_certificate_or_another_ones_key_is_refused_by_what_it_is() {
    let authority = Authority::new();
    let ((certificate, key), (_, other)) = (authority.sign("localhost"), authority.sign("localhost"));
    let (certificate, key, other) = (certificate.pem(), key.serialize_pem(), other.serialize_pem());
    let refusal = |chain: &str, key: &str, clients: Option<&str>| {
        Tls::new(chain.as_bytes(), key.as_bytes(), clients.map(str::as_bytes)).unwrap_err()
    };
    assert!(matches!(refusal("", &key, None), TlsError::NoCertificate));
    assert!(matches!(refusal(&key, &key, None), TlsError::NoCertificate));
    assert!(matches!(refusal(&certificate[..100], &key, None), TlsError::NoCertificate));
    assert!(matches!(refusal(&certificate, &certificate, None), TlsError::NoKey));
    assert!(matches!(refusal(&certificate, &other, None), TlsError::Unusable(_)));
    assert!(matches!(refusal(&certificate, &key, Some("nonsense")), TlsError::NoAuthority));
    assert!(!format!("{:?}", Tls::new(certificate.as_bytes(), key.as_bytes(), None)).contains("PRIVATE"));
}
