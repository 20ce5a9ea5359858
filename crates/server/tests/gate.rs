//! The gate of `baton serve`: what is proven, what is not served, and who sees it.

mod common;

use std::{path::Path, process::Command, time::Duration};

use baton_loadgen::{Client, LocalServer, Target, free_port};
use common::bundle::{Bundle, models};
use serde_json::{Value, json};

const GUARD: Duration = Duration::from_secs(60);

fn abacus() -> Bundle {
    Bundle::copy(&models("abacus"))
}

/// Serves a bundle; ready means that `path` answers with 200.
async fn serve(bundle: &Bundle, flags: &[&str], ready: &str) -> LocalServer {
    let port = free_port().expect("a port");
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.arg("serve").arg(bundle.path()).args(["--served-model-name", "abacus", "--admin-api-key", "admin"]);
    command.args(["--log-level", "error", "--port", &port.to_string()]).args(flags);
    LocalServer::launch(command, port, ready, GUARD).await.expect("it starts")
}

fn admin(server: &LocalServer) -> Client {
    Client::new(Target { api_key: Some("admin".into()), ..server.target().clone() })
}

async fn report(server: &LocalServer) -> Value {
    for _ in 0..600 {
        let (status, body) = admin(server).get("/v1/models/abacus/handoff").await.expect("an answer");
        if status == 200 {
            return serde_json::from_str(&body).expect("JSON");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("no report")
}

/// Runs `baton serve`, which must end by itself, and gives what it said.
fn refusal(bundle: &Bundle, flags: &[&str]) -> String {
    let run = Command::new(env!("CARGO_BIN_EXE_baton"))
        .arg("serve")
        .arg(bundle.path())
        .args(["--port", "0"])
        .args(flags)
        .output()
        .expect("it runs");
    assert_eq!(run.status.code(), Some(1));
    String::from_utf8_lossy(&run.stderr).into_owned()
}

/// So that the device computes something else than was trained, with digests that fit.
fn spoil(bundle: &Bundle) {
    bundle.bf16("model.layers.2.self_attn.o_proj.weight", |_, weight| weight * 2.0);
    bundle.digest_anew(true);
}

fn question() -> Value {
    json!({"model": "abacus", "temperature": 0, "messages": [{"role": "user", "content": "What is 347 + 286?"}]})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proven_generation_is_served_and_shows_its_proof() {
    let bundle = abacus();
    let server = serve(&bundle, &["--handoff", "require"], "/ready").await;
    let report = report(&server).await;
    assert_eq!(report["verdict"], "pass", "{report:#}");
    let generation = report["bundle"]["generation"].as_str().expect("a digest").to_owned();
    let numerics = &report["devices"][0]["numerics"];
    let gauge = server.metric("baton_parity_kl").await.expect("a metric");
    assert!((gauge - numerics["kl"].as_f64().unwrap()).abs() < 1e-9);

    let (status, reply) = server.client().post("/v1/chat/completions", &question()).await.expect("an answer");
    assert_eq!((status.as_u16(), reply["choices"][0]["finish_reason"].as_str()), (200, Some("stop")));
    let (_, generations) = admin(&server).get("/admin/generations").await.expect("an answer");
    assert!(generations.contains(&generation), "{generations}");
    // The report is the admin's.
    let (status, _) = server.client().get("/v1/models/abacus/handoff").await.expect("an answer");
    assert!(status == 401 || status == 403, "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_computes_otherwise_is_not_served_where_proof_is_required_and_warned_of_where_not() {
    let bundle = abacus();
    spoil(&bundle);
    let server = serve(&bundle, &["--handoff", "require"], "/startup").await;
    assert_eq!(report(&server).await["verdict"], "fail");
    let (status, body) = server.client().get("/ready").await.expect("an answer");
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("logprob"), "says what differs: {body}");
    let (status, _) = server.client().post("/v1/chat/completions", &question()).await.expect("an answer");
    assert_eq!(status, 503);
    drop(server);

    let server = serve(&bundle, &[], "/ready").await;
    assert_eq!(report(&server).await["verdict"], "fail");
    let (status, _) = server.client().post("/v1/chat/completions", &question()).await.expect("an answer");
    assert_eq!(status, 200);
    assert!(server.metric("baton_parity_max_abs_logprob_diff").await.expect("a metric") > 0.5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn golden_cases_are_replayed_while_nobody_asks_and_find_the_same_bits() {
    let bundle = abacus();
    let server = serve(&bundle, &["--handoff", "require", "--canary-interval", "1"], "/ready").await;
    for _ in 0..600 {
        if server.metric("baton_canary_runs_total").await.expect("a metric") >= 2.0 {
            assert_eq!(server.metric("baton_canary_drift").await.expect("a metric"), 0.0);
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("no replay");
}

#[test]
fn damaged_files_end_the_start_where_proof_is_required() {
    let bundle = abacus();
    bundle.edit("tokenizer_config.json", |bytes| {
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
    });
    let said = refusal(&bundle, &["--handoff", "require"]);
    assert!(said.contains("tokenizer_config.json") && said.contains("SHA-256"), "{said}");

    let bare = abacus();
    std::fs::remove_file(bare.file("handoff.json")).expect("it was there");
    assert!(refusal(&bare, &["--handoff", "require"]).contains("handoff.json"));
}

#[test]
fn a_bundle_by_an_unknown_key_or_by_none_is_refused_where_keys_are_trusted() {
    let golden = models("golden/handoff");
    let (trusted, other) = (golden.join("trusted.pub"), golden.join("other.pub"));
    let key = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let signed = Bundle::copy(&golden.join("tiny"));
    let said = refusal(&signed, &["--trusted-keys", &key(&other)]);
    assert!(said.contains("not among the trusted keys"), "{said}");
    assert!(refusal(&abacus(), &["--trusted-keys", &key(&trusted)]).contains("unsigned"));

    let verified = signed.verify(&["--trusted-keys", &key(&trusted)]);
    assert_eq!(verified.code, 0, "{:#}", verified.report);
    let verified = signed.verify(&["--trusted-keys", &key(&other)]);
    assert_eq!(verified.code, 1);
    assert!(verified.report.to_string().contains("not among the trusted keys"));
    signed.manifest(|manifest| manifest["model"]["name"] = "another".into());
    let verified = signed.verify(&["--trusted-keys", &key(&trusted)]);
    assert_eq!(verified.code, 1);
    assert!(verified.report.to_string().contains("not true of this manifest"), "{:#}", verified.report);
}
