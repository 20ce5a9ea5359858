//! The real binary on a simulated Ascend NPU (`crates/ascend-sim`), through the calls that real ones get.

mod common;

use std::{fs, process::Command, sync::Arc, time::Duration};

use baton_loadgen::{LocalServer, evaluation::ask, free_port};
use serde_json::{Value, json};
use tempfile::TempDir;

use common::abacus::rows;

const PATIENCE: Duration = Duration::from_secs(120);

/// A server on simulated devices, and where these leave their report.
struct Simulated {
    server: Arc<LocalServer>,
    folder: TempDir,
}

impl Simulated {
    async fn start(flags: &[&str]) -> Self {
        Self::on("Ascend910B3", flags).await
    }

    async fn on(chip: &str, flags: &[&str]) -> Self {
        let folder = common::simulator();
        let port = free_port().expect("a port");
        let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
        command.args(["serve", "--port", &port.to_string(), "--device", "ascend:0", "--handoff", "off"]);
        command.args(["--log-level", "warn"]).args(flags);
        command.env("BATON_ASCEND_LIBS", folder.path()).env("ASCEND_SIM_DEVICES", "4");
        command.env("ASCEND_SIM_SOC", chip).env("ASCEND_SIM_REPORT", folder.path().join("report.json"));
        let server = LocalServer::launch(command, port, "/ready", PATIENCE).await.expect("it starts");
        Self { server: Arc::new(server), folder }
    }

    /// What it answers to a sum.
    async fn sum(&self) -> Value {
        self.reply().await["choices"][0]["message"].clone()
    }

    async fn reply(&self) -> Value {
        let message = json!({"role": "user", "content": "What is 347 + 286?"});
        let body = json!({"messages": [message], "max_tokens": 120, "temperature": 0});
        let (status, reply) = self.server.client().post("/v1/chat/completions", &body).await.expect("an answer");
        assert_eq!(status, 200, "{reply}");
        reply
    }

    /// Ends the server and gives the devices' report.
    async fn report(self) -> Value {
        let mut server = Arc::into_inner(self.server).expect("no client is left");
        server.terminate().expect("a signal");
        assert!(server.wait(PATIENCE).await.expect("it ends").success());
        let report = fs::read(self.folder.path().join("report.json")).expect("a report");
        serde_json::from_slice(&report).expect("JSON")
    }
}

/// That every handle and byte was given back, and no rule was broken.
fn expect_clean(report: &Value) {
    assert_eq!(report["violations"], json!([]), "{report}");
    let live = report["live"].as_object().expect("counters");
    assert!(!live.is_empty() && live.values().all(|count| *count == 0), "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abacus_is_as_right_as_its_reference_to_a_point() {
    let simulated = Simulated::start(&["--max-num-seqs", "32"]).await;
    let (questions, references) = (rows("eval.jsonl"), rows("eval_reference.jsonl"));
    let answers = ask(simulated.server.target(), &questions).await.expect("answers");
    let right = answers.iter().filter(|(row, answer)| answer.is_right(row)).count();
    let right_reference = references.iter().filter(|reference| reference["right"] == true).count();
    assert_eq!((answers.len(), references.len()), (360, 360));
    assert!(right.abs_diff(right_reference) * 100 <= 360, "{right} of 360 right, the reference has {right_reference}");
    expect_clean(&simulated.report().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_left_on_the_device_after_a_thousand_requests_of_which_many_are_dropped() {
    let simulated = Simulated::start(&["--max-num-seqs", "32"]).await;
    let calls: Vec<_> = (0..20)
        .map(|caller| {
            let client = simulated.server.client();
            tokio::spawn(async move {
                let mut answered = 0;
                for i in 0..50 {
                    let prompt = format!("{caller} + {i} = ");
                    let body = json!({"prompt": prompt, "max_tokens": 4 + i % 5, "temperature": 0});
                    let call = client.post("/v1/completions", &body);
                    if i % 3 == 0 {
                        // Dropped while it waits or runs, if it is not that quick.
                        answered += usize::from(tokio::time::timeout(Duration::from_millis(20), call).await.is_ok());
                    } else {
                        assert_eq!(call.await.expect("an answer").0, 200);
                        answered += 1;
                    }
                }
                answered
            })
        })
        .collect();
    let mut answered = 0;
    for call in calls {
        answered += call.await.expect("no panic");
    }
    assert!((20 * 33..1000).contains(&answered), "{answered} of 1000 answered: some are dropped");
    expect_clean(&simulated.report().await);
}

#[test]
fn a_share_of_memory_that_does_not_hold_the_model_is_refused_with_the_arithmetic() {
    let refusal = |share: &str| {
        let folder = common::simulator();
        let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
        command.args(["serve", "--port", "0", "--device", "ascend:0", "--handoff", "off"]);
        command.args(["--gpu-memory-utilization", share]);
        command.env("BATON_ASCEND_LIBS", folder.path()).env("ASCEND_SIM_MEMORY", (64 << 20).to_string());
        let output = command.output().expect("it ends");
        assert!(!output.status.success());
        String::from_utf8(output.stderr).expect("UTF-8")
    };
    let weights = refusal("0.01");
    assert!(weights.contains("a share of 0.01 of the device's 67108864 bytes is 671088 bytes"), "{weights}");
    assert!(weights.contains("before loading: the weights take 5148160 bytes"), "{weights}");
    let cache = refusal("0.081");
    assert!(cache.contains("are in use with the weights loaded: "), "{cache}");
    assert!(
        cache.contains("one sequence of 1024 tokens takes") && cache.contains("would fit: a share of 0."),
        "{cache}"
    );
    assert!(refusal("1.5").contains("above 0, at most 1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_devices_write_what_one_writes() {
    let (mut texts, mut fingerprints) = (Vec::new(), Vec::new());
    for ranks in ["1", "2"] {
        // In f32, where a sum over ranks cannot turn a near tie.
        let flags = ["--tensor-parallel-size", ranks, "--dtype", "float32"];
        let simulated = Simulated::start(&flags).await;
        let reply = simulated.reply().await;
        texts.push(reply["choices"][0]["message"].clone());
        fingerprints.push(reply["system_fingerprint"].clone());
        expect_clean(&simulated.report().await);
    }
    assert!(texts[0]["content"].as_str().expect("text").contains("633"), "{}", texts[0]);
    assert_eq!(texts[0], texts[1]);
    assert_ne!(fingerprints[0], fingerprints[1], "it was two");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chip_without_bf16_serves_a_bf16_checkpoint_in_f16() {
    let simulated = Simulated::on("Ascend310P3", &[]).await;
    let answer = simulated.sum().await;
    assert!(answer["content"].as_str().expect("text").contains("633"), "{answer}");
    expect_clean(&simulated.report().await);
}
