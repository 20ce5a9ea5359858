//! What one key may take, and that it alone is refused beyond; what may wait of all; and that refusals are counted by reason.

use std::time::Duration;

use baton_engine::EngineConfig;
use baton_http::{KeyLimits, ListedKey, Scopes};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::{CHAT, Other, Reply, Server, Setup, chat_body, read_all, request, with};

fn listed(key: &str, limits: KeyLimits) -> ListedKey {
    let scopes = Scopes::INFERENCE.and(Scopes::METRICS);
    ListedKey { name: key.into(), digest: Sha256::digest(key).into(), scopes, expires: None, limits }
}

async fn serve(engine: EngineConfig, keys: Vec<ListedKey>) -> Server {
    let mut setup = Setup { reply: "word ".repeat(100), engine, ..Setup::default() };
    setup.config.listed_keys = Some(keys);
    setup.start().await
}

/// A chat of this key; what the mock says is ended by `max_tokens`.
async fn chat(server: &Server, key: &str, fields: Value) -> Reply {
    server.post_with_key(CHAT, key, &with(chat_body(), fields)).await
}

/// A chat that the client does not read yet.
async fn open_chat(server: &Server, key: &str, fields: Value) -> tokio::net::TcpStream {
    let body = with(chat_body(), fields).to_string();
    let mut stream = server.connect().await;
    let head = request("POST", CHAT, &format!("authorization: Bearer {key}\r\nconnection: close\r\n"), body.as_bytes());
    tokio::io::AsyncWriteExt::write_all(&mut stream, &head).await.unwrap();
    stream
}

fn count(reply: &Reply, reason: &str) -> u64 {
    let line = format!("baton_requests_refused_total{{reason=\"{reason}\"}} ");
    let value = reply.body.lines().find_map(|found| found.strip_prefix(&line));
    value.unwrap_or_else(|| panic!("no {line}")).parse().unwrap()
}

#[tokio::test]
async fn r9_a_key_beyond_its_requests_at_once_is_refused_and_no_other_is() {
    let limits = KeyLimits { max_concurrent_requests: Some(2), ..KeyLimits::default() };
    let server = serve(EngineConfig::default(), vec![listed("few", limits), listed("any", KeyLimits::default())]).await;
    server.control.delay_steps(Duration::from_millis(10));
    let running = open_chat(&server, "few", json!({"n": 2})).await;
    server.until("both run", |s| s.running == 2).await;
    server.control.hang();
    let refused = chat(&server, "few", json!({"max_tokens": 3})).await;
    assert_eq!((refused.status, refused.error_code().as_str()), (429, "rate_limit_exceeded"));
    assert_eq!(
        (refused.json()["error"]["type"].as_str(), refused.header("retry-after")),
        (Some("requests"), Some("1"))
    );
    let other = open_chat(&server, "any", json!({"max_tokens": 3})).await;
    server.control.delay_steps(Duration::ZERO);
    server.control.release();
    for stream in [running, other] {
        assert_eq!(read_all(stream).await.status, 200);
    }
    assert_eq!(chat(&server, "few", json!({"max_tokens": 3})).await.status, 200, "the places are free again");
    assert_eq!(count(&server.get("/metrics").await, "key_concurrency"), 1);
}

#[tokio::test]
async fn r9_tokens_are_charged_with_the_request_and_what_was_not_used_is_given_back() {
    let limits = KeyLimits { tokens_per_minute: Some(200), ..KeyLimits::default() };
    let server = serve(EngineConfig::default(), vec![listed("key", limits), listed("other", limits)]).await;
    server.control.hang();
    let stop = json!({"max_tokens": 120, "stop": "word"});
    let running = open_chat(&server, "key", stop.clone()).await;
    server.until("it is there", |s| s.running + s.waiting == 1).await;
    let refused = chat(&server, "key", json!({"max_tokens": 120})).await;
    assert_eq!((refused.status, refused.error_code().as_str()), (429, "rate_limit_exceeded"));
    assert_eq!(refused.json()["error"]["type"], "tokens");
    let after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((2..=60).contains(&after), "{after}");
    assert_eq!(refused.header("x-ratelimit-limit-tokens"), Some("200"));
    let remaining = |reply: &Reply| reply.header("x-ratelimit-remaining-tokens").unwrap().parse::<u64>().unwrap();
    assert!(remaining(&refused) < 80, "prompt and max_tokens are charged");
    server.control.release();
    assert_eq!(read_all(running).await.status, 200);
    // All but the prompt and a token or two.
    let next = chat(&server, "key", stop).await;
    assert_eq!(next.status, 200);
    assert!(remaining(&next) > 100, "{next:?}");
    assert_eq!(next.header("x-ratelimit-limit-requests"), None, "of limits that there are not, nothing is said");
    assert_eq!(chat(&server, "other", json!({"max_tokens": 120})).await.status, 200);
    assert_eq!(count(&server.get("/metrics").await, "key_rate"), 1);
}

