//! Pages of other origins, and compressed replies.

use std::io::Write;
use std::process::{Command, Stdio};

use baton_http::ApiKey;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{CHAT, Reply, Server, Setup, chat_body, request, unchunked, with};

const PAGE: &str = "https://page.example";

async fn server(origins: &[&str]) -> Server {
    let mut setup = Setup::default();
    setup.config.api_keys = vec![ApiKey::new("key".into()).unwrap()];
    setup.config.allowed_origins = origins.iter().map(|origin| origin.parse().unwrap()).collect();
    setup.start().await
}

async fn preflight(server: &Server, path: &str, origin: &str, headers: &str) -> Reply {
    let headers = format!(
        "origin: {origin}\r\naccess-control-request-method: POST\r\naccess-control-request-headers: {headers}\r\n"
    );
    server.raw(&request("OPTIONS", path, &headers, b"")).await
}

#[tokio::test]
async fn without_origins_nothing_is_said_to_any() {
    let server = server(&[]).await;
    let reply = preflight(&server, CHAT, PAGE, "authorization").await;
    assert_eq!(reply.status, 401);
    let live = server.raw(&request("GET", "/live", &format!("origin: {PAGE}\r\n"), b"")).await;
    for reply in [reply, live] {
        assert!(!reply.headers.iter().any(|(name, _)| name.starts_with("access-control")), "{reply:?}");
    }
}

#[tokio::test]
async fn a_preflight_of_a_listed_origin_needs_no_key_and_allows_what_libraries_send() {
    let server = server(&["http://localhost:3000", PAGE]).await;
    let asked = "Authorization, content-type,x-stainless-lang,x-stainless-retry-count, x-api-key, anthropic-version, \
                 cookie, x-forwarded-for, x-stainless-\u{e9}";
    let reply = preflight(&server, CHAT, PAGE, asked).await;
    assert_eq!(reply.status, 204, "{reply:?}");
    assert_eq!(reply.header("access-control-allow-origin"), Some(PAGE));
    let plain = preflight(&server, CHAT, PAGE, &asked.replace(", x-stainless-\u{e9}", "")).await;
    assert_eq!(
        plain.header("access-control-allow-headers"),
        Some("authorization, content-type, x-stainless-lang, x-stainless-retry-count, x-api-key, anthropic-version")
    );
    assert_eq!(plain.header("access-control-allow-methods"), Some("GET, HEAD, POST, DELETE, OPTIONS"));
    assert!(plain.header("vary").unwrap().contains("origin"));
    assert_eq!(plain.header("access-control-allow-credentials"), None);
    assert!(plain.header("x-request-id").is_some());

    for other in ["https://other.example", "https://page.example.evil", "http://page.example", "null"] {
        let reply = preflight(&server, CHAT, other, "authorization").await;
        assert_eq!((reply.status, reply.header("access-control-allow-origin")), (401, None), "{other}");
        assert!(reply.header("vary").unwrap().contains("origin"));
    }
    // What is no preflight needs a key as before.
    let options = server.raw(&request("OPTIONS", CHAT, &format!("origin: {PAGE}\r\n"), b"")).await;
    assert_eq!(options.status, 401);
}

#[tokio::test]
async fn replies_and_refusals_to_a_listed_origin_can_be_read_by_it() {
    let server = server(&[PAGE]).await;
    let body = with(chat_body(), json!({"max_tokens": 2})).to_string();
    for (key, status) in [("key", 200), ("wrong", 401)] {
        let headers = format!("origin: {PAGE}\r\nauthorization: Bearer {key}\r\n");
        let reply = server.raw(&request("POST", CHAT, &headers, body.as_bytes())).await;
        assert_eq!((reply.status, reply.header("access-control-allow-origin")), (status, Some(PAGE)));
        let exposed = reply.header("access-control-expose-headers").unwrap();
        assert!(exposed.contains("x-request-id") && exposed.contains("retry-after"), "{exposed}");
        assert_eq!(reply.header("access-control-allow-credentials"), None);
    }
}

#[tokio::test]
async fn a_star_allows_every_page_and_still_no_credentials() {
    let server = server(&["*"]).await;
    let reply = preflight(&server, "/v1/models", PAGE, "authorization").await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (204, Some("*")));
    assert_eq!(reply.header("access-control-allow-credentials"), None);
    // Keys are asked for all the same.
    let headers = format!("origin: {PAGE}\r\n");
    assert_eq!(server.raw(&request("GET", "/v1/models", &headers, b"")).await.status, 401);
}

/// Head and body, as bytes.
async fn bytes(server: &Server, bytes: &[u8]) -> (String, Vec<u8>) {
    let mut stream = server.connect().await;
    stream.write_all(bytes).await.unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await.unwrap();
    let end = reply.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    (String::from_utf8(reply[..end].to_vec()).unwrap().to_lowercase(), reply[end + 4..].to_vec())
}

fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = Command::new("gzip").arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    gzip.stdin.take().unwrap().write_all(bytes).unwrap();
    gzip.wait_with_output().unwrap().stdout
}

#[tokio::test]
async fn long_replies_are_compressed_for_clients_that_accept_it() {
    let server = Setup::default().start().await;
    let body = json!({"prompt": "1 ".repeat(500)}).to_string();
    let send =
        |accepts: &str| request("POST", "/tokenize", &format!("connection: close\r\n{accepts}"), body.as_bytes());
    let (head, plain) = bytes(&server, &send("")).await;
    assert!(!head.contains("content-encoding") && plain.len() > 1024, "{head}");
    let (head, chunked) = bytes(&server, &send("accept-encoding: br, gzip\r\n")).await;
    assert!(head.contains("content-encoding: gzip") && head.contains("vary: accept-encoding"), "{head}");
    assert!(chunked.len() < plain.len());
    let compressed = unchunked(&chunked);
    assert_eq!(gunzip(&compressed), plain);
    let (head, _) = bytes(&server, &send("accept-encoding: gzip;q=0\r\n")).await;
    assert!(!head.contains("content-encoding"), "{head}");
}

#[tokio::test]
async fn short_replies_and_event_streams_are_never_compressed() {
    let server = Setup::default().start().await;
    let accepts = "accept-encoding: gzip\r\n";
    let live = server.raw(&request("GET", "/live", accepts, b"")).await;
    assert_eq!((live.status, live.header("content-encoding")), (200, None));
    let body = with(chat_body(), json!({"stream": true, "logprobs": true, "top_logprobs": 5})).to_string();
    let stream = server.raw(&request("POST", CHAT, accepts, body.as_bytes())).await;
    assert_eq!(stream.header("content-encoding"), None);
    assert!(stream.body.len() > 4096 && stream.body.ends_with("data: [DONE]\n\n"));
}
