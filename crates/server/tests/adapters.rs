//! LoRA adapters through the real binary: several at once, loaded and unloaded while it serves, and who may do that.

mod common;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
};

use baton_loadgen::{Client, LocalServer, Target};
use baton_text::TextModel;
use serde_json::{Value, json};
use tempfile::TempDir;

const COMPLETIONS: &str = "/v1/completions";
const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/golden").join(name)
}

fn adapter(name: &str) -> String {
    golden("lora").join(name).to_str().expect("UTF-8").to_owned()
}

fn prompts(case: &str) -> Vec<Value> {
    let golden = fs::read(golden(case).join("golden.json")).expect("a golden");
    let golden: Value = serde_json::from_slice(&golden).expect("JSON");
    let short = |prompt: &&Value| ["one", "short", "mid"].iter().any(|name| prompt["name"] == *name);
    golden["prompts"].as_array().expect("prompts").iter().filter(short).cloned().collect()
}

/// A golden checkpoint with a tokenizer of its size.
struct Model(TempDir);

impl Model {
    fn new() -> Self {
        let folder = TempDir::new().expect("a folder");
        for name in ["config.json", "generation_config.json", "model.safetensors"] {
            fs::copy(golden("llama-rope3").join(name), folder.path().join(name)).expect(name);
        }
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(golden("tokenizers/llama3").join(name), folder.path().join(name)).expect(name);
        }
        Self(folder)
    }

    async fn start(&self, flags: &[&str]) -> LocalServer {
        let model = self.0.path().to_str().expect("UTF-8");
        let flags = [&[model, "--served-model-name", "base", "--log-level", "warn", "--enable-lora"], flags].concat();
        LocalServer::start(Path::new(env!("CARGO_BIN_EXE_baton")), &flags).await.expect("it starts")
    }

    fn text(&self) -> TextModel {
        common::text_model(self.0.path())
    }
}

fn client(server: &LocalServer, key: &str) -> Client {
    Client::new(Target { api_key: Some(key.to_owned()), ..server.target().clone() })
}

/// `POST` with the key `admin`, status and body as text: a success is not JSON.
fn admin(server: &LocalServer, path: &str, body: &Value) -> (u16, String) {
    let (mut stream, body) = (TcpStream::connect(server.address()).expect("a connection"), body.to_string());
    let head = "host: localhost\r\nconnection: close\r\nauthorization: Bearer admin\r\n";
    write!(stream, "POST {path} HTTP/1.1\r\n{head}content-length: {}\r\n\r\n{body}", body.len()).expect("it is sent");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("a reply");
    let (head, body) = reply.split_once("\r\n\r\n").expect("a head");
    (head.split(' ').nth(1).expect("a status").parse().expect("a number"), body.to_owned())
}

#[track_caller]
fn load(server: &LocalServer, name: &str, path: &str, more: Value) -> (u16, String) {
    let mut body = json!({"lora_name": name, "lora_path": path});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    admin(server, LOAD, &body)
}

