//! Adapters by name: loading, unloading, listing, and who may do that. The loader is a mock; what adapters compute is
//! tested with models.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_engine::Adapter;
use baton_http::{AdapterRefusal, Adapters, ApiKey, ServiceConfig};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::harness::{CHAT, CONTENT, Reply, Server, Setup, chat_body, eventually, read_until, request, with};

const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";
const REPORT: &str = "/v1/models/tiny/load-report";

/// One adapter per first letter of its path. `held` counts those in memory.
fn mock_load(held: Arc<()>) -> impl Fn(&Path) -> Result<Adapter, AdapterRefusal> + Send + Sync {
    move |path| match path.to_str().expect("UTF-8") {
        "missing" => Err(AdapterRefusal::Missing("there is no such folder".into())),
        "broken" => Err(AdapterRefusal::Invalid("its tensors do not fit".into())),
        "panic" => panic!("canary"),
        other => Ok(Adapter::new([other.as_bytes()[0]; 32], 4, 0, held.clone())),
    }
}

fn key(key: &str) -> Vec<ApiKey> {
    vec![ApiKey::new(key.into()).unwrap()]
}

/// A server that takes at most two adapters, which keys `user` may use and `admin` load, with a count of those held.
async fn start(setup: Setup) -> (Server, Arc<()>) {
    let config = ServiceConfig { api_keys: key("user"), admin_api_keys: key("admin"), ..setup.config };
    let (server, card) = Setup { config, ..setup }.start_loading().await;
    let held = Arc::new(());
    server.install_with(card, Adapters::new(2, mock_load(held.clone())));
    (server, held)
}

async fn load(server: &Server, name: &str, path: &str) -> Reply {
    server.post_with_key(LOAD, "admin", &json!({"lora_name": name, "lora_path": path})).await
}

async fn unload(server: &Server, name: &str) -> Reply {
    server.post_with_key(UNLOAD, "admin", &json!({"lora_name": name})).await
}

async fn chat(server: &Server, model: &str) -> Reply {
    server.post_with_key(CHAT, "user", &with(chat_body(), json!({"model": model}))).await
}

/// Sends a streamed chat and waits for its first event.
async fn open(server: &Server, body: &Value) -> TcpStream {
    let mut stream = server.connect().await;
    let body = body.to_string();
    stream.write_all(&request("POST", CHAT, "authorization: Bearer user\r\n", body.as_bytes())).await.unwrap();
    read_until(&mut stream, "data: ").await;
    stream
}

fn refusal(reply: &Reply) -> (u16, String, Value) {
    (reply.status, reply.error_code(), reply.json()["error"]["param"].clone())
}

#[tokio::test]
async fn an_adapter_is_served_by_its_name_from_load_to_unload() {
    let (server, held) = start(Setup::default()).await;
    assert_eq!(refusal(&chat(&server, "first").await), (404, "model_not_found".into(), json!("model")));

    let reply = load(&server, "first", "a").await;
    assert_eq!((reply.status, reply.body.as_str()), (200, "Success: LoRA adapter 'first' added successfully."));
    let reply = chat(&server, "first").await.json();
    assert_eq!((&reply["model"], &reply["choices"][0]["message"]["content"]), (&json!("first"), &json!(CONTENT)));
    let base = chat(&server, "tiny").await.json();
    assert_ne!(reply["system_fingerprint"], base["system_fingerprint"]);
    assert_eq!(base["system_fingerprint"], "fp_test");
    assert_eq!(server.control.adapters(), [[b'a'; 32]].into());

    let list = server.get_with_key("/v1/models", "user").await.json();
    let parents = list["data"].as_array().unwrap().iter().map(|m| (m["id"].clone(), m.get("parent").cloned()));
    let expected = [("tiny", None), ("org/tiny", None), ("first", Some(json!("tiny")))];
    assert_eq!(parents.collect::<Vec<_>>(), expected.map(|(id, parent)| (json!(id), parent)));
    let one = server.get_with_key("/v1/models/first", "user").await.json();
    assert_eq!(one, list["data"][2]);
    assert_eq!((&one["owned_by"], &one["max_model_len"]), (&json!("local"), &json!(512)));
    assert!(
        server
            .get("/metrics")
            .await
            .body
            .contains("baton_lora_adapters{model_name=\"tiny\",engine=\"0\",generation=\"0123456789ab\"} 1\n")
    );

    let reply = unload(&server, "first").await;
    assert_eq!((reply.status, reply.body.as_str()), (200, "Success: LoRA adapter 'first' removed successfully."));
    assert_eq!(chat(&server, "first").await.error_code(), "model_not_found");
    assert_eq!(refusal(&unload(&server, "first").await), (404, "adapter_not_found".into(), json!("lora_name")));
    eventually("its memory is free", || Arc::strong_count(&held) == 2).await;
}

