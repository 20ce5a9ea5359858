//! Files and batches, on a real state folder.

use std::fs;
use std::path::Path;
use std::time::Duration;

use baton_http::{ApiKey, KeyLimits, ListedKey, Scopes, Store, StoreLimits};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::harness::{CHAT, COMPLETIONS, PATIENCE, Reply, Server, Setup, chat_body, request, with};

pub const LIMITS: StoreLimits = StoreLimits { file_bytes: 1 << 20, total_bytes: 4 << 20 };

pub fn setup(dir: &Path, limits: StoreLimits) -> Setup {
    let mut setup = Setup::default();
    setup.config.store = Some(Store::open(dir, limits).unwrap());
    setup.config.api_keys = ["key", "other"].map(|key| ApiKey::new(key.into()).unwrap()).to_vec();
    setup
}

async fn server(dir: &TempDir) -> Server {
    setup(dir.path(), LIMITS).start().await
}

/// A form as clients write it.
fn form(purpose: &str, filename: &str, content: &[u8]) -> Vec<u8> {
    let head = format!(
        "--cut\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n--cut\r\nContent-Disposition: form-data; \
         name=\"file\"; filename=\"{filename}\"\r\nContent-Type: application/octet-stream\r\n\r\n"
    );
    [head.as_bytes(), content, b"\r\n--cut--\r\n"].concat()
}

async fn call(server: &Server, key: &str, method: &str, path: &str, body: &[u8]) -> Reply {
    let headers = format!("authorization: Bearer {key}\r\ncontent-type: multipart/form-data; boundary=cut\r\n");
    server.raw(&request(method, path, &headers, body)).await
}

async fn upload(server: &Server, content: &str) -> Reply {
    call(server, "key", "POST", "/v1/files", &form("batch", "input.jsonl", content.as_bytes())).await
}

pub fn line(id: &str, url: &str, body: &Value) -> String {
    json!({"custom_id": id, "method": "POST", "url": url, "body": body}).to_string() + "\n"
}

async fn create(server: &Server, file: &str, endpoint: &str) -> Reply {
    let body = json!({"input_file_id": file, "endpoint": endpoint, "completion_window": "24h", "metadata": {"a": "b"}});
    server.post_with_key("/v1/batches", "key", &body).await
}

/// Uploads an input and begins a batch of it.
pub async fn begin(server: &Server, content: &str, endpoint: &str) -> String {
    let file = upload(server, content).await.json();
    let batch = create(server, file["id"].as_str().unwrap(), endpoint).await.json();
    assert_eq!(batch["status"], "validating", "{batch}");
    batch["id"].as_str().unwrap().to_owned()
}

async fn batch(server: &Server, id: &str) -> Value {
    server.get_with_key(&format!("/v1/batches/{id}"), "key").await.json()
}

