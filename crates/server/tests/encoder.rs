//! Encoders over HTTP: texts through the checkpoint's own tokenizer become what transformers computes.

use std::path::{Path, PathBuf};
use std::process::Command;

use baton_loadgen::LocalServer;
use serde_json::{Value, json};

const BINARY: &str = env!("CARGO_BIN_EXE_baton");

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../encoder/tests/data").join(name)
}

fn golden(name: &str) -> Vec<Value> {
    let json = std::fs::read(case(name).join("golden.json")).expect("golden values");
    let json: Value = serde_json::from_slice(&json).expect("golden values");
    json["texts"].as_array().expect("texts").clone()
}

async fn start(name: &str, flags: &[&str]) -> LocalServer {
    let folder = case(name).display().to_string();
    let flags = [&[folder.as_str(), "--log-level", "warn"], flags].concat();
    LocalServer::start(Path::new(BINARY), &flags).await.expect("it starts")
}

async fn ask(server: &LocalServer, path: &str, body: Value) -> Value {
    let (status, reply) = server.client().post(path, &body).await.expect("an answer");
    assert_eq!(status, 200, "{reply}");
    reply
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().expect("numbers").iter().map(|x| x.as_f64().expect("a number")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn embeddings_of_texts_and_of_ids_equal_those_of_transformers() {
    for (name, pooling, flags) in [
        ("bert", "mean", &["--max-model-len", "40"][..]),
        ("bert", "last", &["--pooling-type", "last"]),
        ("xlm-roberta", "cls", &[]),
    ] {
        let server = start(name, flags).await;
        let entries: Vec<Value> =
            golden(name).into_iter().filter(|e| pooling == "mean" || floats(&e["ids"]).len() <= 24).collect();
        for key in ["text", "ids"] {
            let inputs: Vec<&Value> = entries.iter().map(|entry| &entry[key]).collect();
            let reply = ask(&server, "/v1/embeddings", json!({"input": inputs})).await;
            let tokens: usize = entries.iter().map(|entry| floats(&entry["ids"]).len()).sum();
            assert_eq!(reply["usage"]["total_tokens"], json!(tokens));
            for (entry, item) in entries.iter().zip(reply["data"].as_array().expect("data")) {
                let (expected, embedding) = (floats(&entry[pooling]), floats(&item["embedding"]));
                let length = match name {
                    "bert" => expected.iter().map(|x| x * x).sum::<f64>().sqrt(),
                    _ => 1.0,
                };
                let off = expected.iter().zip(&embedding).map(|(a, b)| (a / length - b).abs()).fold(0.0, f64::max);
                assert!(off < 1e-5 && expected.len() == embedding.len(), "{name}, {}: {off}", entry["text"]);
            }
        }
        let metric = server.metric("baton_encoder_inputs_total").await.expect("a counter");
        assert_eq!(metric, 2.0 * entries.len() as f64);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scores_of_pairs_equal_those_of_transformers_and_order_documents() {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for name in ["bert-score", "xlm-roberta-score"] {
        let server = start(name, &[]).await;
        let entries = golden(name);
        let expected = |entry: &Value| {
            let logit = entry["logit"].as_f64().expect("a number");
            if name == "bert-score" { logit } else { sigmoid(logit) }
        };
        let side = |i: usize| entries.iter().map(|entry| entry["text"][i].clone()).collect::<Vec<_>>();
        let reply = ask(&server, "/score", json!({"text_1": side(0), "text_2": side(1)})).await;
        for (entry, item) in entries.iter().zip(reply["data"].as_array().expect("data")) {
            let off = (item["score"].as_f64().expect("a number") - expected(entry)).abs();
            assert!(off < 1e-5, "{name}, {}: {off}", entry["text"]);
        }
        // The first two share their question.
        let body = json!({"query": entries[0]["text"][0], "documents": [side(1)[0], side(1)[1]], "top_n": 1});
        let reply = ask(&server, "/v1/rerank", body).await;
        let best = usize::from(expected(&entries[1]) > expected(&entries[0]));
        assert_eq!(reply["results"][0]["index"], json!(best));
        let off = reply["results"][0]["relevance_score"].as_f64().expect("a number") - expected(&entries[best]);
        assert!(off.abs() < 1e-5, "{reply}");
    }
}

#[test]
fn settings_that_an_encoder_cannot_honour_are_refused_by_name() {
    let refusal = |name: &str, flags: &[&str]| {
        let output = Command::new(BINARY)
            .arg("serve")
            .arg(case(name))
            .args(["--port", "0"])
            .args(flags)
            .output()
            .expect("it runs");
        assert!(!output.status.success(), "{flags:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    for flags in [
        &["--device", "reference"][..],
        &["--dtype", "bfloat16"],
        &["--quantize", "q8_0"],
        &["--threads", "1"],
        &["--enable-lora"],
        &["--handoff", "require"],
        &["--max-model-len", "41"],
    ] {
        let said = refusal("bert", flags);
        let named = if flags[0] == "--max-model-len" { "1 to 40" } else { flags[0] };
        assert!(said.contains(named), "{flags:?}: {said}");
    }
    assert!(refusal("bert-score", &["--pooling-type", "cls"]).contains("pooling"));
    let abacus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus");
    let output = Command::new(BINARY)
        .arg("serve")
        .arg(abacus)
        .args(["--port", "0", "--pooling-type", "cls"])
        .output()
        .expect("it runs");
    assert!(String::from_utf8_lossy(&output.stderr).contains("--pooling-type"));
}