#[tokio::test]
async fn a_request_finishes_with_the_adapter_it_began_with_and_frees_it() {
    let (server, held) = start(Setup::default()).await;
    load(&server, "name", "a").await;
    server.control.delay_steps(Duration::from_millis(5));
    let body = with(chat_body(), json!({"model": "name", "stream": true, "ignore_eos": true, "max_tokens": 60}));
    let mut stream = open(&server, &body).await;
    server.control.hang();
    server.until("a step hangs", |stats| stats.step_under_way.is_some_and(|t| t > Duration::from_millis(20))).await;
    let metrics = server.get("/metrics").await.body;
    let info = "max_lora=\"2\",running_lora_adapters=\"name\",waiting_lora_adapters=\"\"} ";
    assert!(metrics.contains(info), "{metrics}");

    // In the middle of it the name goes, and comes back as another adapter.
    assert_eq!(unload(&server, "name").await.status, 200);
    assert_eq!(load(&server, "name", "b").await.status, 200);
    assert_eq!(Arc::strong_count(&held), 4, "the test's, the loader's, and two adapters");
    server.control.release();
    read_until(&mut stream, "[DONE]").await;
    assert_eq!(server.control.adapters(), [[b'a'; 32]].into());
    eventually("the first is free", || Arc::strong_count(&held) == 3).await;
    assert_eq!(chat(&server, "name").await.status, 200);
    assert_eq!(server.control.adapters(), [[b'a'; 32], [b'b'; 32]].into());
}

#[tokio::test]
async fn a_name_is_replaced_only_in_place_and_two_names_are_all_there_is_room_for() {
    let (server, held) = start(Setup::default()).await;
    load(&server, "one", "a").await;
    let taken = load(&server, "one", "b").await;
    assert_eq!(refusal(&taken), (400, "invalid_value".into(), json!("lora_name")));
    assert!(taken.body.contains("load_inplace"));
    let before = chat(&server, "one").await.json()["system_fingerprint"].clone();
    let body = json!({"lora_name": "one", "lora_path": "b", "load_inplace": true});
    assert_eq!(server.post_with_key(LOAD, "admin", &body).await.status, 200);
    assert_ne!(chat(&server, "one").await.json()["system_fingerprint"], before);

    assert_eq!(load(&server, "two", "c").await.status, 200);
    let full = load(&server, "three", "d").await;
    assert_eq!(refusal(&full), (400, "invalid_value".into(), json!("lora_name")));
    assert!(full.body.contains("--max-loras"));
    eventually("only two are held", || Arc::strong_count(&held) == 4).await;
    unload(&server, "two").await;
    assert_eq!(load(&server, "three", "d").await.status, 200);
}

