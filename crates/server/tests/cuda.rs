//! The real binary on a simulated NVIDIA GPU (`crates/cuda-sim`), through the calls that real ones get.

mod common;

use std::{
    fs,
    process::{Command, Output},
    sync::LazyLock,
    time::Duration,
};

use baton_loadgen::{LocalServer, evaluation::ask, free_port};
use serde_json::Value;
use tempfile::TempDir;

use common::abacus::rows;

const PATIENCE: Duration = Duration::from_secs(300);

/// The simulator under the names of CUDA's libraries.
static SIMULATOR: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = TempDir::new().expect("a folder");
    cuda_sim::library_folder(folder.path()).expect("libraries of the simulator");
    folder
});

/// `baton` on a machine with one GPU of 256 MiB.
fn baton() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.env("BATON_CUDA_LIBS", SIMULATOR.path());
    command.env("CUDA_SIM_MEMORY", (256 << 20).to_string());
    command
}

fn succeeds(command: &mut Command) -> Output {
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
fn doctor_finds_a_gpu_and_selftest_judges_it_in_each_type_of_activations() {
    if !cuda_sim::can_compile() {
        return;
    }
    let found = succeeds(baton().args(["doctor", "--device", "cuda:0", "--json"])).stdout;
    let found: Value = serde_json::from_slice(&found).expect("JSON");
    let device = &found["devices"][0];
    assert_eq!((&device["device"], &device["details"]["compute capability"]), (&"cuda:0".into(), &"9.0".into()));
    let report = SIMULATOR.path().join("selftest.json");
    succeeds(baton().args(["selftest", "--device", "cuda:0", "--filter", "norm-", "--report"]).arg(&report));
    let report: Value = serde_json::from_slice(&fs::read(report).expect("a report")).expect("JSON");
    let cases = report["cases"].as_array().expect("cases");
    assert!(cases.iter().all(|case| case["verdict"] == "pass"), "{report}");
    for ending in ["@bf16", "@f16"] {
        assert!(cases.iter().any(|case| case["name"].as_str().expect("a name").ends_with(ending)), "{ending}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abacus_answers_as_its_reference_does_and_leaves_nothing() {
    if !cuda_sim::can_compile() {
        return;
    }
    let report = SIMULATOR.path().join("report.json");
    let port = free_port().expect("a port");
    let mut command = baton();
    command.args(["serve", "--port", &port.to_string(), "--device", "cuda:0", "--handoff", "off"]);
    command.args(["--log-level", "warn"]).env("CUDA_SIM_REPORT", &report);
    let mut server = LocalServer::launch(command, port, "/ready", PATIENCE).await.expect("it starts");
    let (mut questions, references) = (rows("eval.jsonl"), rows("eval_reference.jsonl"));
    questions
        .retain(|row| references.iter().any(|reference| reference["id"] == row["id"] && reference["right"] == true));
    questions.truncate(4);
    let answers = ask(server.target(), &questions).await.expect("answers");
    let right = answers.iter().filter(|(row, answer)| answer.is_right(row)).count();
    assert_eq!((answers.len(), right), (4, 4), "{answers:?}");
    server.terminate().expect("a signal");
    assert!(server.wait(PATIENCE).await.expect("it ends").success());
    let report: Value = serde_json::from_slice(&fs::read(report).expect("a report")).expect("JSON");
    assert_eq!(report["messages"], 0, "{report}");
    let live = report.as_object().expect("counts").iter().filter(|(name, _)| name.starts_with("live."));
    assert!(live.clone().count() > 0 && live.clone().all(|(_, count)| *count == 0), "{report}");
}

#[test]
fn a_model_is_measured_beside_a_copy_and_a_product_of_the_gpu() {
    if !cuda_sim::can_compile() {
        return;
    }
    let flags = ["bench", "local", "--device", "cuda:0", "-p", "8", "-n", "1", "--streams", "1,2", "-r", "1", "--json"];
    let result: Value = serde_json::from_slice(&succeeds(baton().args(flags)).stdout).expect("JSON");
    assert_eq!((&result["device"], &result["limits"]["access"]), (&"cuda:0".into(), &"copy".into()));
    assert_eq!(result["limits"]["peak"], "bf16");
    let results = result["results"].as_array().expect("results");
    assert_eq!(results.len(), 3);
    let shares = results.iter().flat_map(|result| [&result["share_of_bytes"], &result["share_of_peak"]]);
    assert!(shares.into_iter().all(|share| share.as_f64().is_some_and(|share| share > 0.0)), "{result}");
}

#[test]
fn a_share_of_memory_that_does_not_hold_the_model_is_refused_with_the_arithmetic() {
    if !cuda_sim::can_compile() {
        return;
    }
    let output = baton()
        .args(["serve", "--port", "0", "--device", "cuda:0", "--handoff", "off", "--gpu-memory-utilization", "0.01"])
        .output()
        .expect("it ends");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{words}");
    assert!(words.contains("a share of 0.01 of the device's 268435456 bytes is 2684354 bytes"), "{words}");
}
