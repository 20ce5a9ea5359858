//! What each key has used: counted once, by the name of the key, whoever ends the request, and kept where there is a place.

use std::time::Duration;

use baton_http::{ApiKey, Scopes};
use serde_json::{Value, json};

use crate::batches::{self, LIMITS};
use crate::harness::{CHAT, COMPLETIONS, PATIENCE, Server, Setup, chat_body, read_until, request, with};
use crate::keys::listed;
use crate::responses::{RESPONSES, body};
use crate::stored::start_with;

/// With the keys `a`, `b` and `boss`.
fn setup() -> Setup {
    let mut setup = Setup::default();
    let keys = [("a", Scopes::INFERENCE), ("b", Scopes::INFERENCE), ("boss", Scopes::ADMIN.and(Scopes::METRICS))];
    setup.config.listed_keys = Some(keys.map(|(key, scopes)| listed(key, scopes)).into());
    setup
}

async fn report(server: &Server, key: &str) -> Value {
    server.get_with_key("/admin/usage", key).await.json()
}

/// Requests, tokens of prompts, cached ones of them, and tokens given, of a name; `None` if it has none.
async fn used(server: &Server, boss: &str, name: &str) -> Option<[u64; 4]> {
    let report = report(server, boss).await;
    let row = report["data"].as_array().unwrap().iter().find(|row| row["key"] == name)?.clone();
    let fields = ["requests", "prompt_tokens", "cached_tokens", "completion_tokens"];
    Some(fields.map(|field| row[field].as_u64().unwrap()))
}

