//! What a failing device does to requests, probes and metrics.

use std::time::Duration;

use baton_engine::{EngineConfig, RunError};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::harness::{CONTENT, PATIENCE, Server, Setup, eventually, read_all, read_until};

const IN_FLIGHT: &str = "baton_http_requests_in_flight";

/// One request at a time, on a device that can be set up anew and may hang for so long.
async fn start(device_timeout: Option<Duration>) -> Server {
    let engine = EngineConfig { max_num_seqs: 1, device_timeout, ..EngineConfig::default() };
    Setup { engine, rebuildable: true, ..Setup::default() }.start().await
}

/// What the metrics say of this series, whatever its other labels.
async fn metric(server: &Server, name: &str, label: &str) -> f64 {
    let body = server.get("/metrics").await.body;
    let is_it = |line: &&str| line.split(['{', ' ']).next() == Some(name) && line.contains(label);
    let line = body.lines().find(is_it).unwrap_or_else(|| panic!("no {name}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Two chats: one is in a step that hangs, the other waits.
async fn two(server: &Server) -> [TcpStream; 2] {
    server.control.hang();
    let running = server.open_chat(json!({})).await;
    server.until("a step hangs", |stats| stats.step_under_way.is_some()).await;
    let waiting = server.open_chat(json!({})).await;
    let both = async { while metric(server, IN_FLIGHT, "").await < 2.0 {} };
    timeout(PATIENCE, both).await.expect("the other has arrived");
    [running, waiting]
}

#[tokio::test]
async fn r14_each_failure_of_the_device_has_a_code_a_class_and_a_word_on_readiness() {
    let words = || "mock fault".to_owned();
    for (error, code, class, ready) in [
        (RunError::Failed(words()), "engine_error", "failed", None),
        (RunError::OutOfMemory(words()), "device_out_of_memory", "out_of_memory", None),
        (RunError::Poisoned(words()), "device_poisoned", "poisoned", Some("rebuilding")),
        (RunError::Lost(words()), "device_lost", "lost", Some("device_lost")),
    ] {
        let server = start(None).await;
        server.control.fail_steps_with(1, error);
        server.control.hang_rebuilds();
        let reply = server.chat(json!({})).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (500, code));
        assert_eq!(metric(&server, "baton_device_failures_total", &format!("class=\"{class}\"")).await, 1.0);
        let reply = server.get("/ready").await;
        let Some(code) = ready else {
            assert_eq!(reply.status, 200, "{class}");
            assert_eq!(server.chat(json!({})).await.status, 200, "{class}");
            continue;
        };
        assert_eq!((reply.status, reply.error_code().as_str()), (503, code));
        // Only what never comes back is not worth keeping.
        let is_lost = class == "lost";
        assert_eq!(server.get("/live").await.status, if is_lost { 503 } else { 200 });
        assert_eq!(metric(&server, "baton_ready", "").await, 0.0);
        if is_lost {
            assert!(reply.body.contains("mock fault"), "the reason: {}", reply.body);
            let refused = server.chat(json!({})).await;
            assert_eq!((refused.status, refused.error_code().as_str()), (503, "engine_down"));
        }
    }
}

#[tokio::test]
async fn r14_what_waits_is_answered_when_the_model_is_loaded_again() {
    let server = start(None).await;
    let [running, waiting] = two(&server).await;
    server.control.fail_steps_with(1, RunError::Poisoned("mock fault".into()));
    server.control.hang_rebuilds();
    server.control.release_steps();
    assert_eq!(read_all(running).await.error_code(), "device_poisoned");
    server.until("it is loaded again", |stats| stats.rebuilding).await;
    let reply = server.get("/ready").await;
    assert_eq!((reply.status, reply.error_code().as_str()), (503, "rebuilding"));
    assert!(reply.header("retry-after").is_some());
    server.control.release();
    let reply = read_all(waiting).await;
    assert_eq!(reply.json()["choices"][0]["message"]["content"], CONTENT);
    assert_eq!(server.get("/ready").await.status, 200);
    assert_eq!(metric(&server, "baton_rebuilds_total", "").await, 1.0);
}

#[tokio::test]
async fn r19_a_drain_finishes_what_waits_for_the_model_to_be_loaded_again() {
    let server = start(None).await;
    let [running, waiting] = two(&server).await;
    server.control.fail_steps_with(1, RunError::Poisoned("mock fault".into()));
    server.control.hang_rebuilds();
    server.control.release_steps();
    assert_eq!(read_all(running).await.status, 500);
    server.shutdown.cancel();
    eventually("it drains", || server.engine.stats().rebuilding).await;
    while server.get("/ready").await.error_code() != "draining" {}
    assert!(!server.served.is_finished());
    server.control.release();
    assert_eq!(read_all(waiting).await.status, 200);
    timeout(PATIENCE, server.served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn r15_a_device_that_hangs_ends_its_requests_and_is_neither_ready_nor_live() {
    let server = start(Some(Duration::from_millis(500))).await;
    server.control.delay_steps(Duration::from_millis(5));
    let mut stream = server.open_chat(json!({"stream": true})).await;
    let mut text = read_until(&mut stream, "reasoning").await;
    server.control.hang();
    let waiting = server.open_chat(json!({})).await;
    text += &read_until(&mut stream, "0\r\n\r\n").await;
    assert!(text.contains("\"code\":\"device_hung\"") && !text.contains("[DONE]"), "{text}");
    let reply = read_all(waiting).await;
    assert_eq!((reply.status, reply.error_code().as_str()), (500, "device_hung"));
    for probe in ["/ready", "/live"] {
        assert_eq!(server.get(probe).await.status, 503, "{probe}");
    }
    assert_eq!(server.get("/ready").await.error_code(), "device_hung");
    assert_eq!(metric(&server, "baton_device_failures_total", "class=\"hung\"").await, 1.0);
    assert_eq!(server.chat(json!({})).await.error_code(), "engine_down");
}

#[tokio::test]
async fn clients_that_leave_while_the_device_hangs_leave_nothing_behind() {
    let server = start(None).await;
    drop(two(&server).await);
    let gone = async { while metric(&server, IN_FLIGHT, "").await > 0.0 {} };
    timeout(PATIENCE, gone).await.expect("their requests are forgotten while the step hangs");
    server.control.release();
    server.blocks_are_free().await;
    let finished = server.engine.stats().finished;
    assert!(finished.aborted > 0 && finished.aborted == finished.total(), "{finished:?}");
}