/// Waits until a batch has come so far.
async fn until(server: &Server, id: &str, reached: impl Fn(&Value) -> bool) -> Value {
    let wait = async {
        loop {
            let batch = batch(server, id).await;
            if reached(&batch) {
                return batch;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("it never came so far")
}

pub async fn ended(server: &Server, id: &str) -> Value {
    until(server, id, |batch| {
        ["completed", "failed", "cancelled", "expired"].contains(&batch["status"].as_str().unwrap())
    })
    .await
}

/// The lines of a file of results.
async fn lines(server: &Server, file: &Value) -> Vec<Value> {
    let Some(id) = file.as_str() else { return Vec::new() };
    let content = server.get_with_key(&format!("/v1/files/{id}/content"), "key").await;
    assert_eq!(content.status, 200);
    content.body.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn ids(lines: &[Value]) -> Vec<&str> {
    let mut ids: Vec<_> = lines.iter().map(|line| line["custom_id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    ids
}

#[tokio::test]
async fn a_file_comes_back_as_it_was_sent_until_it_is_deleted() {
    let dir = TempDir::new().unwrap();
    let server = server(&dir).await;
    let content = "{\"x\": 1}\n".repeat(60_000);
    let file = upload(&server, &content).await.json();
    let id = file["id"].as_str().unwrap();
    assert_eq!(
        (&file["object"], &file["purpose"], &file["filename"], &file["bytes"], &file["status"]),
        (&json!("file"), &json!("batch"), &json!("input.jsonl"), &json!(content.len()), &json!("processed"))
    );
    let path = format!("/v1/files/{id}");
    assert_eq!(server.get_with_key(&path, "key").await.json(), file);
    assert_eq!(server.get_with_key(&format!("{path}/content"), "key").await.body, content);
    let list = server.get_with_key("/v1/files?purpose=batch&limit=1", "key").await.json();
    assert_eq!((&list["data"][0], &list["has_more"], &list["first_id"]), (&file, &json!(false), &file["id"]));
    assert_eq!(server.get_with_key("/v1/files?purpose=other", "key").await.json()["data"], json!([]));

    // To another key it does not exist.
    for (method, path) in [("GET", &path), ("GET", &format!("{path}/content")), ("DELETE", &path)] {
        let reply = call(&server, "other", method, path, b"").await;
        assert_eq!((reply.status, reply.error_code().as_str()), (404, "not_found"), "{method}");
    }
    assert_eq!(server.get_with_key("/v1/files", "other").await.json()["data"], json!([]));

    let deleted = call(&server, "key", "DELETE", &path, b"").await.json();
    assert_eq!(deleted, json!({"id": id, "object": "file", "deleted": true}));
    assert_eq!(server.get_with_key(&path, "key").await.status, 404);
    assert_eq!(fs::read_dir(dir.path().join("files")).unwrap().count(), 0, "nothing is left");
}

#[tokio::test]
async fn without_a_state_folder_files_and_batches_are_refused_by_the_flags_name() {
    let server = Setup::default().start().await;
    for (method, path) in
        [("POST", "/v1/files"), ("GET", "/v1/files"), ("POST", "/v1/batches"), ("GET", "/v1/batches/x")]
    {
        let reply = server.raw(&request(method, path, "", b"{}")).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (400, "not_configured"), "{method} {path}");
        assert!(reply.body.contains("--state-dir"));
    }
}

#[tokio::test]
async fn what_is_no_upload_is_refused_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let server = server(&dir).await;
    let two = [form("batch", "a", b"x"), form("batch", "b", b"y")].concat();
    let twice = String::from_utf8(two).unwrap().replacen("--cut--\r\n--cut", "--cut", 1);
    for (body, status, code) in [
        (form("fine-tune", "a", b"x"), 400, "out_of_range"),
        (form("batch", "a", b""), 400, "out_of_range"),
        (form("batch", "", b"x"), 400, "out_of_range"),
        (form("batch", "a\tb", b"x"), 400, "out_of_range"),
        (form(&"x".repeat(1000), "a", b"x"), 400, "out_of_range"),
        (form("batch", "a", &vec![b'x'; (1 << 20) + 1]), 413, "request_too_large"),
        (form("batch", "a", &vec![b'x'; 3 << 20]), 413, "request_too_large"),
        (b"--cut--".to_vec(), 400, "missing_required_parameter"),
        (b"--cut\r\nContent-Disposition: form-data; name=\"x\"\r\n\r\n1\r\n--cut--".to_vec(), 400, "unknown_parameter"),
        (b"{}".to_vec(), 400, "invalid_json"),
        (twice.into_bytes(), 400, "invalid_value"),
    ] {
        let reply = call(&server, "key", "POST", "/v1/files", &body).await;
        let shown = String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
        assert_eq!((reply.status, reply.error_code().as_str()), (status, code), "{shown}");
    }
    // A client that leaves in the middle.
    let whole = form("batch", "a", &vec![b'x'; 500 << 10]);
    let mut stream = server.connect().await;
    let headers = "authorization: Bearer key\r\ncontent-type: multipart/form-data; boundary=cut\r\n";
    let bytes = request("POST", "/v1/files", headers, &whole);
    tokio::io::AsyncWriteExt::write_all(&mut stream, &bytes[..bytes.len() / 2]).await.unwrap();
    drop(stream);
    let empty = || fs::read_dir(dir.path().join("files")).unwrap().count() == 0;
    crate::harness::eventually("nothing is left", empty).await;
    // Nor does what was given up count: four files fit, and no fifth.
    let megabyte = "x".repeat((1 << 20) - 1);
    for _ in 0..4 {
        assert_eq!(upload(&server, &megabyte).await.status, 200);
    }
    let full = upload(&server, &megabyte).await;
    assert_eq!((full.status, full.error_code().as_str()), (413, "storage_full"));
}

#[tokio::test]
async fn a_batch_answers_every_line_once_as_a_request_would_be() {
    let dir = TempDir::new().unwrap();
    let server = server(&dir).await;
    let mut input = String::new();
    for i in 0..40 {
        input += &line(&format!("line-{i:02}"), CHAT, &with(chat_body(), json!({"max_tokens": 8, "seed": i})));
    }
    input += "\n";
    input += &line("too-hot", CHAT, &with(chat_body(), json!({"temperature": 5})));
    input += &line("streamed", CHAT, &with(chat_body(), json!({"stream": true})));
    input += line("elsewhere", CHAT, &with(chat_body(), json!({"model": "other"}))).trim_end();
    let id = begin(&server, &input, CHAT).await;
    let batch = ended(&server, &id).await;
    assert_eq!(batch["status"], "completed", "{batch}");
    assert_eq!(batch["request_counts"], json!({"total": 43, "completed": 40, "failed": 3}));
    for time in ["created_at", "in_progress_at", "finalizing_at", "completed_at", "expires_at"] {
        assert!(batch[time].as_u64().is_some(), "{time}: {batch}");
    }
    assert_eq!((&batch["metadata"], &batch["errors"]), (&json!({"a": "b"}), &Value::Null));

    let output = lines(&server, &batch["output_file_id"]).await;
    let expected: Vec<_> = (0..40).map(|i| format!("line-{i:02}")).collect();
    assert_eq!(ids(&output), expected);
    for line in &output {
        assert!(line["id"].as_str().unwrap().starts_with("batch_req_") && line["error"].is_null());
        assert_eq!(
            (&line["response"]["status_code"], line["response"]["body"]["object"].as_str()),
            (&json!(200), Some("chat.completion"))
        );
        assert!(line["response"]["request_id"].as_str().unwrap().starts_with("req_"));
    }
    let errors = lines(&server, &batch["error_file_id"]).await;
    assert_eq!(ids(&errors), ["elsewhere", "streamed", "too-hot"]);
    for line in &errors {
        let (status, code) = match line["custom_id"].as_str().unwrap() {
            "elsewhere" => (404, "model_not_found"),
            "streamed" => (400, "invalid_value"),
            _ => (400, "out_of_range"),
        };
        let response = &line["response"];
        assert_eq!((&response["status_code"], &response["body"]["error"]["code"]), (&json!(status), &json!(code)));
    }
    let file = batch["output_file_id"].as_str().unwrap();
    let file = server.get_with_key(&format!("/v1/files/{file}"), "key").await.json();
    assert_eq!(file["purpose"], "batch_output");
    server.blocks_are_free().await;

    // What a line is answered is what a request is.
    let alone = server.post_with_key(CHAT, "key", &with(chat_body(), json!({"max_tokens": 8, "seed": 7}))).await.json();
    let seventh = output.iter().find(|line| line["custom_id"] == "line-07").unwrap();
    assert_eq!(seventh["response"]["body"]["choices"], alone["choices"]);

    let list = server.get_with_key("/v1/batches?limit=5", "key").await.json();
    assert_eq!(list["data"], json!([batch]));
    assert_eq!(server.get_with_key(&format!("/v1/batches/{id}"), "other").await.status, 404);
    assert_eq!(server.get_with_key("/v1/batches", "other").await.json()["data"], json!([]));
    assert_eq!(server.post_with_key(&format!("/v1/batches/{id}/cancel"), "other", &json!({})).await.status, 404);
    let again = server.post_with_key(&format!("/v1/batches/{id}/cancel"), "key", &json!({})).await;
    assert_eq!((again.status, again.error_code().as_str()), (409, "conflict"));
}

#[tokio::test]
async fn an_input_that_is_none_fails_its_batch_and_says_which_lines() {
    let dir = TempDir::new().unwrap();
    let server = server(&dir).await;
    let fine = line("a", COMPLETIONS, &json!({"prompt": "x"}));
    for (input, line, code, param) in [
        (format!("{fine}nonsense\n"), json!(2), "invalid_json", Value::Null),
        (format!("{fine}\n{fine}"), json!(3), "invalid_value", json!("custom_id")),
        (line("", COMPLETIONS, &json!({})), json!(1), "out_of_range", json!("custom_id")),
        (line("a", CHAT, &json!({})), json!(1), "out_of_range", json!("url")),
        (line("a", "/metrics", &json!({})), json!(1), "out_of_range", json!("url")),
        (fine.replace("POST", "GET"), json!(1), "out_of_range", json!("method")),
        (fine.replace("\"body\"", "\"bodies\""), json!(1), "missing_required_parameter", json!("body")),
        (format!("{}\n", "[".repeat(100_000)), json!(1), "invalid_json", Value::Null),
        ("\n \n".to_owned(), Value::Null, "empty_file", json!("input_file_id")),
    ] {
        let id = begin(&server, &input, COMPLETIONS).await;
        let batch = ended(&server, &id).await;
        assert_eq!(batch["status"], "failed", "{batch}");
        let error = &batch["errors"]["data"][0];
        assert_eq!((&error["line"], &error["code"], &error["param"]), (&line, &json!(code), &param), "{input:.80}");
        assert_eq!((&batch["output_file_id"], &batch["errors"]["object"]), (&Value::Null, &json!("list")));
    }
}

#[tokio::test]
async fn requests_for_batches_are_checked_by_name() {
    let dir = TempDir::new().unwrap();
    let server = server(&dir).await;
    let file = upload(&server, &line("a", CHAT, &chat_body())).await.json()["id"].clone();
    let fine = json!({"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"});
    for (fields, param, code) in [
        (json!({"input_file_id": null}), "input_file_id", "missing_required_parameter"),
        (json!({"input_file_id": "file-../../etc/passwd"}), "input_file_id", "invalid_value"),
        (json!({"endpoint": "/metrics"}), "endpoint", "out_of_range"),
        (json!({"completion_window": "1h"}), "completion_window", "out_of_range"),
        (json!({"metadata": {"a": 1}}), "metadata", "out_of_range"),
        (
            json!({"output_expires_after": {"anchor": "now", "seconds": 3600}}),
            "output_expires_after.anchor",
            "out_of_range",
        ),
        (
            json!({"output_expires_after": {"anchor": "created_at", "seconds": 1}}),
            "output_expires_after.seconds",
            "out_of_range",
        ),
        (json!({"unheard_of": 1}), "unheard_of", "unknown_parameter"),
    ] {
        let reply = server.post_with_key("/v1/batches", "key", &with(fine.clone(), fields)).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (400, code), "{reply:?}");
        assert_eq!(reply.json()["error"]["param"], param);
    }
    let anothers = server.post_with_key("/v1/batches", "other", &fine).await;
    assert_eq!((anothers.status, anothers.json()["error"]["param"].as_str()), (400, Some("input_file_id")));
    for (query, code) in [
        ("limit=0", "out_of_range"),
        ("after=nope", "invalid_value"),
        ("x=1", "unknown_parameter"),
        ("limit=1&limit=2", "invalid_value"),
    ] {
        let reply = server.get_with_key(&format!("/v1/batches?{query}"), "key").await;
        assert_eq!((reply.status, reply.error_code().as_str()), (400, code), "{query}");
    }
}

#[tokio::test]
async fn a_cancelled_batch_keeps_what_was_answered_and_says_so_of_the_rest() {
    let dir = TempDir::new().unwrap();
    let server = setup_slow(dir.path()).await;
    let input: String =
        (0..60).map(|i| line(&format!("{i}"), CHAT, &with(chat_body(), json!({"max_tokens": 5})))).collect();
    let id = begin(&server, &input, CHAT).await;
    let running = until(&server, &id, |batch| batch["request_counts"]["completed"].as_u64() > Some(0)).await;
    assert_eq!(running["status"], "in_progress");
    let reading =
        call(&server, "key", "DELETE", &format!("/v1/files/{}", running["input_file_id"].as_str().unwrap()), b"").await;
    assert_eq!((reading.status, reading.error_code().as_str()), (409, "conflict"));
    let cancelled = server.post_with_key(&format!("/v1/batches/{id}/cancel"), "key", &json!({})).await.json();
    assert!(cancelled["status"] == "cancelling" && cancelled["cancelling_at"].is_u64(), "{cancelled}");
    let batch = ended(&server, &id).await;
    assert_eq!(batch["status"], "cancelled");
    server.blocks_are_free().await;
    let (output, errors) =
        (lines(&server, &batch["output_file_id"]).await, lines(&server, &batch["error_file_id"]).await);
    assert!(!output.is_empty() && !errors.is_empty());
    assert!(errors.iter().all(|line| line["error"]["code"] == "batch_cancelled" && line["response"].is_null()));
    let all: Vec<_> = output.into_iter().chain(errors).collect();
    let mut expected: Vec<_> = (0..60).map(|i| i.to_string()).collect();
    expected.sort_unstable();
    assert_eq!(ids(&all), expected);
}

async fn setup_slow(dir: &Path) -> Server {
    let server = setup(dir, LIMITS).start().await;
    server.control.delay_steps(Duration::from_millis(10));
    server
}

#[tokio::test]
async fn r19_a_drain_stops_batches_and_the_next_start_goes_on_without_losing_or_repeating_a_line() {
    let dir = TempDir::new().unwrap();
    let input: String =
        (0..80).map(|i| line(&format!("{i}"), CHAT, &with(chat_body(), json!({"max_tokens": 5})))).collect();
    let first = setup_slow(dir.path()).await;
    let id = begin(&first, &input, CHAT).await;
    until(&first, &id, |batch| batch["request_counts"]["completed"].as_u64() > Some(10)).await;
    first.shutdown.cancel();
    tokio::time::timeout(PATIENCE, first.served).await.unwrap().unwrap().unwrap();
    drop(first.service);

    // A line that a crash cut off.
    let results = fs::read_dir(dir.path().join("files")).unwrap().map(|entry| entry.unwrap().path());
    let results: Vec<_> = results.filter(|path| path.extension() == Some("data".as_ref())).collect();
    let output = results.iter().find(|path| fs::read(path).unwrap().starts_with(b"{\"id\":\"batch_req_")).unwrap();
    let whole = fs::read(output).unwrap();
    let done = whole.iter().filter(|&&byte| byte == b'\n').count();
    assert!(done > 10 && done < 80 && whole.ends_with(b"\n"), "{done}");
    fs::write(output, &whole[..whole.len() - 20]).unwrap();
    // What only a crash leaves.
    let orphan = dir.path().join("files").join(format!("file-{:032x}.part", 1));
    fs::write(&orphan, "x").unwrap();

    let second = server(&dir).await;
    assert!(!orphan.exists());
    let batch = ended(&second, &id).await;
    assert_eq!(
        (&batch["status"], &batch["request_counts"]),
        (&json!("completed"), &json!({"total": 80, "completed": 80, "failed": 0}))
    );
    let output = lines(&second, &batch["output_file_id"]).await;
    let mut expected: Vec<_> = (0..80).map(|i| i.to_string()).collect();
    expected.sort_unstable();
    assert_eq!(ids(&output), expected);
    assert!(second.engine.stats().finished.length as usize <= 80 - (done - 1), "answered lines are not asked again");
}

#[tokio::test]
async fn a_key_that_is_no_longer_accepted_has_no_more_lines_answered() {
    let dir = TempDir::new().unwrap();
    let input: String =
        (0..40).map(|i| line(&format!("{i}"), CHAT, &with(chat_body(), json!({"max_tokens": 5})))).collect();
    let first = setup_slow(dir.path()).await;
    let id = begin(&first, &input, CHAT).await;
    until(&first, &id, |batch| batch["status"] == "in_progress").await;
    first.shutdown.cancel();
    tokio::time::timeout(PATIENCE, first.served).await.unwrap().unwrap().unwrap();
    drop(first.service);

    let mut setup = setup(dir.path(), LIMITS);
    setup.config.api_keys = vec![ApiKey::new("new".into()).unwrap()];
    let second = setup.start().await;
    let record = dir.path().join("batches").join(format!("{id}.json"));
    crate::harness::eventually("the batch ends", || fs::read_to_string(&record).unwrap().contains("\"completed\""))
        .await;
    assert_eq!(second.engine.stats().finished.length, 0);
    assert_eq!(second.get_with_key(&format!("/v1/batches/{id}"), "new").await.status, 404);
}

#[tokio::test]
async fn results_that_do_not_fit_end_their_batch() {
    let dir = TempDir::new().unwrap();
    let server = setup(dir.path(), StoreLimits { file_bytes: 1 << 20, total_bytes: 20_000 }).start().await;
    let input: String =
        (0..60).map(|i| line(&format!("{i}"), CHAT, &with(chat_body(), json!({"max_tokens": 5})))).collect();
    let id = begin(&server, &input, CHAT).await;
    let batch = ended(&server, &id).await;
    assert_eq!(
        (&batch["status"], &batch["errors"]["data"][0]["code"]),
        (&json!("failed"), &json!("storage_full")),
        "{batch}"
    );
    assert!(!lines(&server, &batch["output_file_id"]).await.is_empty(), "what was answered stays");
    server.blocks_are_free().await;
}

#[tokio::test]
async fn a_line_that_misses_its_own_deadline_has_that_as_its_result() {
    let dir = TempDir::new().unwrap();
    let server = setup_slow(dir.path()).await;
    let body = with(chat_body(), json!({"deadline_ms": 1}));
    let id = begin(&server, &line("late", CHAT, &body), CHAT).await;
    let batch = ended(&server, &id).await;
    assert_eq!(batch["request_counts"], json!({"total": 1, "completed": 0, "failed": 1}), "{batch}");
    let errors = lines(&server, &batch["error_file_id"]).await;
    assert_eq!(errors[0]["response"]["body"]["error"]["code"], "deadline_exceeded", "{errors:?}");
}

/// Where `key` has limits.
async fn limited(dir: &Path, limits: KeyLimits) -> Server {
    let mut setup = setup(dir, LIMITS);
    setup.config.api_keys.remove(0);
    setup.config.listed_keys = Some(vec![ListedKey {
        name: "few".into(),
        digest: Sha256::digest("key").into(),
        scopes: Scopes::INFERENCE,
        expires: None,
        limits,
    }]);
    setup.start().await
}

#[tokio::test]
async fn lines_leave_their_key_as_many_requests_at_once_as_it_may_have() {
    let dir = TempDir::new().unwrap();
    let server = limited(dir.path(), KeyLimits { max_concurrent_requests: Some(2), ..KeyLimits::default() }).await;
    server.control.delay_steps(Duration::from_millis(10));
    let content: String = (0..5).map(|number| line(&number.to_string(), CHAT, &chat_body())).collect();
    let id = begin(&server, &content, CHAT).await;
    server.until("lines are there, as many as there may be", |s| s.running + s.waiting == 2).await;
    server.control.hang();
    let body = chat_body();
    let (chat, ()) = tokio::join!(server.post_with_key(CHAT, "key", &body), async {
        // It would be refused at once.
        tokio::time::sleep(Duration::from_millis(100)).await;
        server.control.delay_steps(Duration::ZERO);
        server.control.release();
    });
    assert_eq!(chat.status, 200);
    let batch = ended(&server, &id).await;
    assert_eq!(batch["request_counts"], json!({"total": 5, "completed": 5, "failed": 0}), "{batch}");
}

#[tokio::test]
async fn lines_of_a_key_beyond_its_limits_keep_nobody_elses_waiting() {
    let dir = TempDir::new().unwrap();
    let server = limited(dir.path(), KeyLimits { requests_per_minute: Some(1), ..KeyLimits::default() }).await;
    // More than are answered at once of all batches.
    let content: String = (0..40).map(|number| line(&number.to_string(), CHAT, &chat_body())).collect();
    let limited = begin(&server, &content, CHAT).await;
    until(&server, &limited, |batch| batch["request_counts"]["completed"] == 1).await;
    let content = form("batch", "input.jsonl", line("a", CHAT, &chat_body()).as_bytes());
    let file = call(&server, "other", "POST", "/v1/files", &content).await.json();
    let body = json!({"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"});
    let id = server.post_with_key("/v1/batches", "other", &body).await.json()["id"].as_str().unwrap().to_owned();
    let wait = async {
        while server.get_with_key(&format!("/v1/batches/{id}"), "other").await.json()["status"] != "completed" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, wait).await.is_err() {
        let other = server.get_with_key(&format!("/v1/batches/{id}"), "other").await.json();
        panic!("it waits behind the other: {other}, {}", batch(&server, &limited).await);
    }
    let limited = batch(&server, &limited).await;
    assert_eq!((&limited["status"], &limited["request_counts"]["failed"]), (&json!("in_progress"), &json!(0)));
}
