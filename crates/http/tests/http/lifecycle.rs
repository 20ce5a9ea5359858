//! Loading, overload, faults, clients that leave, and the drain.

use std::sync::Arc;
use std::time::Duration;

use baton_engine::EngineConfig;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::harness::{
    CHAT, COMPLETIONS, CONTENT, PATIENCE, Reply, Server, Setup, chat_body, eventually, read_all, read_until, request,
    with,
};

/// A reply of many tokens, slowly: what is under way stays so.
async fn slow() -> Server {
    let server = Setup { reply: "word ".repeat(150), ..Setup::default() }.start().await;
    server.control.delay_steps(Duration::from_millis(5));
    server
}

#[tokio::test]
async fn before_a_model_is_installed_probes_answer_and_inference_says_loading() {
    let (server, card) = Setup::default().start_loading().await;
    assert_eq!(server.get("/live").await.status, 200);
    assert_eq!(server.get("/version").await.status, 200);
    assert_eq!(server.get("/metrics").await.status, 200);
    for path in ["/ready", "/health", "/startup", "/v1/models", "/v1/models/tiny"] {
        let reply = server.get(path).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (503, "model_loading"), "{path}");
        assert!(reply.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
    }
    let reply = server.chat(json!({})).await;
    assert_eq!((reply.status, reply.error_code().as_str()), (503, "model_loading"));
    server.install(card);
    assert_eq!(server.get("/ready").await.status, 200);
    assert_eq!(server.chat(json!({})).await.status, 200);
}

#[tokio::test]
async fn r1_a_client_that_leaves_mid_stream_frees_its_blocks() {
    let server = slow().await;
    let mut streams = Vec::new();
    for _ in 0..8 {
        streams.push(server.open_chat(json!({"stream": true, "n": 2})).await);
    }
    for stream in &mut streams {
        read_until(stream, "word").await;
    }
    drop(streams);
    server.blocks_are_free().await;
    let stats = server.engine.stats();
    assert_eq!(stats.finished.aborted, 16, "{stats:?}");
    assert!(stats.generated_tokens < 16 * 150);
}

#[tokio::test]
async fn r2_a_client_that_leaves_in_its_prefill_leaves_nothing() {
    let server = slow().await;
    server.control.hang();
    let client = server.open_chat(json!({})).await;
    server.until("a step under way", |s| s.step_under_way.is_some()).await;
    drop(client);
    eventually_in_flight(&server, 0).await;
    server.control.release();
    server.until("aborted", |s| s.finished.aborted == 1).await;
    server.blocks_are_free().await;
    assert!(server.engine.stats().generated_tokens <= 1);
}

#[tokio::test]
async fn r2_a_client_that_leaves_in_the_queue_does_not_wait_for_its_turn() {
    let server = one_at_a_time(10).await;
    let running = server.open_chat(json!({})).await;
    server.until("one runs", |s| s.running == 1).await;
    let queued = server.open_chat(json!({"stream": true})).await;
    server.until("one waits", |s| s.waiting == 1).await;
    drop(queued);
    server.until("none waits", |s| s.waiting == 0 && s.finished.aborted == 1 && s.running == 1).await;
    drop(running);
    server.blocks_are_free().await;
}

/// A server that runs one sequence at a time, so slowly that it is still running when the test looks.
async fn one_at_a_time(max_queued: usize) -> Server {
    let engine = EngineConfig { max_queued, max_num_seqs: 1, ..EngineConfig::default() };
    let server = Setup { reply: "word ".repeat(150), engine, ..Setup::default() }.start().await;
    server.control.delay_steps(Duration::from_millis(20));
    server
}

