//! Who may do what: listed keys, their scopes and ends, every route without a key, and whose the cached prefixes are.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use baton_http::{KeyLimits, ListedKey, Scopes, Surface};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::{CHAT, REPLY, Reply, Server, Setup, chat_body, raw, read_until, request, with};

/// What anybody may see.
/// Routes that need no key.
pub const PUBLIC: [&str; 14] = [
    "/",
    "/page/app.js",
    "/live",
    "/ready",
    "/startup",
    "/health",
    "/health/live",
    "/health/ready",
    "/health/startup",
    "/v2/health/live",
    "/v2/health/ready",
    "/version",
    "/openapi.json",
    "/docs",
];

pub fn listed(key: &str, scopes: Scopes) -> ListedKey {
    ListedKey {
        name: format!("name-of-{key}"),
        digest: Sha256::digest(key).into(),
        scopes,
        expires: None,
        limits: KeyLimits::default(),
    }
}

async fn serve(keys: Vec<ListedKey>) -> Server {
    let mut setup = Setup::default();
    setup.config.listed_keys = Some(keys);
    setup.start().await
}

fn with_key(method: &str, path: &str, key: &str) -> Vec<u8> {
    request(method, path, &format!("authorization: Bearer {key}\r\n"), b"{}")
}

#[tokio::test]
async fn a_listed_key_opens_what_its_scopes_say_and_a_list_opens_nothing_without_one() {
    let all = Scopes::INFERENCE.and(Scopes::ADMIN).and(Scopes::METRICS);
    let keys = Scopes::NAMES.map(|(name, scope)| listed(name, scope));
    let server = serve(keys.into_iter().chain([listed("all", all)]).collect()).await;
    let addr = server.listen_on("0.0.0.0", Surface::All).await;
    let routes = [("inference", "/v1/models"), ("admin", "/admin/generations"), ("metrics", "/metrics")];
    for (scope, path) in routes {
        for (key, _) in routes.iter().chain([&("all", "")]) {
            let expected = if *key == scope || *key == "all" { 200 } else { 403 };
            assert_eq!(raw(addr, &with_key("GET", path, key)).await.status, expected, "{key} at {path}");
        }
        for headers in ["", "authorization: Bearer name-of-all\r\n"] {
            assert_eq!(raw(addr, &request("GET", path, headers, b"")).await.status, 401, "{path}");
        }
    }
    assert_eq!(server.get("/metrics").await.status, 200, "open on loopback");
    let reply = raw(addr, &with_key("GET", "/nope", "metrics")).await;
    assert_eq!((reply.status, reply.error_code().as_str()), (403, "insufficient_scope"));
}

#[tokio::test]
async fn an_expired_key_is_told_so_and_opens_nothing() {
    let hour = Duration::from_secs(3600);
    let until = |key: &str, expires| ListedKey { expires: Some(expires), ..listed(key, Scopes::INFERENCE) };
    let now = SystemTime::now();
    let server = serve(vec![until("old", now - hour), until("new", now + hour)]).await;
    assert_eq!(server.get_with_key("/v1/models", "new").await.status, 200);
    let reply = server.get_with_key("/v1/models", "old").await;
    assert_eq!((reply.status, reply.error_code().as_str()), (401, "expired_api_key"));
    assert!(reply.body.contains("expired"));
    assert_eq!(server.get_with_key("/v1/models", "other").await.error_code(), "invalid_api_key");
}