#[tokio::test]
async fn what_cannot_be_loaded_says_why_and_changes_nothing() {
    let (server, _) = start(Setup::default()).await;
    assert_eq!(refusal(&load(&server, "x", "missing").await), (404, "adapter_not_found".into(), json!("lora_path")));
    let broken = load(&server, "x", "broken").await;
    assert_eq!(refusal(&broken), (400, "invalid_value".into(), json!("lora_path")));
    assert!(broken.body.contains("its tensors do not fit"));
    let panicked = load(&server, "x", "panic").await;
    assert_eq!(panicked.status, 500);
    assert!(!panicked.body.contains("canary"));

    for name in ["tiny", "org/tiny", "a b", "caf\u{e9}", "new\nline", &"x".repeat(257)] {
        assert_eq!(
            refusal(&load(&server, name, "a").await),
            (400, "invalid_value".into(), json!("lora_name")),
            "{name}"
        );
    }
    let bodies = [
        (json!({}), "missing_required_parameter"),
        (json!({"lora_name": "x"}), "missing_required_parameter"),
        (json!({"lora_name": "", "lora_path": "a"}), "missing_required_parameter"),
        (json!({"lora_name": "x", "lora_path": null}), "missing_required_parameter"),
        (json!({"lora_name": 1, "lora_path": "a"}), "invalid_type"),
        (json!({"lora_name": "x", "lora_path": "a", "load_inplace": 1}), "invalid_type"),
        (json!({"lora_name": "x", "lora_path": "a", "more": 1}), "unknown_parameter"),
    ];
    for (body, code) in bodies {
        let reply = server.post_with_key(LOAD, "admin", &body).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (400, code), "{body}");
    }
    assert_eq!(server.get_with_key("/v1/models", "user").await.json()["data"].as_array().unwrap().len(), 2);
    assert_eq!(load(&server, "x", "a").await.status, 200);
}

#[tokio::test]
async fn admin_routes_need_an_admin_key_which_is_good_for_nothing_else() {
    let (server, _) = start(Setup::default()).await;
    let body = json!({"lora_name": "x", "lora_path": "a"});
    let code = |reply: Reply| (reply.status, reply.error_code());
    let (unknown, foreign) = ((401, "invalid_api_key".to_owned()), (403, "insufficient_scope".to_owned()));
    let commands = ["shadow", "share", "promote", "rollback", "nope"].map(|word| format!("/admin/rollout/{word}"));
    let posts = [LOAD, UNLOAD, "/admin/rollout"].into_iter().chain(commands.iter().map(String::as_str));
    for path in posts {
        assert_eq!(code(server.post(path, &body).await), unknown);
        assert_eq!(code(server.post_with_key(path, "other", &body).await), unknown);
        assert_eq!(code(server.post_with_key(path, "user", &body).await), foreign);
    }
    let reports = ["load-report", "handoff"]
        .map(|report| ["tiny", "org/tiny", "org%2Ftiny", "nope"].map(|id| format!("/v1/models/{id}/{report}")));
    let shown = ["/admin/generations", "/admin/rollout", REPORT].map(str::to_owned);
    for report in &reports.into_iter().flatten().chain(shown).collect::<Vec<_>>() {
        assert_eq!(code(server.get(report).await), unknown);
        assert_eq!(code(server.get_with_key(report, "user").await), foreign);
    }
    assert_eq!(code(server.post_with_key(CHAT, "admin", &chat_body()).await), foreign);
    assert_eq!(code(server.get_with_key("/v1/models", "admin").await), foreign);
    assert_eq!(code(server.get_with_key("/v1/models/tiny", "admin").await), foreign);
    assert_eq!(code(server.get_with_key("/nope", "admin").await), (404, "not_found".to_owned()));
}

