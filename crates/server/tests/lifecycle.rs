//! The real binary over its life: ready, hostile requests, clients that leave, SIGTERM.

use std::{path::Path, time::Duration};

use baton_loadgen::{Client, LocalServer};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

async fn start() -> LocalServer {
    LocalServer::start(Path::new(env!("CARGO_BIN_EXE_baton")), &["--log-level", "warn"]).await.expect("it starts")
}

fn question(extra: Value) -> Value {
    let mut body =
        json!({"model": "abacus", "temperature": 0, "messages": [{"role": "user", "content": "What is 347 + 286?"}]});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

async fn assert_serves(client: &Client) {
    let reply = client.stream(CHAT, question(json!({}))).await.expect("it still serves");
    assert_eq!(reply.content, "347 + 286 = 633.");
    assert!(reply.reasoning.contains("633"), "{}", reply.reasoning);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_requests_get_4xx_objects_and_the_server_goes_on() {
    let server = start().await;
    let client = server.client();
    let long = "7".repeat(5000);
    let cases = [
        (400, question(json!({"temperature": -1}))),
        (400, question(json!({"max_tokens": -5}))),
        (400, question(json!({"top_p": 1e9}))),
        (400, question(json!({"n": 1_000_000_000}))),
        (400, question(json!({"frobnicate": 1}))),
        (400, question(json!({"messages": [{"role": "user", "content": long}]}))),
        (400, question(json!({"messages": "hi"}))),
        (404, question(json!({"model": "other"}))),
        (413, question(json!({"user": "x".repeat(100 << 20)}))),
    ];
    for (status, body) in cases {
        // A body refused half way may also reach this client as a reset connection, its answer unread; that the
        // answer is a 413 object is tested at the socket, in the http crate.
        match client.post(CHAT, &body).await {
            Ok((got, reply)) => {
                assert_eq!(got, status, "{reply}");
                assert!(reply["error"]["message"].is_string() && reply["error"]["type"].is_string(), "{reply}");
            }
            Err(error) => assert_eq!(status, 413, "{error:#}"),
        }
        assert_serves(&client).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_leave_free_their_blocks() {
    let server = start().await;
    let mut open = Vec::new();
    for n in 0..20 {
        let client = server.client();
        let body = question(json!({"max_tokens": 900, "ignore_eos": true, "seed": n}));
        let stream = client.open_stream(CHAT, body).await.expect("a stream");
        open.push((client, stream));
    }
    drop(open);
    let mut last = (0.0, 0.0);
    for _ in 0..400 {
        let used = server.metric("vllm:kv_cache_usage_perc").await.expect("a metric");
        last = (used, server.metric("vllm:num_requests_running").await.expect("a metric"));
        if last == (0.0, 0.0) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(last, (0.0, 0.0), "cache use and running requests, ten seconds after the clients left");
    assert_serves(&server.client()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_finishes_what_runs_refuses_what_comes_and_exits_with_0() {
    let mut server = start().await;
    let client = server.client();
    let running = tokio::spawn({
        let client = client.clone();
        async move { client.stream(CHAT, question(json!({"max_tokens": 900, "ignore_eos": true}))).await }
    });
    while server.metric("vllm:num_requests_running").await.expect("a metric") == 0.0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    server.terminate().expect("a signal");
    // Until the listener closes, newcomers are told; after it, they cannot connect.
    let mut refused = 0;
    for _ in 0..50 {
        match server.client().post(CHAT, &question(json!({}))).await {
            Ok((status, reply)) if status == 503 => {
                assert_eq!(reply["error"]["code"], "draining", "{reply}");
                refused += 1;
            }
            Ok((status, reply)) => assert_eq!(status, 200, "only what came before the signal: {reply}"),
            Err(_) => break,
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(refused > 0, "no newcomer was told that the server drains");
    let reply = running.await.expect("no panic").expect("the running stream completes");
    assert_eq!((reply.finish_reason.as_str(), reply.output_tokens), ("length", 900));
    assert!(server.wait(Duration::from_secs(30)).await.expect("it ends").success());
}