#[tokio::test]
async fn the_list_is_replaced_while_a_stream_goes_on() {
    let mut setup = Setup { reply: "word ".repeat(150), ..Setup::default() };
    setup.config.listed_keys = Some(vec![listed("first", Scopes::INFERENCE)]);
    setup.config.api_keys = vec![baton_http::ApiKey::new("flag".into()).unwrap()];
    let server = setup.start().await;
    server.control.delay_steps(Duration::from_millis(5));
    let body = with(chat_body(), json!({"stream": true})).to_string();
    let mut stream = server.connect().await;
    let head = request("POST", CHAT, "authorization: Bearer first\r\n", body.as_bytes());
    tokio::io::AsyncWriteExt::write_all(&mut stream, &head).await.unwrap();
    read_until(&mut stream, "word").await;
    server.service.replace_listed_keys(&[listed("second", Scopes::INFERENCE)]);
    assert_eq!(server.get_with_key("/v1/models", "first").await.status, 401);
    assert_eq!(server.get_with_key("/v1/models", "second").await.status, 200);
    assert_eq!(server.get_with_key("/v1/models", "flag").await.status, 200, "that of the settings stays");
    server.control.delay_steps(Duration::ZERO);
    read_until(&mut stream, "[DONE]").await;
    server.service.replace_listed_keys(&[]);
    assert_eq!(server.get("/v1/models").await.status, 401, "no list is left, but there was to be one");
}

/// All routes, with something in the place of their parameters.
fn routes(server: &Server) -> BTreeSet<String> {
    // The one way to ask a router for its routes.
    let debug = format!("{:?}", baton_http::router(server.service.clone(), Surface::All));
    let routes = debug.split('"').filter(|text| text.starts_with('/') && !text.contains("__private"));
    routes
        .map(|route| {
            route
                .replace("{*id}", "tiny")
                .replace("{command}", "share")
                .replace("{id}", "none")
                .replace("{file}", "app.js")
        })
        .collect()
}

/// Other ways to write a path, of which some routers make the same.
fn tricks(path: &str) -> Vec<String> {
    let rest = path.trim_start_matches('/');
    let mut tricks: Vec<String> =
        ["/", "/live/..", "/./", "/live/%2e%2e", "/%2f", "/live%2f..", "/;/", "\\", "http://live", "http://x/live/.."]
            .iter()
            .map(|before| format!("{before}{path}"))
            .collect();
    tricks.extend(
        ["/", "/.", "?", "?/live", ";/live", "%00", "/live", "%20", "/..;/live"].map(|after| format!("{path}{after}")),
    );
    tricks.extend([
        format!("/{}", rest.replace('/', "%2f")),
        format!("/{}", rest.replace('/', "//")),
        format!("/{}", rest.to_uppercase()),
        format!("/%{:02x}{}", rest.as_bytes().first().unwrap_or(&b'x'), rest.get(1..).unwrap_or_default()),
    ]);
    tricks
}

#[tokio::test]
async fn r47_every_route_but_the_public_ones_is_closed_however_it_is_written() {
    let server = serve(vec![listed("all", Scopes::INFERENCE.and(Scopes::ADMIN).and(Scopes::METRICS))]).await;
    // Where metrics ask for a key as well.
    let addr = server.listen_on("0.0.0.0", Surface::All).await;
    let routes = routes(&server);
    assert!(routes.len() > 30, "{routes:?}");
    for path in PUBLIC {
        assert!(routes.contains(path), "{path} is no route");
        assert_eq!(raw(addr, &request("GET", path, "", b"")).await.status, 200, "{path}");
    }
    for path in routes.iter().filter(|path| !PUBLIC.contains(&path.as_str())) {
        for method in ["GET", "HEAD", "POST", "DELETE", "OPTIONS", "get", "BREW"] {
            assert_eq!(raw(addr, &request(method, path, "", b"{}")).await.status, 401, "{method} {path}");
        }
        for headers in [
            "authorization: Bearer\r\n",
            "authorization: Basic YWxsOmFsbA==\r\n",
            "x-api-key: \r\n",
            "x-original-url: /live\r\n",
            "x-forwarded-for: 127.0.0.1\r\n",
            "x-http-method-override: OPTIONS\r\n",
        ] {
            assert_eq!(raw(addr, &request("POST", path, headers, b"{}")).await.status, 401, "{path} {headers}");
        }
        for host in ["", "localhost", "/live", "x/live?"] {
            let head = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
            assert_eq!(raw(addr, head.as_bytes()).await.status, 401, "{path} of {host}");
        }
        for trick in tricks(path) {
            let status = raw(addr, &request("GET", &trick, "", b"")).await.status;
            // What is no target of a request does not even get to be asked for a key.
            assert!(status == 401 || (status == 400 && trick.starts_with('\\')), "{trick}: {status}");
        }
    }
}

