//! Pages that a browser was led to, and a service that needs no key: what they can make it do.

use baton_http::{ApiKey, Scopes, Surface};
use serde_json::json;

use crate::harness::{CHAT, Reply, Server, Setup, chat_body, raw, request, with};
use crate::keys::listed;

/// A service without keys on a loopback address, which is called by these names besides.
async fn server(hosts: &[&str], origins: &[&str]) -> Server {
    let mut setup = Setup::default();
    setup.config.allowed_hosts = hosts.iter().map(|host| host.parse().unwrap()).collect();
    setup.config.allowed_origins = origins.iter().map(|origin| origin.parse().unwrap()).collect();
    setup.start().await
}

fn body() -> String {
    with(chat_body(), json!({"max_tokens": 2})).to_string()
}

/// A request with this `Host` and these headers.
async fn send(server: &Server, method: &str, path: &str, host: &str, headers: &str) -> Reply {
    let bytes = request(method, path, headers, if method == "POST" { body() } else { String::new() }.as_bytes());
    let head = String::from_utf8(bytes).unwrap().replacen("host: localhost\r\n", host, 1);
    server.raw(head.as_bytes()).await
}

/// The status of a chat that is sent to an address that others reach.
async fn elsewhere(server: &Server, host: &str) -> u16 {
    let addr = server.listen_on("0.0.0.0", Surface::All).await;
    let bytes = String::from_utf8(request("POST", CHAT, "", body().as_bytes())).unwrap();
    raw(addr, bytes.replacen("host: localhost\r\n", host, 1).as_bytes()).await.status
}

#[tokio::test]
async fn a_name_that_a_page_can_have_made_lead_here_is_refused_with_what_is_taken() {
    let server = server(&[], &[]).await;
    for (method, path) in [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nope")] {
        for host in ["evil.example", "evil.example:8000", "localhost.evil.example", "user@evil.example", "a b"] {
            let host = format!("host: {host}\r\n");
            // With DNS rebinding the page is one of this name, and says so.
            let reply = send(&server, method, path, &host, "sec-fetch-site: same-origin\r\n").await;
            assert_eq!((reply.status, reply.error_code()), (403, "host_not_allowed".into()), "{method} {path} {host}");
            assert!(reply.body.contains("localhost") && reply.body.contains("--allowed-hosts"), "{reply:?}");
            assert!(!reply.body.contains("evil"), "{reply:?}");
        }
    }
    // Of two names both must be good, and a target that is written in full is one.
    for head in [
        "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\nconnection: close\r\n\r\n",
        "GET http://evil.example/v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
    ] {
        let status = server.raw(head.as_bytes()).await.status;
        assert!(matches!(status, 400 | 403), "{head}: {status}");
    }
}

#[tokio::test]
async fn addresses_localhost_and_names_that_are_given_are_taken_with_any_port_and_so_is_none() {
    let server = server(&["baton.lan"], &[]).await;
    for host in
        ["localhost", "LocalHost:8000", "app.localhost:1", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "Baton.lan:80"]
    {
        let host = format!("host: {host}\r\n");
        assert_eq!(send(&server, "POST", CHAT, &host, "").await.status, 200, "{host}");
        assert_eq!(send(&server, "GET", "/metrics", &host, "").await.status, 200, "{host}");
    }
    assert_eq!(server.raw(b"GET /v1/models HTTP/1.0\r\n\r\n").await.status, 200);
    assert_eq!(send(&self::server(&["*"], &[]).await, "POST", CHAT, "host: evil.example\r\n", "").await.status, 200);
}

#[tokio::test]
async fn probes_and_whoever_shows_a_key_may_call_by_any_name_and_so_may_all_where_others_reach() {
    let server = server(&[], &[]).await;
    let any = "host: pod-7.example\r\n";
    for path in ["/live", "/ready", "/health", "/version", "/"] {
        assert_eq!(send(&server, "GET", path, any, "").await.status, 200, "{path}");
    }
    assert_eq!(elsewhere(&server, any).await, 200);

    let mut setup = Setup::default();
    setup.config.listed_keys = Some(vec![listed("k", Scopes::INFERENCE.and(Scopes::METRICS))]);
    let server = setup.start().await;
    for (path, method) in [(CHAT, "POST"), ("/metrics", "GET")] {
        assert_eq!(send(&server, method, path, any, "authorization: Bearer k\r\n").await.status, 200, "{path}");
    }
    assert_eq!(send(&server, "POST", CHAT, any, "").await.status, 401);
    // Metrics are open on a loopback address, and not to pages.
    assert_eq!(send(&server, "GET", "/metrics", any, "").await.error_code(), "host_not_allowed");
}

