//! Responses that are kept: conversations, the background, whose they are, and what a restart leaves.

use std::path::Path;
use std::time::Duration;

use baton_http::{ApiKey, ServiceConfig, Store, StoreLimits};
use serde_json::{Value, json};

use crate::harness::{PATIENCE, Reply, Server, Setup, request};
use crate::responses::{RESPONSES, body, post};

async fn start(folder: &Path) -> Server {
    start_with(folder, Setup::default()).await
}

pub async fn start_with(folder: &Path, setup: Setup) -> Server {
    let limits = StoreLimits { file_bytes: 1 << 20, total_bytes: 1 << 20 };
    let store = Some(Store::open(folder, limits).unwrap());
    let config = ServiceConfig { store, ..setup.config };
    Setup { config, ..setup }.start().await
}

fn path(response: &Value, rest: &str) -> String {
    format!("{RESPONSES}/{}{rest}", response["id"].as_str().unwrap())
}

async fn call(server: &Server, method: &str, path: &str) -> Reply {
    server.raw(&request(method, path, "", b"")).await
}

/// Asks for a response until it has this status.
async fn until(server: &Server, response: &Value, status: &str) -> Value {
    let wait = async {
        loop {
            let now = server.get(&path(response, "")).await.json();
            if now["status"] == status {
                return now;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never {status}"))
}

#[tokio::test]
async fn what_was_kept_is_given_back_after_a_restart_until_it_is_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let first = start(folder.path()).await;
    let kept = post(&first, json!({})).await;
    assert_eq!(kept["store"], true, "as with OpenAI, where there is a place for it");
    assert_eq!(first.get(&path(&kept, "")).await.json(), kept);
    let streamed = first.post(RESPONSES, &body(json!({"stream": true}))).await;
    let last = streamed.body.rsplit("data: ").next().unwrap();
    let streamed = serde_json::from_str::<Value>(last.trim()).unwrap()["response"].clone();
    assert_eq!(first.get(&path(&streamed, "")).await.json(), streamed);
    let not_kept = post(&first, json!({"store": false})).await;
    assert_eq!(first.get(&path(&not_kept, "")).await.error_code(), "not_found");
    // A drain waits for what is being written.
    first.shutdown.cancel();
    first.served.await.unwrap().unwrap();

    let second = start(folder.path()).await;
    assert_eq!(second.get(&path(&kept, "")).await.json(), kept);
    let items = second.get(&path(&kept, "/input_items")).await.json();
    assert_eq!(items["data"][0]["content"], json!([{"type": "input_text", "text": "What is 1 + 1?"}]));
    assert_eq!((&items["object"], &items["has_more"]), (&json!("list"), &json!(false)));
    let deleted = call(&second, "DELETE", &path(&kept, "")).await;
    assert_eq!(deleted.json(), json!({"id": kept["id"], "object": "response", "deleted": true}));
    for gone in [call(&second, "DELETE", &path(&kept, "")).await, second.get(&path(&kept, "")).await] {
        assert_eq!((gone.status, gone.error_code().as_str()), (404, "not_found"));
    }
    assert_eq!(std::fs::read_dir(folder.path().join("responses")).unwrap().count(), 1, "the streamed one");
}

#[tokio::test]
async fn a_response_goes_on_from_the_previous_one() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path()).await;
    let first = post(&server, json!({"instructions": "Be brief."})).await;
    let second = post(&server, json!({"input": "And twice?", "previous_response_id": first["id"]})).await;
    assert_eq!(second["previous_response_id"], first["id"]);
    let third = post(&server, json!({"input": "Sure?", "previous_response_id": second["id"]})).await;

    let user = |text: &str| json!({"role": "user", "content": text});
    let mut input = vec![user("What is 1 + 1?")];
    input.extend(first["output"].as_array().unwrap().clone());
    input.push(user("And twice?"));
    input.extend(second["output"].as_array().unwrap().clone());
    input.push(user("Sure?"));
    let by_hand = post(&server, json!({"input": input})).await;
    assert_eq!(by_hand["usage"]["input_tokens"], third["usage"]["input_tokens"], "without the old instructions");

    let page = server.get(&path(&third, "/input_items?order=asc&limit=2")).await.json();
    assert_eq!((page["data"].as_array().unwrap().len(), &page["has_more"]), (2, &json!(true)));
    let after = page["last_id"].as_str().unwrap();
    let rest = server.get(&path(&third, &format!("/input_items?order=asc&limit=100&after={after}"))).await.json();
    assert_eq!(rest["data"].as_array().unwrap().len(), input.len() - 2);
    assert_eq!(server.get(&path(&third, "/input_items?limit=0")).await.error_code(), "out_of_range");

    // Each keeps the whole conversation, so that the beginning may go.
    call(&server, "DELETE", &path(&first, "")).await;
    let again = post(&server, json!({"input": "Sure?", "previous_response_id": second["id"]})).await;
    assert_eq!(again["usage"]["input_tokens"], third["usage"]["input_tokens"]);
    for id in [first["id"].as_str().unwrap(), "resp_1", "../lock", ""] {
        let reply = server.post(RESPONSES, &body(json!({"previous_response_id": id}))).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (400, "previous_response_not_found"), "{id}");
        assert_eq!(reply.json()["error"]["param"], "previous_response_id");
    }
}