async fn eventually_in_flight(server: &Server, count: usize) {
    let line = format!("baton_http_requests_in_flight {count}\n");
    let wait = async {
        while !server.get("/metrics").await.body.contains(&line) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never {count} in flight"));
}

#[tokio::test]
async fn r3_a_client_that_leaves_a_whole_reply_ends_its_work() {
    let server = slow().await;
    let connection = server.open_chat(json!({"n": 2})).await;
    server.until("running", |s| s.running == 2).await;
    drop(connection);
    server.blocks_are_free().await;
    assert_eq!(server.engine.stats().finished.aborted, 2);
    let metrics = server.get("/metrics").await.body;
    assert!(
        metrics.contains("vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",generation=\"0123456789ab\",model_name=\"tiny\"} 2")
    );
}

#[tokio::test]
async fn r8_a_full_queue_refuses_at_once_counts_n_and_leaves_the_server_ready() {
    let server = one_at_a_time(3).await;
    let running = server.open_chat(json!({})).await;
    server.until("one runs", |s| s.running == 1).await;
    let waiting = server.open_chat(json!({"n": 2})).await;
    server.until("two wait", |s| s.waiting == 2).await;
    let refused = server.chat(json!({"n": 2})).await;
    assert_eq!((refused.status, refused.error_code().as_str()), (503, "overloaded"));
    assert!(refused.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
    assert_eq!(server.get("/ready").await.status, 200);
    assert!(server.get("/metrics").await.body.contains("reason=\"queue_full\"} 1"));
    drop(waiting);
    server.until("none waits", |s| s.waiting == 0).await;
    server.control.delay_steps(Duration::ZERO);
    assert_eq!(server.chat(json!({"n": 2})).await.status, 200, "the place is free again");
    assert_eq!(read_all(running).await.status, 200);
}

#[tokio::test]
async fn r10_what_waits_too_long_in_the_queue_is_told_so_and_never_runs() {
    let engine = EngineConfig { max_num_seqs: 1, ..EngineConfig::default() };
    let mut setup = Setup { reply: "word ".repeat(150), engine, ..Setup::default() };
    setup.config.queue_timeout = Some(Duration::from_millis(100));
    let server = setup.start().await;
    server.control.delay_steps(Duration::from_millis(20));
    let running = server.open_chat(json!({})).await;
    server.until("one is computed", |s| s.generated_tokens > 0).await;
    let computed = server.engine.stats().prompt_tokens_computed;
    // The head of a stream is held until it has something to say, so it too has a status of its own.
    for fields in [json!({}), json!({"stream": true})] {
        let reply = server.chat(fields).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (503, "overloaded"), "{reply:?}");
        assert!(reply.header("retry-after").is_some());
    }
    drop(running);
    server.blocks_are_free().await;
    assert_eq!(server.engine.stats().prompt_tokens_computed, computed, "neither was begun");
    server.control.delay_steps(Duration::ZERO);
    assert_eq!(server.chat(json!({})).await.status, 200);
}

#[tokio::test]
async fn r13_values_that_are_not_finite_fail_their_request_only() {
    let server = Setup::default().start().await;
    let poison = 700;
    server.control.not_finite_on_token(poison);
    let poisoned = json!({"prompt": [5, poison, 6]});
    let sound = json!({"prompt": [5, 6, 7], "max_tokens": 30, "seed": 1});
    let alone = server.post(COMPLETIONS, &sound).await.json();
    server.control.delay_steps(Duration::from_millis(2));
    let streamed = with(poisoned.clone(), json!({"stream": true}));
    let (bad, bad_stream, good) = tokio::join!(
        server.post(COMPLETIONS, &poisoned),
        server.post(COMPLETIONS, &streamed),
        server.post(COMPLETIONS, &sound),
    );
    // The stream fails before its first token, so it too has a status of its own.
    for reply in [bad, bad_stream] {
        assert_eq!((reply.status, reply.error_code().as_str()), (500, "engine_error"), "{reply:?}");
        assert_eq!(reply.header("x-should-retry"), Some("false"));
    }
    assert_eq!(good.json()["choices"], alone["choices"]);
    server.blocks_are_free().await;
    assert!(
        server
            .get("/metrics")
            .await
            .body
            .contains("vllm:corrupted_requests_total{engine=\"0\",generation=\"0123456789ab\",model_name=\"tiny\"} 2")
    );
}

#[tokio::test]
async fn r49_a_failure_behind_the_head_is_an_error_event_without_done() {
    let server = slow().await;
    let mut stream = server.open_chat(json!({"stream": true})).await;
    let mut text = read_until(&mut stream, "word").await;
    server.control.fail_steps(1);
    text += &read_until(&mut stream, "0\r\n\r\n").await;
    let event = text.split("\n\n").filter(|event| event.contains("data: ")).last().unwrap();
    let error: serde_json::Value = serde_json::from_str(&event[event.find("data: ").unwrap() + 6..]).unwrap();
    assert_eq!(error["error"]["type"], "server_error");
    assert_eq!(error["error"]["code"], "engine_error");
    assert!(!text.contains("[DONE]"));
    server.blocks_are_free().await;
    assert_eq!(server.chat(json!({"max_tokens": 3})).await.status, 200);
}

#[tokio::test]
async fn r16_a_panic_of_the_engine_fails_what_ran_and_nothing_else() {
    let server = slow().await;
    server.control.panic_steps(1);
    let reply = server.chat(json!({})).await;
    assert_eq!(reply.status, 500, "{reply:?}");
    reply.error_code();
    assert_eq!(server.get("/live").await.status, 200);
    assert_eq!(server.chat(json!({"max_tokens": 3})).await.status, 200);
}

#[tokio::test]
async fn a_silent_stream_sends_comments() {
    let mut setup = Setup::default();
    setup.config.keep_alive = Duration::from_millis(20);
    let server = setup.start().await;
    server.control.hang();
    let mut stream = server.open_chat(json!({"stream": true})).await;
    let text = read_until(&mut stream, ": keep-alive\n\n").await;
    assert!(text.contains("200 OK") && text.contains("\"role\":\"assistant\""), "{text}");
    server.control.release();
    read_until(&mut stream, "[DONE]").await;
}

#[tokio::test]
async fn r19_a_drain_refuses_at_once_and_lets_streams_finish() {
    let server = Setup { reply: "word ".repeat(150), ..Setup::default() }.start().await;
    server.control.delay_steps(Duration::from_millis(20));
    let mut stream = server.open_chat(json!({"stream": true})).await;
    read_until(&mut stream, "word").await;
    server.shutdown.cancel();
    eventually_draining(&server).await;
    for reply in [server.get("/ready").await, server.chat(json!({})).await] {
        assert_eq!((reply.status, reply.error_code().as_str()), (503, "draining"), "{reply:?}");
        assert!(reply.header("retry-after").is_some());
    }
    // The head of the stream is out long ago: what keeps the server here is its body.
    assert_eq!(server.get("/live").await.status, 200);
    assert!(!server.served.is_finished());
    server.control.delay_steps(Duration::ZERO);
    read_until(&mut stream, "[DONE]").await;
    timeout(PATIENCE, server.served).await.unwrap().unwrap().unwrap();
}

async fn eventually_draining(server: &Server) {
    let wait = async { while server.get("/ready").await.status == 200 {} };
    timeout(PATIENCE, wait).await.expect("never draining");
}

#[tokio::test]
async fn r19_what_outlasts_the_drain_gets_an_error_event() {
    let setup = Setup { reply: "word ".repeat(150), drain_timeout: Duration::from_millis(50), ..Setup::default() };
    let server = setup.start().await;
    server.control.delay_steps(Duration::from_millis(20));
    let mut stream = server.open_chat(json!({"stream": true})).await;
    let whole = server.open_chat(json!({})).await;
    let mut text = read_until(&mut stream, "word").await;
    server.until("both run", |s| s.running == 2).await;
    server.shutdown.cancel();
    timeout(PATIENCE, server.served).await.unwrap().unwrap().unwrap();
    text += &read_until(&mut stream, "0\r\n\r\n").await;
    assert!(text.contains("\"code\":\"draining\"") && !text.contains("[DONE]"), "{text}");
    let whole = read_all(whole).await;
    assert_eq!((whole.status, whole.error_code().as_str()), (503, "draining"));
    let engine = server.engine.clone();
    eventually("blocks free", || engine.stats().blocks.used == 0).await;
}

#[tokio::test]
async fn r38_equal_request_ids_are_strangers() {
    let server = slow().await;
    let send = |fields| {
        let body = with(chat_body(), fields).to_string();
        request("POST", CHAT, "x-request-id: same\r\n", body.as_bytes())
    };
    let mut leaver = server.connect().await;
    leaver.write_all(&send(json!({"stream": true}))).await.unwrap();
    read_until(&mut leaver, "word").await;
    let body = send(json!({"max_tokens": 20}));
    let (stayer, ()): (Reply, ()) = tokio::join!(server.raw(&body), async {
        server.until("both run", |s| s.running == 2).await;
        drop(leaver);
    });
    assert_eq!(stayer.json()["choices"][0]["finish_reason"], "length");
    assert_eq!(stayer.header("x-request-id"), Some("same"));
    server.blocks_are_free().await;
}

#[tokio::test]
async fn many_streams_at_once_get_what_each_gets_alone() {
    let server = Setup::default().start().await;
    let server = Arc::new(server);
    let mut replies = JoinSet::new();
    for _ in 0..32 {
        let server = server.clone();
        replies.spawn(async move { server.chat(json!({"stream": true})).await });
    }
    for reply in replies.join_all().await {
        let text: String = reply
            .chunks()
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
            .collect();
        assert_eq!(text, CONTENT);
    }
    server.blocks_are_free().await;
}