#[tokio::test]
async fn where_others_reach_names_are_looked_at_if_some_are_listed() {
    let mut setup = Setup::default();
    setup.config.allowed_hosts = vec!["baton.lan".parse().unwrap()];
    setup.config.check_hosts_everywhere = true;
    let server = setup.start().await;
    for (host, status) in [("baton.lan", 200), ("10.1.2.3:8000", 200), ("localhost", 200), ("evil.example", 403)] {
        assert_eq!(elsewhere(&server, &format!("host: {host}\r\n")).await, status, "{host}");
    }
}

#[tokio::test]
async fn a_page_of_elsewhere_changes_nothing_whatever_content_type_it_sends() {
    let server = server(&[], &["https://friend.example", "chrome-extension://abcdef"]).await;
    let local = "host: localhost:8000\r\n";
    for (path, kind) in [(CHAT, "text/plain"), ("/v1/completions", "application/json"), ("/nope", "text/plain")] {
        for page in [
            "origin: https://evil.example\r\n",
            "origin: null\r\n",
            "origin: http://localhost:3000\r\n",
            "origin: https://friend.example.evil\r\n",
            "origin: http://evil.example\r\nsec-fetch-site: cross-site\r\n",
            "sec-fetch-site: same-site\r\n",
        ] {
            let headers = format!("content-type: {kind}\r\n{page}");
            let reply = send(&server, "POST", path, local, &headers).await;
            assert_eq!((reply.status, reply.error_code()), (403, "origin_not_allowed".into()), "{path} {page}");
            assert!(reply.body.contains("--allowed-origins") && !reply.body.contains("evil"), "{reply:?}");
        }
        assert_eq!(server.control.steps(), 0, "nothing was computed");
    }
    for page in
        ["origin: https://friend.example\r\nsec-fetch-site: cross-site\r\n", "origin: chrome-extension://abcdef\r\n"]
    {
        assert_eq!(send(&server, "POST", CHAT, local, page).await.status, 200, "{page}");
    }
    // What only reads needs no more than that nobody else can read the reply.
    assert_eq!(send(&server, "GET", "/v1/models", local, "origin: https://evil.example\r\n").await.status, 200);
}

#[tokio::test]
async fn pages_of_the_service_and_programs_go_on_working() {
    let server = server(&[], &[]).await;
    for headers in [
        // Chromium, Firefox; Safari as it was; behind a proxy that ends TLS and calls by another name.
        "origin: http://localhost:8000\r\nsec-fetch-site: same-origin\r\ncontent-type: application/json\r\n",
        "origin: http://localhost:8000\r\ncontent-type: application/json\r\n",
        "origin: https://baton.example\r\nsec-fetch-site: same-origin\r\n",
        // curl -d, and the libraries.
        "content-type: application/x-www-form-urlencoded\r\n",
        "authorization: Bearer EMPTY\r\ncontent-type: application/json\r\nx-stainless-lang: python\r\n",
        "",
    ] {
        assert_eq!(send(&server, "POST", CHAT, "host: localhost:8000\r\n", headers).await.status, 200, "{headers}");
    }
}

#[tokio::test]
async fn a_key_vouches_for_a_page_and_one_that_nobody_knows_does_not() {
    let mut setup = Setup::default();
    setup.config.admin_api_keys = vec![ApiKey::new("admin".into()).unwrap()];
    let server = setup.start().await;
    let page = "origin: https://evil.example\r\n";
    for (key, status) in [("admin", 200), ("EMPTY", 403)] {
        let headers = format!("{page}authorization: Bearer {key}\r\n");
        assert_eq!(send(&server, "POST", CHAT, "host: localhost\r\n", &headers).await.status, status, "{key}");
    }
}