#[tokio::test]
async fn a_conversation_grows_no_longer_than_a_request_that_would_hold_it() {
    let folder = tempfile::tempdir().unwrap();
    let config = ServiceConfig { body_limit_bytes: 2000, ..ServiceConfig::default() };
    let server = start_with(folder.path(), Setup { config, ..Setup::default() }).await;
    let mut last = post(&server, json!({})).await;
    for _ in 0..10 {
        let reply = server.post(RESPONSES, &body(json!({"previous_response_id": last["id"]}))).await;
        if reply.status != 200 {
            assert_eq!((reply.status, reply.error_code().as_str()), (400, "out_of_range"));
            assert_eq!(reply.json()["error"]["param"], "previous_response_id");
            return;
        }
        last = reply.json();
    }
    panic!("it never ended");
}

#[tokio::test]
async fn only_the_key_that_made_a_response_sees_it() {
    let folder = tempfile::tempdir().unwrap();
    let keys = ["ours", "theirs"].map(|key| ApiKey::new(key.into()).unwrap());
    let config = ServiceConfig { api_keys: keys.into(), ..ServiceConfig::default() };
    let server = start_with(folder.path(), Setup { config, ..Setup::default() }).await;
    let made = server.post_with_key(RESPONSES, "ours", &body(json!({}))).await.json();
    assert_eq!(server.get_with_key(&path(&made, ""), "ours").await.json(), made);
    let with_key = |method: &str, rest: &str| {
        let headers = "authorization: Bearer theirs\r\n";
        request(method, &path(&made, rest), headers, b"")
    };
    for (method, rest) in [("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")] {
        let reply = server.raw(&with_key(method, rest)).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (404, "not_found"), "{method} {rest}");
        assert_eq!(call(&server, method, &path(&made, rest)).await.status, 401);
    }
    let going_on = body(json!({"previous_response_id": made["id"]}));
    assert_eq!(server.post_with_key(RESPONSES, "theirs", &going_on).await.error_code(), "previous_response_not_found");
    assert_eq!(server.post_with_key(RESPONSES, "ours", &going_on).await.status, 200);
    // Behind a drain everything is written.
    server.shutdown.cancel();
    server.served.await.unwrap().unwrap();
    let files = std::fs::read_dir(folder.path().join("responses"))
        .unwrap()
        .map(|file| std::fs::read_to_string(file.unwrap().path()));
    assert!(files.map(Result::unwrap).all(|text| !text.contains("ours")), "keys are digests on disk");
}

#[tokio::test]
async fn a_response_in_the_background_outlives_its_client() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path()).await;
    server.control.hang();
    let queued = post(&server, json!({"background": true})).await;
    assert_eq!((&queued["status"], &queued["background"]), (&json!("queued"), &json!(true)));
    assert_eq!(server.get(&path(&queued, "")).await.json()["status"], "queued");
    let early = server.post(RESPONSES, &body(json!({"previous_response_id": queued["id"]}))).await;
    assert_eq!(early.error_code(), "invalid_value", "nothing goes on from what is not complete");
    server.control.delay_steps(Duration::from_millis(10));
    server.control.release();
    until(&server, &queued, "in_progress").await;
    server.control.delay_steps(Duration::ZERO);
    let done = until(&server, &queued, "completed").await;
    let whole = post(&server, json!({})).await;
    assert_eq!(done["output"][1]["content"], whole["output"][1]["content"]);
    assert_eq!(call(&server, "POST", &path(&done, "/cancel")).await.json(), done, "too late, and no error");
    let foreground = call(&server, "POST", &path(&whole, "/cancel")).await;
    assert_eq!((foreground.status, foreground.error_code().as_str()), (400, "invalid_value"));
    let both = server.post(RESPONSES, &body(json!({"background": true, "stream": true}))).await;
    assert_eq!(both.json()["error"]["param"], "stream");
    let neither = server.post(RESPONSES, &body(json!({"background": true, "store": false}))).await;
    assert_eq!(neither.json()["error"]["param"], "background");
    server.blocks_are_free().await;
}

#[tokio::test]
async fn a_response_in_the_background_can_be_cancelled_and_frees_its_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let setup = Setup { reply: "a".repeat(400), ..Setup::default() };
    let server = start_with(folder.path(), setup).await;
    server.control.delay_steps(Duration::from_millis(5));
    let queued = post(&server, json!({"background": true})).await;
    until(&server, &queued, "in_progress").await;
    let cancelled = call(&server, "POST", &path(&queued, "/cancel")).await.json();
    assert_eq!(cancelled["status"], "cancelled");
    server.blocks_are_free().await;
    assert_eq!(server.get(&path(&queued, "")).await.json(), cancelled);
    let running = post(&server, json!({"background": true})).await;
    assert_eq!(call(&server, "DELETE", &path(&running, "")).await.status, 200);
    server.blocks_are_free().await;
    assert_eq!(server.get(&path(&running, "")).await.status, 404);
}

#[tokio::test]
async fn what_a_restart_interrupted_has_failed() {
    let folder = tempfile::tempdir().unwrap();
    let interrupted = {
        let server = start(folder.path()).await;
        server.control.hang();
        let queued = post(&server, json!({"background": true})).await;
        crate::harness::eventually("it is on disk", || {
            std::fs::read_dir(folder.path().join("responses"))
                .unwrap()
                .any(|f| f.unwrap().path().extension().is_some_and(|e| e == "json"))
        })
        .await;
        queued
    };
    std::fs::write(folder.path().join("responses/resp_half.new"), "{").unwrap();
    let server = start(folder.path()).await;
    let failed = server.get(&path(&interrupted, "")).await.json();
    assert_eq!((&failed["status"], &failed["error"]["code"]), (&json!("failed"), &json!("server_error")));
    assert!(!folder.path().join("responses/resp_half.new").exists());
}
