//! The real binary over its life: ready, hostile requests, clients that leave, SIGTERM.

use std::{
    fs,
    io::{BufRead, BufReader, pipe},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use baton_loadgen::{CallError, Client, LocalServer, Reply, free_port};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;

const CHAT: &str = "/v1/chat/completions";

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(120);

async fn start() -> LocalServer {
    start_with(&[]).await
}

async fn start_with(flags: &[&str]) -> LocalServer {
    let flags = [&["--log-level", "warn"], flags].concat();
    LocalServer::start(Path::new(env!("CARGO_BIN_EXE_baton")), &flags).await.expect("it starts")
}

/// Starts on this port, with a standard error of its own.
async fn launch(port: u16, flags: &[&str], stderr: impl Into<Stdio>) -> LocalServer {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.args(["serve", "--port", &port.to_string()]).args(flags).stderr(stderr);
    LocalServer::launch(command, port, "/ready", PATIENCE).await.expect("it starts")
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

/// So many streams of so many tokens, all of which run.
async fn streams(server: &LocalServer, count: u32, tokens: u32) -> JoinSet<Result<Reply, CallError>> {
    let mut streams = JoinSet::new();
    for seed in 0..count {
        let body = question(json!({"max_tokens": tokens, "ignore_eos": true, "temperature": 1, "seed": seed}));
        let client = server.client();
        streams.spawn(async move { client.stream(CHAT, body).await });
    }
    until(async || server.metric("vllm:num_requests_running").await.expect("a metric") == f64::from(count)).await;
    streams
}

async fn until(mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < PATIENCE, "it never happens");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn is_draining(server: &LocalServer) -> bool {
    server.client().get("/ready").await.is_ok_and(|(status, _)| status == 503)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r19_sixty_four_streams_end_well_behind_a_sigterm_and_newcomers_are_refused_at_once() {
    let mut server = start_with(&["--drain-timeout", "600"]).await;
    let streams = streams(&server, 64, 300).await;
    server.terminate().expect("a signal");
    until(async || is_draining(&server).await).await;
    for _ in 0..5 {
        let (status, reply) = server.client().post(CHAT, &question(json!({}))).await.expect("they are told");
        assert_eq!((status.as_u16(), reply["error"]["code"].as_str()), (503, Some("draining")), "{reply}");
    }
    assert!(!streams.is_empty(), "newcomers were told while the streams ran");
    for reply in streams.join_all().await {
        let reply = reply.expect("a stream that was begun completes");
        assert_eq!((reply.finish_reason.as_str(), reply.output_tokens), ("length", 300));
    }
    assert!(server.wait(PATIENCE).await.expect("it ends").success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r20_without_time_to_drain_every_stream_ends_with_an_error_and_the_server_with_0() {
    let mut server = start_with(&["--drain-timeout", "0"]).await;
    let streams = streams(&server, 64, 900).await;
    let signal = Instant::now();
    server.terminate().expect("a signal");
    assert!(server.wait(PATIENCE).await.expect("it ends").success());
    eprintln!("it ended {:?} after the signal", signal.elapsed());
    for reply in streams.join_all().await {
        match reply {
            Err(CallError::InStream(error)) => assert_eq!(error["code"], "draining", "{error}"),
            // It had no first token yet, and so a status of its own.
            Err(CallError::Status { status, body }) => {
                assert!(status == 503 && body.contains("\"draining\""), "{body}")
            }
            other => panic!("neither whole nor cut was to be expected: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r20_a_second_signal_ends_the_server_at_once_and_the_last_lines_of_its_log_are_written() {
    let (log, stderr) = pipe().expect("a pipe");
    let port = free_port().expect("a port");
    let mut server = launch(port, &["--drain-timeout", "600"], stderr).await;
    // More than the pipe takes while nobody reads: the rest waits to be written.
    let client = server.client();
    for _ in 0..700 {
        assert_eq!(client.get("/live").await.expect("an answer").0, 200);
    }
    assert_eq!(server.metric("baton_log_lines_lost_total").await.expect("a metric"), 0.0);
    let streams = streams(&server, 1, 900).await;
    server.terminate().expect("a signal");
    until(async || is_draining(&server).await).await;
    server.terminate().expect("a signal");
    let lines: Vec<String> = BufReader::new(log).lines().map(|line| line.expect("UTF-8")).collect();
    assert_eq!(server.wait(PATIENCE).await.expect("it ends").code(), Some(1));
    assert!(streams.join_all().await[0].is_err(), "it did not wait");
    assert!(lines.len() > 700, "{} lines", lines.len());
    assert!(lines.last().is_some_and(|line| line.contains("ending at once")), "{:?}", lines.last());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r52_a_server_that_is_killed_leaves_no_process_behind_and_its_port_and_folder_to_the_next() {
    let folder = TempDir::new().expect("a folder");
    let flags = ["--log-level", "warn", "--state-dir", folder.path().to_str().expect("UTF-8")];
    let port = free_port().expect("a port");
    for _ in 0..3 {
        let server = launch(port, &flags, Stdio::inherit()).await;
        assert_serves(&server.client()).await;
        let streams = streams(&server, 8, 900).await;
        assert_eq!(children(server.pid()), [0; 0], "it is one process");
        drop(server); // SIGKILL
        for reply in streams.join_all().await {
            assert!(matches!(reply, Err(CallError::Cut(_) | CallError::Connection(_))), "{reply:?}");
        }
    }
}

/// The processes that this one has started.
fn children(pid: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("processes").flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent = |process: &u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        // Behind the name, which may be anything: state, parent.
        stat.rsplit(") ").next()?.split(' ').nth(1)?.parse().ok()
    };
    numbers.filter(|process| parent(process) == Some(pid)).collect()
}
