//! A batch on the bundled model, through processes that are killed while they answer it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use baton_loadgen::LocalServer;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long any one thing may take.
const GUARD: Duration = Duration::from_secs(120);
const LINES: usize = 120;

async fn start(state: &Path) -> LocalServer {
    let state = state.to_str().expect("UTF-8");
    let flags = ["--log-level", "warn", "--state-dir", state, "--handoff", "off"];
    LocalServer::start(Path::new(env!("CARGO_BIN_EXE_baton")), &flags).await.expect("it starts")
}

/// Uploads a file as a form, over a connection of its own.
fn upload(server: &LocalServer, content: &str) -> Value {
    let body = format!(
        "--cut\r\nContent-Disposition: form-data; name=\"file\"; filename=\"input.jsonl\"\r\n\r\n{content}\r\n--cut\r\n\
         Content-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--cut--\r\n"
    );
    let head = format!(
        "POST /v1/files HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: multipart/form-data; boundary=cut\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(server.address()).expect("it listens");
    stream.write_all((head + &body).as_bytes()).expect("it reads");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("it answers");
    let (head, body) = reply.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200"), "{reply}");
    serde_json::from_str(body).expect("JSON")
}

async fn get(server: &LocalServer, path: &str) -> String {
    let (status, body) = server.client().get(path).await.expect("an answer");
    assert_eq!(status, 200, "{body}");
    body
}

/// Waits until a batch has come so far.
async fn until(server: &LocalServer, path: &str, reached: impl Fn(&Value) -> bool) -> Value {
    let begin = Instant::now();
    loop {
        let batch: Value = serde_json::from_str(&get(server, path).await).expect("JSON");
        if reached(&batch) {
            return batch;
        }
        assert!(begin.elapsed() < GUARD, "{batch}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn completed(batch: &Value) -> u64 {
    batch["request_counts"]["completed"].as_u64().expect("a count")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_is_answered_exactly_once_though_the_server_is_killed_twice() {
    let state = TempDir::new().expect("a folder");
    let input: String = (0..LINES)
        .map(|i| {
            let question = format!("What is {i} + 286?");
            let messages = json!([{"role": "user", "content": question}]);
            let body = json!({"temperature": 0, "max_tokens": 200, "messages": messages});
            let line =
                json!({"custom_id": format!("{i}"), "method": "POST", "url": "/v1/chat/completions", "body": body});
            line.to_string() + "\n"
        })
        .collect();
    let server = start(state.path()).await;
    let file = upload(&server, &input);
    let new = json!({"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"});
    let (status, batch) = server.client().post("/v1/batches", &new).await.expect("an answer");
    assert_eq!(status, 200, "{batch}");
    let path = format!("/v1/batches/{}", batch["id"].as_str().expect("an id"));

    let first = completed(&until(&server, &path, |batch| completed(batch) >= 20).await);
    drop(server); // SIGKILL
    let server = start(state.path()).await;
    let second = completed(&until(&server, &path, |batch| completed(batch) >= first + 20).await);
    assert!((second as usize) < LINES, "killed before the end: {second}");
    drop(server);
    let server = start(state.path()).await;
    let batch = until(&server, &path, |batch| batch["status"] == "completed").await;
    assert_eq!(batch["request_counts"], json!({"total": LINES, "completed": LINES, "failed": 0}));
    let answered = server.metric("vllm:request_success_total").await.expect("a metric") as u64;
    assert!(answered <= LINES as u64 - second, "the last process answered {answered} after {second} were done");

    let output =
        get(&server, &format!("/v1/files/{}/content", batch["output_file_id"].as_str().expect("a file"))).await;
    let mut answers = BTreeMap::new();
    for line in output.lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let id: usize = line["custom_id"].as_str().and_then(|id| id.parse().ok()).expect("one of ours");
        let content =
            line["response"]["body"]["choices"][0]["message"]["content"].as_str().expect("an answer").to_owned();
        assert!(answers.insert(id, content).is_none(), "{id} is answered twice");
    }
    assert!(answers.keys().copied().eq(0..LINES), "every line has its answer");
    let right = answers.iter().filter(|(i, content)| content.contains(&format!("= {}", *i + 286))).count();
    assert!(right * 10 >= LINES * 9, "only {right} of {LINES} are right");
}