#[tokio::test]
async fn r9_limits_hold_over_generations_and_when_the_list_is_read_again() {
    let limits = |limit| KeyLimits { requests_per_minute: Some(limit), ..KeyLimits::default() };
    let server = serve(EngineConfig::default(), vec![listed("key", limits(2))]).await;
    for left in ["1", "0"] {
        let reply = chat(&server, "key", json!({"max_tokens": 1})).await;
        assert_eq!((reply.status, reply.header("x-ratelimit-remaining-requests")), (200, Some(left)));
    }
    let (_other, new) = Other::saying(7, "hello");
    server.service.install(new);
    server.service.replace_listed_keys(&[listed("key", limits(2))]);
    let refused = chat(&server, "key", json!({"max_tokens": 1})).await;
    assert_eq!((refused.status, refused.header("x-ratelimit-remaining-requests")), (429, Some("0")));
    server.service.replace_listed_keys(&[listed("key", limits(50))]);
    assert_eq!(chat(&server, "key", json!({"max_tokens": 1})).await.status, 200, "another limit holds at once");
}

#[tokio::test]
async fn r8_refusals_are_counted_by_reason_and_begin_at_zero() {
    let engine =
        EngineConfig { max_num_seqs: 1, max_queued: 2, max_queued_tokens: Some(60), ..EngineConfig::default() };
    let server = serve(engine, vec![listed("key", KeyLimits::default())]).await;
    let reasons = ["queue_full", "queued_tokens", "key_concurrency", "key_rate", "too_long", "draining", "deadline"];
    let metrics = server.get("/metrics").await;
    reasons.iter().for_each(|reason| assert_eq!(count(&metrics, reason), 0, "{reason}"));
    server.control.delay_steps(Duration::from_millis(20));
    let running = open_chat(&server, "key", json!({})).await;
    server.until("one runs", |s| s.running == 1).await;
    let long = json!({"messages": [{"role": "user", "content": "word ".repeat(80)}], "max_tokens": 3});
    let waiting = open_chat(&server, "key", long.clone()).await;
    server.until("one waits", |s| s.waiting == 1).await;
    server.control.hang();
    for (fields, expected) in [(long, "queued_tokens"), (json!({"n": 2}), "queue_full")] {
        let refused = chat(&server, "key", fields).await;
        assert_eq!((refused.status, refused.error_code().as_str()), (503, "overloaded"), "{expected}");
        assert!(refused.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
    }
    assert_eq!(chat(&server, "key", json!({"max_tokens": 100_000})).await.status, 400);
    server.control.delay_steps(Duration::ZERO);
    server.control.release();
    for stream in [running, waiting] {
        assert_eq!(read_all(stream).await.status, 200);
    }
    let timeout = chat(&server, "key", json!({"deadline_ms": 1})).await;
    assert_eq!(timeout.status, 408, "{timeout:?}");
    server.service.drain();
    assert_eq!(chat(&server, "key", json!({})).await.status, 503);
    // What a probe is told is no refusal.
    assert_eq!(server.get("/ready").await.status, 503);
    let metrics = server.get("/metrics").await;
    for reason in reasons {
        let expected = u64::from(!reason.starts_with("key"));
        assert_eq!(count(&metrics, reason), expected, "{reason}");
    }
}

#[tokio::test]
async fn r12_a_key_that_comes_to_an_engine_full_of_anothers_requests_is_answered_before_them() {
    let engine = EngineConfig { max_num_seqs: 4, ..EngineConfig::default() };
    let server =
        serve(engine, vec![listed("flood", KeyLimits::default()), listed("quiet", KeyLimits::default())]).await;
    server.control.delay_steps(Duration::from_millis(20));
    let mut flood = Vec::new();
    for _ in 0..12 {
        flood.push(open_chat(&server, "flood", json!({})).await);
    }
    server.until("the flood fills the engine", |s| s.running == 4 && s.waiting == 8).await;
    let quiet = open_chat(&server, "quiet", json!({"max_tokens": 2})).await;
    assert_eq!(read_all(quiet).await.status, 200);
    let stats = server.engine.stats();
    assert!(stats.finished.total() < 12 && stats.preemptions == 1, "{stats:?}");
    server.control.delay_steps(Duration::ZERO);
    for stream in flood {
        assert_eq!(read_all(stream).await.status, 200);
    }
}
