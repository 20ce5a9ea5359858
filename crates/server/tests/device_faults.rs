//! The real binary on a simulated NPU that fails: what its clients, its probes and its supervisor see.

mod common;

use std::{fs, process::Command, time::Duration};

use baton_loadgen::{LocalServer, free_port};
use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// A server on a simulated NPU, and how to have that fail.
struct Faulty {
    server: LocalServer,
    folder: TempDir,
}

impl Faulty {
    async fn start(flags: &[&str]) -> Self {
        let folder = common::simulator();
        let control = folder.path().join("control");
        fs::write(&control, "").expect("a file");
        let port = free_port().expect("a port");
        let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
        command.args(["serve", "--port", &port.to_string(), "--device", "ascend:0", "--handoff", "off"]);
        command.args(["--log-level", "warn"]).args(flags);
        command.env("BATON_ASCEND_LIBS", folder.path()).env("ASCEND_SIM_DEVICES", "2");
        command.env("ASCEND_SIM_CONTROL", control);
        let server = LocalServer::launch(command, port, "/ready", PATIENCE).await.expect("it starts");
        Self { server, folder }
    }

    /// From the next call on.
    fn happens(&self, fault: &str) {
        let (new, control) = (self.folder.path().join("new"), self.folder.path().join("control"));
        fs::write(&new, format!("{fault}\n")).and_then(|()| fs::rename(new, control)).expect("a file");
    }

    async fn ask(&self) -> (u16, Value) {
        let message = json!({"role": "user", "content": "What is 347 + 286?"});
        let body = json!({"temperature": 0, "max_tokens": 40, "messages": [message]});
        let (status, reply) = self.server.client().post("/v1/chat/completions", &body).await.expect("an answer");
        (status.into(), reply)
    }

    async fn probe(&self, path: &str) -> (u16, Value) {
        let (status, body) = self.server.client().get(path).await.expect("an answer");
        (status.into(), serde_json::from_str(&body).expect("JSON"))
    }

    async fn ends(mut self) {
        self.server.terminate().expect("a signal");
        assert!(self.server.wait(PATIENCE).await.expect("it ends").success());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kernel_that_faults_costs_the_requests_of_its_step_and_the_model_is_loaded_again() {
    a_kernel_faults(&[], "aclnnEmbedding").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_fault_on_the_first_of_two_devices_both_are_loaded_again() {
    // Only the first looks for the largest logit, behind all sums: so the other does not wait for it.
    a_kernel_faults(&["--tensor-parallel-size", "2"], "aclnnArgMax").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_waits_for_another_s_sum_in_vain_ends_its_requests_in_time() {
    let faulty = Faulty::start(&["--tensor-parallel-size", "2", "--device-timeout", "2"]).await;
    assert_eq!(faulty.ask().await.0, 200);
    faulty.happens("fault=aclnnEmbedding:1:run");
    let (status, reply) = faulty.ask().await;
    let code = reply["error"]["code"].as_str().unwrap_or_default();
    assert!(status == 500 && code.starts_with("device_"), "{status} {reply}");
    faulty.ends().await;
}

async fn a_kernel_faults(flags: &[&str], operator: &str) {
    let faulty = Faulty::start(flags).await;
    let (status, before) = faulty.ask().await;
    assert_eq!(status, 200, "{before}");
    for rebuilds in 1..=2 {
        // The prompt's: steps that came often enough run as graphs, in which nothing is called.
        faulty.happens(&format!("fault={operator}:1:run"));
        let (status, reply) = faulty.ask().await;
        assert_eq!((status, &reply["error"]["code"]), (500, &"device_poisoned".into()), "{reply}");
        // It waits for the model.
        let (status, reply) = faulty.ask().await;
        assert_eq!((status, &reply["choices"]), (200, &before["choices"]), "{reply}");
        assert_eq!(faulty.server.metric("baton_rebuilds_total").await.expect("a metric"), f64::from(rebuilds));
        assert_eq!(faulty.probe("/ready").await.0, 200);
    }
    faulty.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_lost_or_hangs_ends_its_requests_and_the_server_says_so_and_stops_when_told() {
    for (fault, codes) in [("lost=507010", &["device_lost"][..]), ("hang=on", &["device_lost", "device_hung"])] {
        let faulty = Faulty::start(&["--device-timeout", "2"]).await;
        assert_eq!(faulty.ask().await.0, 200);
        faulty.happens(fault);
        // Far from the minute that an NPU is waited for where nothing is said.
        let answer = tokio::time::timeout(Duration::from_secs(30), faulty.ask());
        let (status, reply) = answer.await.expect("the flag counts");
        let code = reply["error"]["code"].as_str().unwrap_or_default().to_owned();
        assert!(status == 500 && codes.contains(&&*code), "{fault}: {status} {reply}");
        let (status, reply) = faulty.probe("/ready").await;
        assert_eq!((status, reply["error"]["code"].as_str()), (503, Some(&*code)), "{fault}: {reply}");
        assert_eq!(faulty.probe("/live").await.0, 503, "{fault}");
        assert_eq!(faulty.ask().await.1["error"]["code"], "engine_down", "{fault}");
        faulty.ends().await;
    }
}
