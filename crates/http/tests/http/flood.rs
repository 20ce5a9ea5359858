//! More connections than there may be, and more probes than anybody needs: the server answers its probes and whom it serves.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::harness::{PATIENCE, Server, Setup, read_until, request};

/// What waits for a head, a body or a reader does so for longer than any test.
async fn start(connections: usize) -> Server {
    let mut setup = Setup { reply: "word ".repeat(100), ..Setup::default() };
    let limits = &mut setup.config.connection_limits;
    (limits.connections, limits.head_timeout, limits.stall_timeout) = (connections, 10 * PATIENCE, 10 * PATIENCE);
    setup.config.body_timeout = 10 * PATIENCE;
    setup.start().await
}

/// The answer to a probe on a connection of its own; empty if it was closed.
async fn probe(server: &Server) -> String {
    let mut stream = server.connect().await;
    let _ = stream.write_all(&request("GET", "/live", "", b"")).await;
    let mut bytes = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the server answers or closes");
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn refused(server: &Server, reason: &str) -> u64 {
    let name = format!("baton_http_connections_refused_total{{reason=\"{reason}\"}} ");
    let text = server.get("/metrics").await.body;
    text.lines().find_map(|line| line.strip_prefix(&name)).expect("the counter").parse().unwrap()
}

#[tokio::test]
async fn r23_silent_connections_keep_nobody_out_however_many_they_are() {
    let server = start(8).await;
    let mut silent = Vec::new();
    for _ in 0..10 {
        for begin in ["", "GET /live HTTP/1.1\r\nx: ", "POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n{"] {
            let mut stream = server.connect().await;
            let _ = stream.write_all(begin.as_bytes()).await;
            silent.push(stream);
        }
        assert!(probe(&server).await.contains("200 OK"));
    }
    // The first have been closed, without a word.
    let mut bytes = Vec::new();
    let _ = timeout(PATIENCE, silent[0].read_to_end(&mut bytes)).await.expect("it is closed");
    assert!(bytes.is_empty());
    assert!(refused(&server, "idle").await >= 20);
    assert_eq!(refused(&server, "limit").await, 0);
}

#[tokio::test]
async fn r23_who_has_asked_is_answered_however_many_come_behind_it_at_once() {
    let server = start(8).await;
    // None of them is accepted before all have come: the server and this test share a thread.
    let asking: Vec<_> = (0..60)
        .map(|i| {
            let mut stream = std::net::TcpStream::connect(server.addr).unwrap();
            let asks = i < 10;
            if asks {
                std::io::Write::write_all(&mut stream, &request("GET", "/live", "", b"")).unwrap();
            }
            stream.set_nonblocking(true).unwrap();
            (asks, TcpStream::from_std(stream).unwrap())
        })
        .collect();
    for (_, mut stream) in asking.into_iter().filter(|(asks, _)| *asks) {
        let mut bytes = Vec::new();
        let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the server answers or closes");
        assert!(String::from_utf8_lossy(&bytes).contains("200 OK"), "it was closed unread");
    }
}

#[tokio::test]
async fn r23_a_stream_is_not_cut_for_those_that_come_and_where_all_are_at_work_the_new_one_is_refused() {
    let server = start(3).await;
    server.control.delay_steps(Duration::from_millis(20));
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(server.open_chat(json!({"stream": true})).await);
    }
    server.until("all run", |stats| stats.running == 3).await;
    server.control.hang();
    for _ in 0..5 {
        assert_eq!(probe(&server).await, "");
    }
    server.control.delay_steps(Duration::ZERO);
    server.control.release();
    for stream in &mut streams {
        read_until(stream, "[DONE]").await;
    }
    let served = async { while !probe(&server).await.contains("200 OK") {} };
    timeout(PATIENCE, served).await.expect("there is room again");
    assert!(refused(&server, "limit").await >= 5);
}

#[tokio::test]
async fn r23_a_connection_that_is_kept_for_its_next_request_gives_way_too() {
    let server = start(2).await;
    let mut kept = server.connect().await;
    kept.write_all(b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    read_until(&mut kept, "ok").await;
    let _silent = server.connect().await;
    assert!(probe(&server).await.contains("200 OK"));
    let mut rest = Vec::new();
    timeout(PATIENCE, kept.read_to_end(&mut rest)).await.expect("it is closed").unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn r43_a_storm_of_probes_is_answered_while_the_engine_hangs_and_gives_it_no_work() {
    let server = Setup::default().start().await;
    server.control.hang();
    let chat = server.open_chat(json!({})).await;
    server.until("a step hangs", |stats| stats.step_under_way.is_some()).await;
    let before = server.engine.stats();
    let mut storm = JoinSet::new();
    for number in 0..8 {
        let path = ["/live", "/ready", "/health", "/startup"][number % 4];
        let addr = server.addr;
        storm.spawn(async move {
            // On one connection: what is counted is probes.
            let mut stream = TcpStream::connect(addr).await.unwrap();
            for _ in 0..500 {
                stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes()).await.unwrap();
                let reply = read_until(&mut stream, "{\"status\":\"ok\"}").await;
                assert!(reply.starts_with("HTTP/1.1 200"), "{path}: {reply}");
            }
        });
    }
    timeout(PATIENCE, storm.join_all()).await.expect("nobody waits for the engine");
    let after = server.engine.stats();
    assert_eq!(
        (after.waiting, after.running, after.finished.total(), after.generated_tokens),
        (before.waiting, before.running, before.finished.total(), before.generated_tokens)
    );
    server.control.release();
    drop(chat);
    server.blocks_are_free().await;
}
