//! Heads and bodies that are not what they say, or far more than anybody means: a refusal, a closed connection, nothing kept.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::harness::{CHAT, COMPLETIONS, PATIENCE, Server, Setup, chat_body, with};
use crate::wires::{PREFACE, frame};

/// Sends bytes on a connection that would stay open, and gives what the server says until it closes.
async fn until_closed(server: &Server, bytes: &[u8]) -> String {
    let mut stream = server.connect().await;
    // It may close before it has read everything, and then what it said is lost at times.
    let _ = stream.write_all(bytes).await;
    let mut said = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut said)).await.expect("the server closes");
    String::from_utf8_lossy(&said).into_owned()
}

/// Whether a reply may have been lost on its way: the connection is closed while much of what was sent has not been read.
fn lost(said: &str, sent: usize) -> bool {
    said.is_empty() && sent > 64 << 10
}

async fn still_serves(server: &Server) {
    assert_eq!(server.chat(json!({"max_tokens": 2})).await.status, 200);
    server.blocks_are_free().await;
}

#[tokio::test]
async fn r24_a_head_beyond_the_limits_is_refused_and_its_connection_closed() {
    let server = Setup::default().start().await;
    let heads = [
        format!("GET /live HTTP/1.1\r\nhost: localhost\r\n{}\r\n", "a: b\r\n".repeat(101)),
        format!("GET /live HTTP/1.1\r\nhost: localhost\r\na: {}\r\n\r\n", "x".repeat(500_000)),
        format!("GET /live HTTP/1.1\r\nhost: localhost\r\n{}: b\r\n\r\n", "x".repeat(500_000)),
    ];
    for head in heads {
        let said = until_closed(&server, head.as_bytes()).await;
        assert!(lost(&said, head.len()) || said.starts_with("HTTP/1.1 431"), "{} bytes: {said}", head.len());
    }
    let target = format!("GET /{} HTTP/1.1\r\nhost: localhost\r\n\r\n", "x".repeat(500_000));
    let said = until_closed(&server, target.as_bytes()).await;
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
    still_serves(&server).await;
}

/// A body of a request that is good but for its lengths.
fn lying(headers: &str, body: &str) -> Vec<u8> {
    format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n{body}").into_bytes()
}

#[tokio::test]
async fn r25_lengths_that_lie_are_refused_and_nothing_of_the_body_is_taken_for_a_request() {
    let server = Setup::default().start().await;
    let good = json!({"prompt": "a", "max_tokens": 2}).to_string();
    let (length, chunk) = (good.len(), format!("{:x}\r\n{good}\r\n", good.len()));
    // Whoever reads the other length finds this.
    let smuggled = format!("{chunk}0\r\n\r\nGET /version HTTP/1.1\r\nhost: localhost\r\n\r\n");
    // With both lengths the chunks count, and what follows them is not read: as RFC 9112 has it.
    for headers in [
        format!("content-length: {length}\r\ntransfer-encoding: chunked\r\n"),
        format!("transfer-encoding: chunked\r\ncontent-length: {length}\r\n"),
    ] {
        let said = until_closed(&server, &lying(&headers, &smuggled)).await;
        assert!(said.starts_with("HTTP/1.1 200") && said.contains("connection: close"), "{headers} {said}");
        assert!(!said.contains("\"version\""), "{headers} {said}");
    }
    let cases = [
        (format!("content-length: {length}\r\ncontent-length: {}\r\n", length + 1), good.clone()),
        (format!("content-length: +{length}\r\n"), good.clone()),
        ("content-length: -1\r\n".into(), good.clone()),
        ("content-length: 99999999999999999999999\r\n".into(), good.clone()),
        ("transfer-encoding: chunked, identity\r\n".into(), chunk.clone()),
        ("transfer-encoding: gzip\r\n".into(), good.clone()),
        ("transfer-encoding: chunked\r\n".into(), format!("ffffffffffffffff1\r\n{good}\r\n0\r\n\r\n")),
        ("transfer-encoding: chunked\r\n".into(), format!("-5\r\n{good}\r\n0\r\n\r\n")),
        ("transfer-encoding: chunked\r\n".into(), format!("{length:x};{}\r\n{good}\r\n0\r\n\r\n", "x".repeat(100_000))),
        ("transfer-encoding: chunked\r\n".into(), format!("{chunk}0\r\n{}\r\n", "a: b\r\n".repeat(20_000))),
        ("transfer-encoding : chunked\r\n".into(), chunk),
    ];
    for (headers, body) in cases {
        let said = until_closed(&server, &lying(&headers, &body)).await;
        assert!(lost(&said, body.len()) || said.starts_with("HTTP/1.1 400"), "{headers} {said}");
    }
    assert_eq!(server.engine.stats().finished.total(), 2, "none of these was generated for");
    still_serves(&server).await;
}