/// Waits until a name has so many requests; a request may end a moment after its client has read it.
async fn used_after(server: &Server, boss: &str, name: &str, requests: u64) -> [u64; 4] {
    let wait = async {
        loop {
            match used(server, boss, name).await {
                Some(used) if used[0] == requests => return used,
                _ => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{name} never has {requests} requests"))
}

/// Waits until `/metrics` shows this figure of those who send no key.
pub async fn shown(server: &Server, figure: &str, value: u64) {
    let line = format!("baton_key_{figure}_total{{key=\"other\"}} {value}\n");
    let wait = async {
        while !server.get("/metrics").await.body.contains(&line) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never {line}"));
}

/// What the reply says of its usage, in the order of the report.
fn told(reply: &Value) -> [u64; 4] {
    let usage = &reply["usage"];
    let count = |value: &Value| value.as_u64().unwrap_or(0);
    let cached = count(&usage["prompt_tokens_details"]["cached_tokens"]);
    [1, count(&usage["prompt_tokens"]), cached, count(&usage["completion_tokens"])]
}

fn sum(of: &[[u64; 4]]) -> [u64; 4] {
    std::array::from_fn(|field| of.iter().map(|used| used[field]).sum())
}

#[tokio::test]
async fn each_key_has_what_its_replies_said_and_nothing_of_anothers() {
    let server = setup().start().await;
    let chat =
        async |key: &str, fields: Value| server.post_with_key(CHAT, key, &with(chat_body(), fields)).await.json();
    let first = told(&chat("a", json!({"max_tokens": 5})).await);
    let second = told(&chat("a", json!({"max_tokens": 7, "n": 2})).await);
    assert!(second[2] > 0 && second[3] == 14, "{second:?}");
    let prompts = json!({"model": "tiny", "prompt": ["one", "and two"], "max_tokens": 3});
    let third = told(&server.post_with_key(COMPLETIONS, "a", &prompts).await.json());
    assert_eq!(used_after(&server, "boss", "name-of-a", 3).await, sum(&[first, second, third]));
    let other = told(&chat("b", json!({"max_tokens": 1})).await);
    assert_eq!(used_after(&server, "boss", "name-of-b", 1).await, other);
    assert_eq!(used(&server, "boss", "other").await, Some([0; 4]));
    assert_eq!(used(&server, "boss", "name-of-boss").await, None, "who asks for no model uses none");

    let table = server.get_with_key("/admin/usage?format=csv", "boss").await;
    assert_eq!(table.header("content-type"), Some("text/csv"));
    let [requests, prompt, cached, completion] = sum(&[first, second, third]);
    let lines: Vec<&str> = table.body.lines().collect();
    assert_eq!(lines[0], "key,requests,prompt_tokens,cached_tokens,completion_tokens");
    assert_eq!(lines[1], format!("name-of-a,{requests},{prompt},{cached},{completion}"));
    assert_eq!(lines.len(), 4);
    let metrics = server.get_with_key("/metrics", "boss").await.body;
    for (name, value) in [
        ("requests", requests),
        ("prompt_tokens", prompt),
        ("cached_tokens", cached),
        ("completion_tokens", completion),
    ] {
        let line = format!("baton_key_{name}_total{{key=\"name-of-a\"}} {value}");
        assert!(metrics.lines().any(|other| other == line), "{line} in {metrics}");
    }
    let wrong = server.get_with_key("/admin/usage?format=xml", "boss").await;
    assert_eq!((wrong.status, wrong.json()["error"]["param"].as_str()), (400, Some("format")));
}

#[tokio::test]
async fn what_no_engine_took_is_not_used_and_what_was_given_until_the_end_is() {
    let server = setup().start().await;
    let unknown = with(chat_body(), json!({"model": "nobody-s"}));
    assert_eq!(server.post_with_key(CHAT, "a", &unknown).await.status, 404);
    let long = json!({"model": "tiny", "prompt": "x ".repeat(2000)});
    assert_eq!(server.post_with_key(COMPLETIONS, "a", &long).await.status, 400);
    assert_eq!(server.post_with_key("/tokenize", "a", &json!({"model": "tiny", "prompt": "x"})).await.status, 200);
    server.control.fail_steps(1);
    assert_eq!(server.post_with_key(CHAT, "a", &chat_body()).await.status, 500);
    let failed = used_after(&server, "boss", "name-of-a", 1).await;
    assert!(failed[1] > 0 && failed[3] == 0, "{failed:?}");

    server.control.delay_steps(Duration::from_millis(5));
    let body = with(chat_body(), json!({"stream": true, "max_tokens": 400})).to_string();
    let mut stream = server.connect().await;
    let head = "authorization: Bearer a\r\n";
    tokio::io::AsyncWriteExt::write_all(&mut stream, &request("POST", CHAT, head, body.as_bytes())).await.unwrap();
    read_until(&mut stream, "add").await;
    drop(stream);
    let left = used_after(&server, "boss", "name-of-a", 2).await;
    assert!(left[1] == 2 * failed[1] && (1..400).contains(&left[3]), "{left:?}");
}

#[tokio::test]
async fn what_runs_in_the_background_or_in_a_batch_is_its_keys_when_it_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let server = start_with(folder.path(), setup()).await;
    server.control.hang();
    let queued = server.post_with_key(RESPONSES, "a", &body(json!({"background": true}))).await.json();
    assert_eq!(queued["status"], "queued");
    assert_eq!(used(&server, "boss", "name-of-a").await, None, "it has not ended");
    server.control.release();
    let background = used_after(&server, "boss", "name-of-a", 1).await;
    let path = format!("{RESPONSES}/{}", queued["id"].as_str().unwrap());
    let done = server.get_with_key(&path, "a").await.json();
    let usage = |field: &str| done["usage"][field].as_u64().unwrap();
    assert_eq!((done["status"].as_str(), background[3] > 0), (Some("completed"), true));
    assert_eq!((background[1], background[3]), (usage("input_tokens"), usage("output_tokens")));

    let folder = tempfile::tempdir().unwrap();
    let mut setup = batches::setup(folder.path(), LIMITS);
    setup.config.admin_api_keys = vec![ApiKey::new("boss".into()).unwrap()];
    let server = setup.start().await;
    let lines: String =
        (0..3).map(|n| batches::line(&n.to_string(), CHAT, &with(chat_body(), json!({"max_tokens": 4})))).collect();
    let batch = batches::begin(&server, &lines, CHAT).await;
    batches::ended(&server, &batch).await;
    assert_eq!(used_after(&server, "boss", "api-key-1", 3).await[3], 12);
}

#[tokio::test]
async fn counts_outlive_the_process_where_there_is_a_folder_and_begin_anew_where_there_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let first = start_with(folder.path(), setup()).await;
    first.post_with_key(CHAT, "a", &chat_body()).await;
    used_after(&first, "boss", "name-of-a", 1).await;
    let before = report(&first, "boss").await;
    first.shutdown.cancel();
    first.served.await.unwrap().unwrap();
    let second = start_with(folder.path(), setup()).await;
    assert_eq!(report(&second, "boss").await, before);
    second.post_with_key(CHAT, "a", &chat_body()).await;
    used_after(&second, "boss", "name-of-a", 2).await;
    let text = std::fs::read_to_string(folder.path().join("usage.json")).unwrap();
    assert!(text.contains("name-of-a") && !text.contains("12 STOP"), "{text}");
    assert_eq!(used(&setup().start().await, "boss", "name-of-a").await, None);
}
