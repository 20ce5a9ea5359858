//! `baton quantize` as a shell sees it, and what it saves served beside the original.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use baton_handoff::Manifest;
use baton_loadgen::LocalServer;
use common::bundle::Bundle;
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

fn manifest(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("handoff.json")).expect("a manifest")).expect("JSON")
}

/// What is true of every bundle made of another: judged by the same golden values, in a coarser class.
fn assert_handed_on(original: &Path, new: &Path, format: &str, class: &str) {
    let verdict = Bundle::copy(new).verify(&[]);
    assert_eq!(verdict.code, 0, "{format}: {:#}{}", verdict.report, verdict.stderr);
    assert_eq!(verdict.report["verdict"], "pass");
    assert_eq!(verdict.report["devices"][0]["precision"], class, "{format}");
    let (before, after) = (manifest(original), manifest(new));
    let parsed =
        |folder: &Path| Manifest::parse(&fs::read(folder.join("handoff.json")).expect("read")).expect("parsed");
    let (was, is) = (parsed(original), parsed(new));
    assert!(was.cases == is.cases && was.tolerances == is.tolerances, "golden values");
    assert!(was.trained == is.trained && was.computed == is.computed, "how they were made");
    assert_ne!(before["generation"], after["generation"]);
    let lineage = &after["model"]["lineage"];
    assert_eq!((&lineage["quantized_from"], &lineage["format"]), (&before["generation"], &json!(format)));
    assert!(!new.join("handoff.json.minisig").exists(), "no one signed this");
}

#[test]
fn of_a_bundle_a_bundle_is_made_and_of_that_another() {
    let temp = TempDir::new().expect("a folder");
    let original = Bundle::copy(Path::new(ABACUS));
    original.manifest(|manifest| manifest["model"]["lineage"] = json!({"steps": 24000}));
    fs::write(original.file("handoff.json.minisig"), "of the original").expect("written");
    let out = ["q8_0", "int8", "q4_0"].map(|format| (format, temp.path().join(format)));
    for (format, out) in &out {
        let output = quantize(original.path().to_str().expect("UTF-8"), format, out);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_handed_on(original.path(), out, format, if *format == "q4_0" { "int4" } else { "int8" });
        assert_eq!(manifest(out)["model"]["lineage"]["steps"], 24000);
    }
    let twice = temp.path().join("twice");
    let first = &out[0].1;
    assert!(quantize(first.to_str().expect("UTF-8"), "int8", &twice).status.success());
    assert_handed_on(first, &twice, "int8", "int8");
    assert_eq!(manifest(&twice)["model"]["lineage"]["original"], manifest(first)["model"]["lineage"]);
}

#[test]
fn nothing_is_made_of_a_bundle_that_is_not_what_was_handed_over() {
    let temp = TempDir::new().expect("a folder");
    let refused = |bundle: &Bundle, named: &str| {
        let output = quantize(bundle.path().to_str().expect("UTF-8"), "q8_0", &temp.path().join("out"));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains(named), "{errors}");
        assert_eq!(fs::read_dir(temp.path()).expect("a folder").count(), 0);
    };
    let original = || Bundle::copy(Path::new(ABACUS));
    let bundle = original();
    bundle.edit("train/data.py", |bytes| bytes[0] ^= 1);
    refused(&bundle, "train/data.py has SHA-256");
    let bundle = original();
    bundle.edit("model.safetensors", |bytes| *bytes.last_mut().expect("weights") ^= 1);
    refused(&bundle, "model.safetensors has SHA-256");
    let bundle = original();
    fs::write(bundle.file("more.json"), "{}").expect("written");
    refused(&bundle, "more.json is not listed");
    let bundle = original();
    bundle.manifest(|manifest| manifest["version"] = 2.into());
    refused(&bundle, "version 2");
}

#[test]
fn what_is_no_bundle_becomes_none() {
    let temp = TempDir::new().expect("a folder");
    let plain = Bundle::copy(Path::new(ABACUS));
    fs::remove_file(plain.file("handoff.json")).expect("there");
    let out = temp.path().join("out");
    assert!(quantize(plain.path().to_str().expect("UTF-8"), "q8_0", &out).status.success());
    assert!(out.join("model.safetensors").exists() && !out.join("handoff.json").exists());
}
