//! What a connection may take of the server: time until its head and body are there, time without reading, a place.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use crate::harness::{CHAT, PATIENCE, Server, Setup, chat_body, read_all, request, with};

const SHORT: Duration = Duration::from_millis(200);

/// What the server says until it closes.
async fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the server closes");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Sends `begin`, and then a byte now and then for as long as the server takes them. What it says until it closes.
async fn trickle(server: &Server, begin: &str) -> String {
    let (mut read, mut write) = server.connect().await.into_split();
    write.write_all(begin.as_bytes()).await.unwrap();
    let sending = tokio::spawn(async move {
        while write.write_all(b"x").await.is_ok() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    let mut bytes = Vec::new();
    let _ = timeout(PATIENCE, read.read_to_end(&mut bytes)).await.expect("the server closes");
    sending.abort();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn r22_a_head_that_does_not_arrive_is_not_waited_for_however_it_dawdles() {
    let mut setup = Setup::default();
    setup.config.connection_limits.head_timeout = SHORT;
    let server = setup.start().await;
    for begin in ["", "G", "GET /live HTTP/1.1\r\nhost: x\r\nx-slow: "] {
        let mut silent = server.connect().await;
        silent.write_all(begin.as_bytes()).await.unwrap();
        assert!(!rest(&mut silent).await.contains("200 OK"), "{begin}");
    }
    assert!(!trickle(&server, "GET /live HTTP/1.1\r\nhost: x\r\nx-slow: ").await.contains("200 OK"));
    let mut idle = server.connect().await;
    idle.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(rest(&mut idle).await.contains("200 OK"), "and then nothing more");
    assert_eq!(server.get("/live").await.status, 200);
}

#[tokio::test]
async fn r22_a_body_that_trickles_is_not_waited_for_on_any_route() {
    let mut setup = Setup::default();
    setup.config.body_timeout = SHORT;
    let server = setup.start().await;
    for path in [CHAT, "/v1/completions", "/v1/embeddings", "/tokenize", "/v1/messages", "/v1/responses"] {
        let reply =
            trickle(&server, &format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")).await;
        assert!(reply.starts_with("HTTP/1.1 408"), "{path}: {reply}");
    }
    // Nobody reads it here.
    let reply = trickle(&server, "GET /live HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n").await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
}

#[tokio::test]
async fn r25_a_body_shorter_than_announced_is_refused() {
    let server = Setup::default().start().await;
    let mut stream = server.connect().await;
    // What there is would do.
    let (body, length) = (chat_body().to_string(), chat_body().to_string().len() + 1);
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let reply = read_all(stream).await;
    assert_eq!((reply.status, reply.error_code().as_str()), (400, "invalid_json"));
}

/// A server with much to say, to clients that must take some of it before long.
async fn talkative() -> Server {
    let mut setup = Setup { reply: "word ".repeat(7000), ..Setup::default() };
    (setup.spec.max_model_len, setup.spec.num_blocks) = (8192, 4096);
    setup.config.connection_limits.stall_timeout = SHORT;
    setup.config.http2 = true;
    setup.start().await
}

fn long_stream() -> String {
    with(chat_body(), json!({"stream": true, "logprobs": true, "top_logprobs": 20})).to_string()
}

/// Waits until the server answers nothing any more, though the engine may have ended long before.
async fn nothing_is_under_way(server: &Server) {
    let wait = async { while !server.get("/metrics").await.body.contains("baton_http_requests_in_flight 0\n") {} };
    timeout(PATIENCE, wait).await.expect("the reply is given up");
    server.blocks_are_free().await;
}

#[tokio::test]
async fn r4_a_reader_that_stops_loses_its_connection_and_the_engine_has_not_waited() {
    let server = talkative().await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(server.addr).await.unwrap();
    stream.write_all(&request("POST", CHAT, "", long_stream().as_bytes())).await.unwrap();
    server.until("it is generated to its end", |stats| stats.finished.total() == 1).await;
    nothing_is_under_way(&server).await;
    let text = rest(&mut stream).await;
    assert!(text.contains("200 OK") && !text.contains("[DONE]"), "{} bytes", text.len());
}

#[tokio::test]
async fn r4_a_stream_of_http2_without_credit_is_dropped_and_its_connection_goes_on() {
    let server = talkative().await;
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.initial_stream_window_size(16 << 10);
    let (mut client, connection) = builder.handshake(TokioIo::new(server.connect().await)).await.unwrap();
    tokio::spawn(connection);
    let chat = Request::post(format!("http://localhost{CHAT}")).body(Full::new(Bytes::from(long_stream()))).unwrap();
    let stalled = client.send_request(chat).await.unwrap().into_body();
    nothing_is_under_way(&server).await;
    let live = Request::get("http://localhost/live").body(Full::default()).unwrap();
    assert_eq!(client.send_request(live).await.unwrap().status(), 200);
    assert!(stalled.collect().await.is_err(), "what it is given in the end is no whole reply");
}