#[tokio::test]
async fn every_reply_says_what_browsers_may_do_with_it() {
    let server = serve(vec![listed("k", Scopes::INFERENCE)]).await;
    let headers = [
        ("cache-control", "no-store"),
        ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
        ("x-frame-options", "DENY"),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
    ];
    let replies = [
        server.get("/live").await,
        server.get("/nope").await,
        server.get("/metrics").await,
        server.get_with_key("/v1/models", "k").await,
        server.get_with_key("/v1/models/%ff", "k").await,
        server.post_with_key(CHAT, "k", &chat_body()).await,
        server.post_with_key(CHAT, "k", &json!({})).await,
        server.raw(&request("BREW", "/live", "", b"")).await,
    ];
    for reply in replies {
        for (name, value) in headers {
            assert_eq!(reply.header(name), Some(value), "{reply:?}");
        }
    }
    let page = server.get("/docs").await;
    assert!(page.header("content-security-policy").unwrap().contains("script-src"), "a page has its own");
    assert_eq!(page.header("x-frame-options"), Some("DENY"));
    let stream = server.post_with_key(CHAT, "k", &with(chat_body(), json!({"stream": true}))).await;
    assert_eq!(stream.header("x-content-type-options"), Some("nosniff"));
}

/// Tokens of the prompt that were found, and how many were computed.
async fn ask(server: &Server, key: &str, fields: Value) -> (u64, usize) {
    let before = server.control.computed_tokens();
    let fields = with(json!({"max_tokens": 1, "messages": [{"role": "user", "content": REPLY}]}), fields);
    let reply: Reply = server.post_with_key(CHAT, key, &fields).await;
    let usage = &reply.json()["usage"];
    assert_eq!(reply.status, 200, "{reply:?}");
    let computed = server.control.computed_tokens() - before;
    (usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(), computed as usize)
}

#[tokio::test]
async fn r41_what_one_key_has_sent_no_other_finds() {
    let server = serve(vec![listed("a", Scopes::INFERENCE), listed("b", Scopes::INFERENCE)]).await;
    let (cached, whole) = ask(&server, "a", json!({})).await;
    assert_eq!(cached, 0);
    assert_eq!(ask(&server, "b", json!({})).await, (0, whole), "another key");
    let (cached, computed) = ask(&server, "a", json!({})).await;
    assert!(cached > 8 && computed + cached as usize == whole, "{cached} and {computed} of {whole}");
    assert_eq!(ask(&server, "a", json!({"cache_salt": "s"})).await, (0, whole), "another salt");
    assert!(ask(&server, "a", json!({"cache_salt": "s"})).await.0 > 8);
    assert_eq!(ask(&server, "b", json!({"cache_salt": "s"})).await, (0, whole), "another key with this salt");
}

#[tokio::test]
async fn r41_a_scope_that_is_shared_on_purpose_is_shared() {
    let mut setup = Setup::default();
    setup.config.listed_keys = Some(vec![listed("a", Scopes::INFERENCE), listed("b", Scopes::INFERENCE)]);
    setup.config.shared_prefix_cache = true;
    let server = setup.start().await;
    assert_eq!(ask(&server, "a", json!({})).await.0, 0);
    assert!(ask(&server, "b", json!({})).await.0 > 8);
    assert_eq!(ask(&server, "b", json!({"cache_salt": "s"})).await.0, 0, "a salt still separates");
}
