//! `baton quantize` as a shell sees it, and what it saves served beside the original.

use std::path::Path;
use std::process::{Command, Output};

use baton_loadgen::LocalServer;
use serde_json::{Value, json};
use tempfile::TempDir;

const ABACUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/abacus");

fn quantize(model: &str, format: &str, out: &Path) -> Output {
    let arguments = ["quantize", model, "--quantize", format, "--out"];
    Command::new(env!("CARGO_BIN_EXE_baton")).args(arguments).arg(out).output().expect("it runs")
}

/// Sampled text with the logprobs of its tokens.
async fn answer(flags: &[&str]) -> Value {
    let flags = [flags, &["--log-level", "warn", "--served-model-name", "abacus"]].concat();
    let server = LocalServer::start(Path::new(env!("CARGO_BIN_EXE_baton")), &flags).await.expect("it starts");
    let body = json!({"model": "abacus", "prompt": "12 + 30 =", "max_tokens": 24, "seed": 7, "logprobs": 5, "ignore_eos": true});
    let (status, reply) = server.client().post("/v1/completions", &body).await.expect("an answer");
    assert_eq!(status, 200, "{reply}");
    reply["choices"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_saved_answers_as_quantising_at_load_does() {
    let temp = TempDir::new().expect("a folder");
    for format in ["q8_0", "q4_k"] {
        let out = temp.path().join(format);
        let output = quantize(ABACUS, format, &out);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}\n", out.display()));
        assert!(errors.contains("tensors converted"), "{errors}");
        let saved = answer(&[out.to_str().expect("UTF-8")]).await;
        assert_eq!(saved, answer(&[ABACUS, "--quantize", format]).await);
    }
}

#[test]
fn what_exists_is_not_replaced() {
    let temp = TempDir::new().expect("a folder");
    let output = quantize(ABACUS, "q8_0", temp.path());
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("exists already"));
}