#[tokio::test]
async fn without_keys_everybody_is_served_and_nobody_is_an_admin() {
    let (server, card) = Setup::default().start_loading().await;
    server.install_with(card, Adapters::new(2, mock_load(Arc::default())));
    assert_eq!(server.chat(json!({})).await.status, 200);
    let replies = [
        server.post(LOAD, &json!({})).await,
        server.post(UNLOAD, &json!({})).await,
        server.get(REPORT).await,
        server.get("/v1/models/tiny/handoff").await,
        server.get("/admin/generations").await,
        server.get("/admin/rollout").await,
        server.post("/admin/rollout", &json!({})).await,
        server.post("/admin/rollout/promote", &json!({})).await,
    ];
    for reply in replies {
        assert_eq!((reply.status, reply.error_code().as_str()), (401, "invalid_api_key"));
        assert!(reply.body.contains("--admin-api-key"));
    }
}

#[tokio::test]
async fn a_server_without_adapters_says_so() {
    let config = ServiceConfig { admin_api_keys: key("admin"), ..ServiceConfig::default() };
    let server = Setup { config, ..Setup::default() }.start().await;
    for reply in [load(&server, "x", "a").await, unload(&server, "x").await] {
        assert_eq!(reply.status, 400);
        assert!(reply.body.contains("--enable-lora"));
    }
}

#[tokio::test]
async fn the_load_report_is_that_of_the_model() {
    let (server, _) = start(Setup::default()).await;
    for path in [REPORT, "/v1/models/org/tiny/load-report", "/v1/models/org%2Ftiny/load-report"] {
        let reply = server.get_with_key(path, "admin").await;
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
        assert_eq!(reply.body, r#"{"architecture":"mock"}"#);
    }
    let reply = server.get_with_key("/v1/models/nope/load-report", "admin").await;
    assert_eq!((reply.status, reply.error_code().as_str()), (404, "model_not_found"));
}

#[tokio::test]
async fn while_draining_no_adapter_comes_or_goes() {
    let (server, _) = start(Setup::default()).await;
    server.control.delay_steps(Duration::from_millis(5));
    let body = with(chat_body(), json!({"stream": true, "ignore_eos": true, "max_tokens": 100}));
    let _running = open(&server, &body).await;
    server.service.drain();
    for reply in [load(&server, "x", "a").await, unload(&server, "x").await] {
        assert_eq!((reply.status, reply.error_code().as_str()), (503, "draining"));
    }
}

/// What files a path has, as a digest.
type DigestOf = fn(&str) -> Option<u8>;

#[tokio::test]
async fn adapters_are_loaded_again_for_another_runner_and_those_that_cannot_be_are_gone() {
    let (server, card) = Setup::default().start_loading().await;
    // As the files are at first, and later.
    let digest: Arc<Mutex<DigestOf>> = Arc::new(Mutex::new(|path| path.bytes().next()));
    let load = {
        let digest = digest.clone();
        move |path: &Path| match digest.lock().unwrap()(path.to_str().expect("UTF-8")) {
            Some(digest) => Ok(Adapter::new([digest; 32], 4, 0, ())),
            None => Err(AdapterRefusal::Missing("it is gone".into())),
        }
    };
    let adapters = Adapters::new(3, load);
    let taken: Vec<Adapter> = ["kept", "changed", "gone"]
        .into_iter()
        .zip(1u8..)
        .map(|(name, digest)| {
            let path = format!("{}{name}", digest as char);
            let adapter = Adapter::new([digest; 32], 4, 0, ());
            adapters.add(&card, name, path.into(), adapter.clone(), false).unwrap();
            adapter
        })
        .collect();
    server.install_with(card, adapters.clone());
    *digest.lock().unwrap() = |path| match path {
        "\u{2}changed" => Some(7),
        "\u{3}gone" => None,
        other => other.bytes().next(),
    };
    adapters.reload();
    assert_eq!(taken.iter().map(|adapter| adapter.current().is_some()).collect::<Vec<_>>(), [true, false, false]);
    for (name, status) in [("kept", 200), ("changed", 404), ("gone", 404)] {
        let reply = server.chat(json!({"model": name})).await;
        assert_eq!(reply.status, status, "{name}: {reply:?}");
    }
}
