//! The real binary while its wall clock is set: what waits, and what is measured, goes by a clock that nobody sets.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    time::Duration,
};

use baton_loadgen::{LocalServer, free_port};
use serde_json::{Value, json};
use tempfile::TempDir;

const CHAT: &str = "/v1/chat/completions";
const PATIENCE: Duration = Duration::from_secs(120);
const HOUR: i64 = 3600;

/// A server whose clock is the machine's and what a file says.
struct Server {
    server: LocalServer,
    offset: File,
    folder: TempDir,
}

impl Server {
    async fn start(flags: &[&str]) -> Self {
        let folder = TempDir::new().expect("a folder");
        let (library, path) = (folder.path().join("clock.so"), folder.path().join("offset"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/clock.c");
        let compiler = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).status();
        assert!(compiler.expect("what links Rust compiles C").success());
        fs::write(&path, [0; 8]).expect("a file");
        let offset = File::options().write(true).open(&path).expect("a file");
        let port = free_port().expect("a port");
        let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
        command.args(["serve", "--port", &port.to_string(), "--log-format", "json"]).args(flags);
        command.env("LD_PRELOAD", library).env("CLOCK_OFFSET", path);
        command.stderr(File::create(folder.path().join("log")).expect("a file"));
        let server = LocalServer::launch(command, port, "/ready", PATIENCE).await.expect("it starts");
        Self { server, offset, folder }
    }

    fn set(&self, seconds: i64) {
        self.offset.write_all_at(&seconds.to_ne_bytes(), 0).expect("it is written in place");
    }

    /// Waits until a gauge is not zero.
    async fn until(&self, gauge: &str) {
        while self.server.metric(gauge).await.expect("a metric") == 0.0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn ask(&self, fields: Value) -> Value {
        let message = json!({"role": "user", "content": "What is 347 + 286?"});
        let mut body = json!({"temperature": 0, "messages": [message]});
        body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        let (status, reply) = self.server.client().post(CHAT, &body).await.expect("an answer");
        assert_eq!(status, 200, "{reply}");
        reply
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r37_a_clock_that_is_set_by_an_hour_ends_nothing_that_runs_or_waits_and_changes_no_latency() {
    let server = Server::start(&["--max-num-seqs", "1", "--queue-timeout", "600", "--device-timeout", "600"]).await;
    let created = async |fields| server.ask(fields).await["created"].as_i64().expect("a time");
    let before = created(json!({"max_tokens": 1})).await;
    for (offset, from, to) in [(HOUR, HOUR - 120, HOUR + 120), (-HOUR, -HOUR - 120, 120 - HOUR)] {
        let (running, waiting, ()) = tokio::join!(
            server.ask(json!({"max_tokens": 900, "ignore_eos": true})),
            async {
                server.until("vllm:num_requests_running").await;
                server.ask(json!({"max_tokens": 5, "deadline_ms": 600_000})).await
            },
            async {
                server.until("vllm:num_requests_waiting").await;
                server.set(offset);
            }
        );
        assert_eq!([&running, &waiting].map(|reply| &reply["usage"]["completion_tokens"]), [900, 5]);
        let moved = created(json!({"max_tokens": 1})).await - before;
        assert!((from..to).contains(&moved), "the clock was set: {moved}");
        server.set(0);
    }
    for sum in ["vllm:e2e_request_latency_seconds_sum", "vllm:request_queue_time_seconds_sum"] {
        let seconds = server.server.metric(sum).await.expect("a metric");
        assert!((0.0..600.0).contains(&seconds), "{sum} {seconds}");
    }
    let log = fs::read_to_string(server.folder.path().join("log")).expect("a log");
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let times: Vec<u64> = lines.filter_map(|line| line["fields"]["total_ms"].as_u64()).collect();
    assert!(times.len() > 7 && times.iter().all(|&ms| ms < 600_000), "{times:?}");
}