#[tokio::test]
async fn r27_a_hundred_thousand_of_anything_is_refused_and_gives_the_engine_nothing() {
    const MILLION: usize = 1_000_000;
    /// More values than this no body may have: refused by their number, none would meet the limits of its field.
    const MANY: usize = 100_000;
    let server = Setup::default().start().await;
    let words = vec!["x"; MANY];
    let properties: serde_json::Map<String, Value> = (0..MANY).map(|n| (n.to_string(), json!({}))).collect();
    let bias: serde_json::Map<String, Value> = (0..MANY).map(|id| (id.to_string(), json!(1))).collect();
    let form = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
    let chat = [
        json!({"n": MILLION}),
        json!({"stop": words}),
        json!({"logit_bias": bias}),
        json!({"top_logprobs": MILLION, "logprobs": true}),
        json!({"stop_token_ids": vec![1; MANY]}),
        json!({"bad_words": words}),
        json!({"structured_outputs": {"choice": words}}),
        json!({"structured_outputs": {"regex": "(a|b)".repeat(MANY)}}),
        json!({"chat_template_kwargs": {"a": words}}),
        json!({"tools": vec![json!({}); MANY]}),
        form(json!({"enum": words})),
        form(json!({"type": "object", "properties": properties})),
        form(json!({"type": "array", "minItems": 1_000_000_000, "items": {"type": "string"}})),
    ];
    let completion = [
        json!({"prompt": vec!["x"; MILLION]}),
        json!({"prompt": words}),
        json!({"prompt": vec![5; MANY]}),
        json!({"prompt": "x", "best_of": MILLION}),
    ];
    for (path, base, cases) in [(CHAT, chat_body(), &chat[..]), (COMPLETIONS, json!({}), &completion)] {
        for fields in cases {
            let body = with(base.clone(), fields.clone());
            let reply = server.post(path, &body).await;
            let field = fields.to_string().chars().take(80).collect::<String>();
            assert_eq!(reply.status, 400, "{path} {field}: {reply:?}");
            reply.error_code();
        }
    }
    assert_eq!(server.engine.stats().finished.total(), 0, "none was generated for");
    still_serves(&server).await;
}

/// Sends bytes, closes its side, and waits until the server has closed the other.
async fn cut_off(addr: SocketAddr, bytes: Vec<u8>) {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let _ = stream.write_all(&bytes).await;
    let _ = stream.shutdown().await;
    let _ = timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await.expect("the server closes");
}

#[tokio::test]
async fn s12_frames_cut_off_anywhere_end_their_connection_alone() {
    let mut setup = Setup::default();
    setup.config.http2 = true;
    setup.config.connection_limits.head_timeout = Duration::from_millis(200);
    let server = setup.start().await;
    // POST http://localhost/v1/completions by the static table, then its body in two.
    let path =
        [&[0x83, 0x86, 0x04, COMPLETIONS.len() as u8][..], COMPLETIONS.as_bytes(), &[0x41, 9], b"localhost"].concat();
    let body = json!({"prompt": "a", "max_tokens": 2}).to_string();
    let (first, second) = body.as_bytes().split_at(body.len() / 2);
    let begin = [PREFACE, &frame(4, 0, 0, &[])].concat();
    let whole = [&begin[..], &frame(1, 4, 1, &path), &frame(0, 0, 1, first), &frame(0, 1, 1, second)].concat();
    let cuts = (1..whole.len()).step_by(2).map(|end| whole[..end].to_vec());
    let lies = [
        // As long as a frame may say, of a kind that there is not, then of each that there is.
        vec![[&[0xff; 3][..], &[42, 0, 0, 0, 0, 1]].concat()],
        (0..10).map(|kind| [&[0xff, 0xff, 0xff, kind, 0][..], &1_u32.to_be_bytes()].concat()).collect(),
        // A head that never ends.
        [vec![frame(1, 0, 1, &path)], vec![frame(9, 0, 1, &[0, 1, b'a', 1, b'b']); 30_000]].concat(),
        vec![frame(6, 0, 0, &[0; 8]); 20_000],
        vec![frame(4, 0, 0, &[]); 20_000],
        vec![frame(8, 0, 0, &[0; 4])],
        vec![frame(8, 0, 0, &[0x7f, 0xff, 0xff, 0xff]); 3],
        vec![frame(2, 0, 1, &1_u32.to_be_bytes()); 2],
    ];
    let lies = lies.into_iter().map(|frames| [&begin[..], &frames.concat()].concat());
    for some in cuts.chain(lies).collect::<Vec<_>>().chunks(32) {
        let mut all = JoinSet::new();
        for bytes in some {
            all.spawn(cut_off(server.addr, bytes.clone()));
        }
        all.join_all().await;
    }
    assert_eq!(server.engine.stats().finished.total(), 0, "nothing half said was answered");
    let mut stream = server.connect().await;
    stream.write_all(&whole).await.unwrap();
    server.until("the whole was", |stats| stats.finished.total() == 1).await;
    still_serves(&server).await;
}