fn request(model: &str, prompt: &Value, max_tokens: usize) -> Value {
    json!({"model": model, "prompt": prompt["ids"], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

/// What a golden prompt's ids say.
fn text_of(prompt: &Value, text: &TextModel) -> (usize, String) {
    let ids = prompt["greedy_ids"].as_array().expect("ids").iter();
    let ids: Vec<u32> = ids.map(|id| id.as_u64().expect("an id") as u32).collect();
    (ids.len(), text.decode(&ids, true))
}

/// Asks for all golden prompts of all models at once.
async fn assert_golden_texts(server: &LocalServer, text: &TextModel, models: &[(&str, &str)]) {
    let mut calls = Vec::new();
    for (model, case) in models {
        for prompt in prompts(case) {
            let (tokens, expected) = text_of(&prompt, text);
            let (client, body) = (server.client(), request(model, &prompt, tokens));
            let call = tokio::spawn(async move { client.post(COMPLETIONS, &body).await.expect("an answer") });
            calls.push((model, prompt, expected, call));
        }
    }
    for (model, prompt, expected, call) in calls {
        let (status, reply) = call.await.expect("no panic");
        assert_eq!(status, 200, "{reply}");
        assert_eq!(reply["model"], **model);
        assert_eq!(reply["choices"][0]["text"], expected, "{model}, {}", prompt["name"]);
        let prompt_tokens = prompt["ids"].as_array().expect("ids").len();
        assert_eq!(reply["usage"]["prompt_tokens"], prompt_tokens, "{model}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_model_and_two_adapters_serve_their_golden_texts_at_once() {
    let (model, all) = (Model::new(), format!("all={}", adapter("llama-all")));
    let server = model.start(&["--lora-modules", &all, "--admin-api-key", "admin"]).await;
    let added = "Success: LoRA adapter 'rs' added successfully.".to_owned();
    assert_eq!(load(&server, "rs", &adapter("llama-rslora"), json!({})), (200, added));

    let (_, list) = server.client().get("/v1/models").await.expect("an answer");
    let list: Value = serde_json::from_str(&list).expect("JSON");
    let parents = list["data"].as_array().expect("a list").iter().map(|m| (m["id"].clone(), m["parent"].clone()));
    let expected = [(json!("base"), json!(null)), (json!("all"), json!("base")), (json!("rs"), json!("base"))];
    assert_eq!(parents.collect::<Vec<_>>(), expected);

    let cases = [("base", "llama-rope3"), ("all", "lora/llama-all"), ("rs", "lora/llama-rslora")];
    // The second time from the prefix cache, which all three have filled for the same prompts by then.
    let same = &prompts("llama-rope3")[2];
    let mut texts = Vec::new();
    let mut fingerprints = Vec::new();
    for round in 0..2 {
        assert_golden_texts(&server, &model.text(), &cases).await;
        for (name, _) in cases {
            let (_, reply) = server.client().post(COMPLETIONS, &request(name, same, 20)).await.expect("an answer");
            let cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
            assert_eq!(cached > 0, round == 1 || name == "base", "{name}, round {round}: {cached} cached");
            texts.push(reply["choices"][0]["text"].clone());
            fingerprints.push(reply["system_fingerprint"].clone());
        }
    }
    for list in [&texts, &fingerprints] {
        assert_eq!(list[..3], list[3..]);
        assert!(list[0] != list[1] && list[1] != list[2] && list[0] != list[2], "{list:?}");
    }
    assert_eq!(server.metric("baton_lora_adapters").await.expect("a metric"), 2.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_outlives_its_adapter_and_a_new_one_of_the_name_starts_from_nothing() {
    let (model, first) = (Model::new(), format!("name={}", adapter("llama-all")));
    let server = model.start(&["--lora-modules", &first, "--admin-api-key", "admin"]).await;
    let prompt = &prompts("lora/llama-rslora")[2];
    let long = request("name", prompt, 800);
    let alone = server.client().stream(COMPLETIONS, long.clone()).await.expect("a stream").content;

    let running = tokio::spawn({
        let client = server.client();
        async move { client.stream(COMPLETIONS, long).await }
    });
    while server.metric("vllm:num_requests_running").await.expect("a metric") == 0.0 && !running.is_finished() {}
    assert_eq!(admin(&server, UNLOAD, &json!({"lora_name": "name"})).0, 200);
    let (status, reply) = server.client().post(COMPLETIONS, &request("name", prompt, 5)).await.expect("an answer");
    assert_eq!((status.as_u16(), reply["error"]["code"].as_str()), (404, Some("model_not_found")));

    // The prompt's blocks of the first adapter are in the cache under the same tokens.
    assert_eq!(load(&server, "name", &adapter("llama-rslora"), json!({})).0, 200);
    assert_golden_texts(&server, &model.text(), &[("name", "lora/llama-rslora")]).await;
    assert_eq!(running.await.expect("no panic").expect("the stream completes").content, alone);

    // In place, and back again: its own blocks are found.
    assert_eq!(load(&server, "name", &adapter("llama-all"), json!({"load_inplace": true})).0, 200);
    assert_golden_texts(&server, &model.text(), &[("name", "lora/llama-all")]).await;
    let (_, reply) = server.client().post(COMPLETIONS, &request("name", prompt, 1)).await.expect("an answer");
    assert!(reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(0), "{reply}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_folders_are_refused_by_name_and_the_model_serves_on() {
    let (model, folder) = (Model::new(), TempDir::new().expect("a folder"));
    let keys = ["--api-key", "user", "--admin-api-key", "admin", "--max-lora-rank", "4"];
    let report = folder.path().join("report.json");
    let server = model.start(&[&keys[..], &["--load-report", report.to_str().expect("UTF-8")]].concat()).await;
    let path = folder.path().to_str().expect("UTF-8").to_owned();
    let put = |name: &str, content: &[u8]| fs::write(folder.path().join(name), content).expect(name);
    let read = |name: &str| fs::read(Path::new(&adapter("llama-all")).join(name)).expect(name);
    let (config, weights) = (read("adapter_config.json"), read("adapter_model.safetensors"));

    let refused = |status: u16, wanted: &str| {
        let (got, body) = load(&server, "x", &path, json!({}));
        assert!(got == status && body.contains(wanted), "{wanted}: {got} {body}");
    };
    assert_eq!(load(&server, "x", "/no/such/folder", json!({})).0, 404);
    refused(404, "adapter_config.json is missing");
    put("adapter_config.json", &config);
    refused(400, "no such file is there");
    put("adapter_model.bin", b"\x80\x04.");
    refused(400, "pickle");
    for cut in [0, 5, 100, weights.len() - 1] {
        put("adapter_model.safetensors", &weights[..cut]);
        refused(400, if cut == 0 { "is empty" } else { "truncated" });
    }
    put("adapter_model.safetensors", &[&(1_u64 << 40).to_le_bytes()[..], &weights[8..]].concat());
    refused(400, "its header claims");
    put("adapter_model.safetensors", &fs::read(model.0.path().join("model.safetensors")).expect("weights"));
    refused(400, "is no LoRA matrix");
    fs::write(folder.path().join("adapter_config.json"), vec![b'['; 1 << 20]).expect("a deep file");
    refused(400, "adapter_config.json cannot be served");
    let (status, body) = load(&server, "x", &adapter("qwen2-upper"), json!({}));
    assert!(status == 400 && body.contains("rank 8; at most 4"), "{body}");

    let user = client(&server, "user");
    let prompt = &prompts("llama-rope3")[1];
    let (tokens, expected) = text_of(prompt, &model.text());
    let (_, reply) = user.post(COMPLETIONS, &request("base", prompt, tokens)).await.expect("an answer");
    assert_eq!(reply["choices"][0]["text"], expected);

    assert_eq!(user.get("/v1/models/base/load-report").await.expect("an answer").0, 403);
    let (status, body) = client(&server, "admin").get("/v1/models/base/load-report").await.expect("an answer");
    assert_eq!((status.as_u16(), body), (200, fs::read_to_string(report).expect("a report")));
}

#[test]
fn an_adapter_that_does_not_fit_ends_the_start_with_the_reason() {
    let model = Model::new();
    let start = |modules: &[String]| {
        let folder = model.0.path().to_str().expect("UTF-8");
        let flags = ["serve", folder, "--port", "0", "--enable-lora", "--max-loras", "1", "--lora-modules"];
        let output = Command::new(env!("CARGO_BIN_EXE_baton")).args(flags).args(modules).output().expect("it runs");
        assert!(!output.status.success());
        String::from_utf8(output.stderr).expect("UTF-8")
    };
    let [fits, foreign] = ["llama-all", "qwen3-patterns"].map(|case| format!("x={}", adapter(case)));
    let reason = start(&[foreign]);
    assert!(reason.contains("--lora-modules x=") && reason.contains("the adapter does not fit"), "{reason}");
    let reason = start(&["x=/no/such/folder".into()]);
    assert!(reason.contains("--lora-modules x=/no/such/folder") && reason.contains("there is no adapter"), "{reason}");
    assert!(start(&[fits.clone(), fits.replace("x=", "y=")]).contains("--max-loras"));
}
