//! Checkpoints other than the bundled one, through the real binary.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use baton_loadgen::LocalServer;
use baton_text::{TextFiles, TextModel, TokenizerFile};
use serde_json::{Value, json};
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/golden").join(name)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON")
}

async fn start(flags: &[&str]) -> LocalServer {
    let flags = [&["--log-level", "warn"], flags].concat();
    LocalServer::start(Path::new(env!("CARGO_BIN_EXE_baton")), &flags).await.expect("it starts")
}

fn text_model(tokenizer: &str) -> TextModel {
    common::text_model(&golden("tokenizers").join(tokenizer))
}

/// Asks for the greedy continuation of every golden prompt and compares it with the golden ids' text.
async fn assert_golden_text(server: &LocalServer, golden: &Value, text: &TextModel) {
    for prompt in golden["prompts"].as_array().expect("prompts") {
        let ids = prompt["greedy_ids"].as_array().expect("ids").iter();
        let ids: Vec<u32> = ids.map(|id| id.as_u64().expect("an id") as u32).collect();
        let body = json!({"prompt": prompt["ids"], "max_tokens": ids.len(), "temperature": 0, "ignore_eos": true});
        let (status, reply) = server.client().post("/v1/completions", &body).await.expect("an answer");
        assert_eq!(status, 200, "{reply}");
        assert_eq!(reply["choices"][0]["text"], text.decode(&ids, true), "{}", prompt["name"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gguf_file_gives_its_golden_text() {
    let file = golden("gguf/llama-rope3-Q4_0.gguf");
    // Widened: in the file's own blocks activations are bytes, and near ties fall either way.
    let server = start(&[file.to_str().expect("UTF-8"), "--dtype", "float32"]).await;
    let (_, models) = server.client().get("/v1/models").await.expect("an answer");
    assert!(models.contains("\"llama-rope3-Q4_0\""), "{models}");
    let golden = read(&golden("gguf/llama-rope3-Q4_0.golden.json"));
    assert_golden_text(&server, &golden, &text_model("llama3")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r33_a_file_that_is_cut_after_it_was_loaded_changes_nothing() {
    let folder = TempDir::new().expect("a folder");
    // In the file's own blocks, which are the nearest to being used where they lie.
    let file = folder.path().join("model.gguf");
    fs::copy(golden("gguf/llama-rope3-Q4_0.gguf"), &file).expect("a copy");
    let whole = golden("llama-256");
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(whole.join(name), folder.path().join(name)).expect(name);
    }
    let vocabulary = golden("tokenizers/converted/bpe-no-prefix.model");
    fs::copy(&vocabulary, folder.path().join("tokenizer.model")).expect("a copy");
    for (path, weights) in [(&*file, "model.gguf"), (folder.path(), "model.safetensors")] {
        let server = start(&[path.to_str().expect("UTF-8")]).await;
        let answer = async || {
            let body =
                json!({"prompt": "a b c d e", "max_tokens": 20, "temperature": 0, "ignore_eos": true, "logprobs": 1});
            let (status, reply) = server.client().post("/v1/completions", &body).await.expect("an answer");
            assert_eq!(status, 200, "{reply}");
            reply["choices"][0].clone()
        };
        let before = answer().await;
        let weights = folder.path().join(weights);
        fs::OpenOptions::new().write(true).open(&weights).and_then(|file| file.set_len(10)).expect("it is cut");
        assert_eq!(answer().await, before, "{weights:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_with_a_sentencepiece_model_gives_its_golden_text() {
    let folder = TempDir::new().expect("a folder");
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(golden("llama-256").join(name), folder.path().join(name)).expect(name);
    }
    let vocabulary = golden("tokenizers/converted/bpe-no-prefix.model");
    fs::copy(&vocabulary, folder.path().join("tokenizer.model")).expect("a copy");
    let server = start(&[folder.path().to_str().expect("UTF-8")]).await;
    let files = TextFiles {
        tokenizer: TokenizerFile::SentencePiece(&fs::read(&vocabulary).expect("a vocabulary")),
        tokenizer_config: None,
        special_tokens_map: None,
        chat_template_jinja: None,
    };
    let text = TextModel::new(&files).expect("a golden vocabulary");
    assert_golden_text(&server, &read(&golden("llama-256/golden.json")), &text).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_fp8_checkpoint_gives_its_golden_text_and_a_report_of_its_conversions() {
    let folder = TempDir::new().expect("a folder");
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(golden("deepseek-v3-fp8").join(name), folder.path().join(name)).expect(name);
    }
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(golden("tokenizers/deepseek").join(name), folder.path().join(name)).expect(name);
    }
    let report = folder.path().join("report.json");
    let [model, file] = [folder.path(), &report].map(|p| p.to_str().expect("UTF-8"));
    let server = start(&[model, "--dtype", "float32", "--load-report", file]).await;
    assert_golden_text(&server, &read(&golden("deepseek-v3-fp8/golden.json")), &text_model("deepseek")).await;

    let report = read(&report);
    let conversions = report["conversions"].as_array().expect("a list");
    assert!(!conversions.is_empty());
    for conversion in conversions {
        assert!(conversion["tensor"].is_string() && conversion["to"] == "f32", "{conversion}");
        assert_eq!(conversion["max_abs_error"], 0.0, "{conversion}");
        assert!(conversion["bytes_before"].as_u64() < conversion["bytes_after"].as_u64(), "{conversion}");
    }
}
