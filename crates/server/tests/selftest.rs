//! `baton selftest` and `baton doctor` through the real binary.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use baton_device::{WeightFormat, conformance};
use serde_json::Value;
use tempfile::TempDir;

const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/golden/vectors/conformance.vectors");
/// Cases of each operation that take no time.
const FEW: [&str; 7] = [
    "--filter",
    "linear-f32-1x7x5",
    "norm-3x37",
    "elementwise-3x7",
    "rope-3x10",
    "attention-f32-1over1x5-window7",
    "moe-f32",
];

/// What a command ended with.
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

/// Runs the binary alone: in an empty folder, so that it has nothing but what is inside it, with names that must not be told.
fn baton(folder: &Path, args: &[&str]) -> Ended {
    baton_with(folder, &[], args)
}

/// The same with further variables.
fn baton_with(folder: &Path, variables: &[(&str, &str)], args: &[&str]) -> Ended {
    let run = Command::new(env!("CARGO_BIN_EXE_baton"))
        .args(args)
        .envs(variables.iter().copied())
        .current_dir(folder)
        .env("HOME", "/home/eve-lives-here")
        .env("USER", "mallory-the-user")
        .env("HOSTNAME", "host-of-secrets.example")
        .env("BATON_API_KEY", "sk-of-secrets")
        .output()
        .expect("baton runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Ended { code: run.status.code().expect("it ends by itself"), stdout: text(run.stdout), stderr: text(run.stderr) }
}

fn json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).expect("a report")).expect("JSON")
}

/// Runs a self-test with a report.
fn selftest(args: &[&str]) -> (Ended, Value) {
    selftest_with(&[], args)
}

fn selftest_with(variables: &[(&str, &str)], args: &[&str]) -> (Ended, Value) {
    let folder = TempDir::new().expect("a folder");
    let file = folder.path().join("report.json");
    let report = ["selftest", "--report", file.to_str().expect("UTF-8")];
    let ended = baton_with(folder.path(), variables, &[&report, args].concat());
    let report = json(&file);
    (ended, report)
}

fn cases(report: &Value) -> &Vec<Value> {
    report["cases"].as_array().expect("cases")
}

#[test]
fn every_case_and_the_bundled_model_pass_on_the_cpu_by_the_binary_alone() {
    let (ended, report) = selftest(&["--device", "cpu"]);
    assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
    assert_eq!((&report["verdict"], &report["running"]), (&"pass".into(), &Value::Null));
    // What it keeps no codes for, it says.
    let (skipped, run): (Vec<&Value>, Vec<&Value>) =
        cases(&report).iter().partition(|case| case["verdict"] == "skipped");
    let of_codes = |case: &&Value| {
        ["cannot keep int", "cannot keep fp"].iter().any(|begin| case["reasons"].to_string().contains(begin))
    };
    let codes = |case: &conformance::Case| {
        case.needs().weight_formats.iter().any(|format| matches!(format, WeightFormat::Coded(_)))
    };
    let expected = conformance::cases().iter().filter(|case| codes(case)).count();
    assert!(skipped.iter().all(of_codes) && skipped.len() == expected, "{skipped:#?}");
    assert!(run.iter().all(|case| case["verdict"] == "pass"), "{report:#}");
    assert!(run.len() > 300);
    for name in ["version", "target"] {
        assert!(report["baton"][name].is_string(), "{:#}", report["baton"]);
    }
    assert!(report["caps"][0]["isa"].is_string() && report["device"]["details"]["cores"].is_string(), "{report:#}");
    let judged =
        |case: &&Value| case["max_error"].is_f64() && case["vector_error"].is_f64() && case["tolerance"].is_f64();
    assert!(run.iter().filter(|case| case["name"] != "model-abacus").all(judged));
    let model = cases(&report).iter().find(|case| case["name"] == "model-abacus").expect("the model");
    let greedy = &model["figures"]["columns"][0]["greedy"];
    assert!(greedy["agreed"].as_u64() > Some(0) && greedy["agreed"] == greedy["of"], "{model:#}");
    assert!(ended.stdout.contains("attention") && ended.stdout.trim_end().ends_with("pass"), "{}", ended.stdout);
}

#[test]
fn the_judge_agrees_with_the_vectors_of_another_machine() {
    let (ended, report) = selftest(&[&["--device", "reference"], &FEW[..]].concat());
    assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
    assert!(cases(&report).len() >= FEW.len() - 1);
    assert!(cases(&report).iter().all(|case| case["max_error"] == 0.0), "it is the judge: {report:#}");
}

#[test]
fn a_vector_that_was_tampered_with_fails_its_case_alone() {
    let folder = TempDir::new().expect("a folder");
    let mut vectors = fs::read(VECTORS).expect("vectors");
    let list = String::from_utf8_lossy(&vectors);
    let name = list.lines().nth(1).and_then(|line| line.split(' ').next()).expect("the first case").to_owned();
    let (alike, _) = name.rsplit_once('-').expect("an operation before its sizes");
    // The first number behind the list, which is the first case's.
    let end = vectors.windows(2).position(|pair| pair == b"\n\n").expect("the end of the list") + 2;
    let first: [u8; 4] = vectors[end..end + 4].try_into().expect("a number");
    vectors[end..end + 4].copy_from_slice(&(f32::from_le_bytes(first) + 0.01).to_le_bytes());
    let file = folder.path().join("tampered");
    fs::write(&file, vectors).expect("a file");
    let (ended, report) = selftest(&["--vectors", file.to_str().expect("UTF-8"), "--filter", alike]);
    assert_eq!(ended.code, 1, "{}{}", ended.stdout, ended.stderr);
    assert_eq!(report["verdict"], "fail");
    let (failed, passed): (Vec<&Value>, Vec<&Value>) =
        cases(&report).iter().partition(|case| case["verdict"] == "fail");
    assert_eq!((failed.len(), &failed[0]["name"]), (1, &name.as_str().into()));
    assert!(passed.len() > 1 && passed.iter().all(|case| case["verdict"] == "pass"));
    assert!(failed[0]["reasons"].to_string().contains("golden vector"), "{:#}", failed[0]);
    assert!(ended.stdout.contains(&format!("{name} failed:")), "{}", ended.stdout);
}

#[test]
fn a_report_says_nothing_of_whose_machine_it_is() {
    let (_, report) = selftest(&FEW);
    let text = report.to_string();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let secrets =
        ["eve-lives-here", "mallory-the-user", "host-of-secrets", "sk-of-secrets", "/tmp/", "/home/", host.trim()];
    for secret in secrets.into_iter().filter(|secret| !secret.is_empty()) {
        let found = text.match_indices(secret).find(|(at, _)| {
            let part = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
            !part(text[..*at].chars().next_back()) && !part(text[at + secret.len()..].chars().next())
        });
        assert!(found.is_none(), "{secret} is in the report: {report:#}");
    }
}

#[test]
fn what_cannot_be_run_ends_with_2_and_says_what_would_be_taken() {
    let folder = TempDir::new().expect("a folder");
    let refused = |args: &[&str], words: &[&str]| {
        let ended = baton(folder.path(), &[&["selftest"], args].concat());
        assert_eq!(ended.code, 2, "{args:?}: {}{}", ended.stdout, ended.stderr);
        words.iter().for_each(|word| assert!(ended.stderr.contains(word), "{args:?}: no {word:?} in {}", ended.stderr));
    };
    refused(&["--device", "toaster"], &["toaster", "cpu", "reference"]);
    refused(&["--filter", "no-such-case"], &["no-such-case", "--list"]);
    refused(&["--report", "no/such/folder/report.json", "--filter", "norm-1x1"], &["--report", "no/such/folder"]);
    fs::write(folder.path().join("nonsense"), "nonsense").expect("a file");
    refused(&["--vectors", "nonsense"], &["--vectors nonsense", "baton-vectors"]);
}

#[test]
fn the_list_names_what_a_filter_chooses() {
    let folder = TempDir::new().expect("a folder");
    let ended = baton(folder.path(), &["selftest", "--list", "--filter", "rope", "model"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let names: Vec<&str> = ended.stdout.lines().collect();
    assert!(names.len() > 3 && names.contains(&"model-abacus"), "{names:?}");
    assert!(names.iter().all(|name| name.contains("rope") || name.contains("model")), "{names:?}");
}

#[test]
fn a_simulated_npu_is_judged_in_each_type_and_its_report_has_what_a_volunteer_sends() {
    let folder = common::simulator();
    let libraries = [("BATON_ASCEND_LIBS", folder.path().to_str().expect("UTF-8")), ("ASCEND_SIM_SOC", "Ascend910B3")];
    let few = [&["--device", "ascend:0"], &FEW[..], &["linear-bf16-3x33x17", "linear-Q2_K-1x256x1"]].concat();
    let (ended, report) = selftest_with(&libraries, &few);
    assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
    let name = |case: &Value| case["name"].as_str().expect("a name").to_owned();
    for dtype in ["@bf16", "@f16", ""] {
        let case = format!("norm-3x37-by37{dtype}");
        assert!(
            cases(&report).iter().any(|found| name(found) == case && found["verdict"] == "pass"),
            "{case}: {report:#}"
        );
    }
    let skipped: Vec<&Value> = cases(&report).iter().filter(|case| case["verdict"] == "skipped").collect();
    assert!(skipped.iter().any(|case| case["reasons"].to_string().contains("Q2_K")), "{skipped:#?}");
    let device = &report["device"];
    assert_eq!(
        (&device["chip"], &device["count"], &device["missing"]),
        (&"Ascend910B3".into(), &1.into(), &serde_json::json!([]))
    );
    assert!(device["symbols"].as_object().is_some_and(|symbols| symbols.len() > 20), "{device:#}");
    assert!(device["memory"]["total_bytes"].as_u64() > Some(0), "{device:#}");
    let text = report.to_string();
    assert!(text.contains("…/libascendcl.so") && !text.contains(folder.path().to_str().expect("UTF-8")), "{device:#}");
}

#[test]
fn an_operator_that_fails_fails_its_cases_with_the_devices_own_words() {
    let folder = common::simulator();
    let libraries = [
        ("BATON_ASCEND_LIBS", folder.path().to_str().expect("UTF-8")),
        ("ASCEND_SIM_SOC", "Ascend910B3"),
        ("ASCEND_SIM_REFUSE", "aclnnCast:561002"),
    ];
    let (ended, report) =
        selftest_with(&libraries, &["--device", "ascend:0", "--filter", "elementwise-3x7", "norm-3x37"]);
    assert_eq!((ended.code, &report["verdict"]), (1, &"fail".into()), "{}{}", ended.stdout, ended.stderr);
    let reasons = cases(&report).iter().map(|case| case["reasons"].to_string()).collect::<String>();
    assert!(reasons.contains("561002") && reasons.contains("aclnn"), "{reasons}");
}

#[test]
fn without_cann_the_report_is_there_all_the_same_and_says_what_is_missing() {
    let nothing = TempDir::new().expect("a folder");
    let libraries = [("BATON_ASCEND_LIBS", nothing.path().to_str().expect("UTF-8"))];
    let (ended, report) = selftest_with(&libraries, &["--device", "ascend:0"]);
    assert_eq!((ended.code, &report["verdict"]), (2, &"not_run".into()), "{}{}", ended.stdout, ended.stderr);
    assert!(report["unavailable"].as_str().is_some_and(|reason| reason.contains("libascendcl.so")), "{report:#}");
    assert!(cases(&report).iter().all(|case| case["verdict"] == "not_run"));
    assert!(!report.to_string().contains(nothing.path().to_str().expect("UTF-8")));
}

fn doctor(folder: &TempDir, args: &[&str]) -> (Ended, Value) {
    let ended = baton(folder.path(), &[&["doctor", "--json"], args].concat());
    let findings = serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{}{}", ended.stdout, ended.stderr));
    (ended, findings)
}

#[test]
fn a_machine_that_can_serve_is_told_what_it_has() {
    let folder = TempDir::new().expect("a folder");
    let (ended, findings) = doctor(&folder, &["--device", "cpu", "--state-dir", "state"]);
    assert_eq!((ended.code, &findings["problems"]), (0, &serde_json::json!([])), "{findings:#}");
    let cpu = &findings["devices"][0];
    assert!(cpu["device"] == "cpu" && cpu["missing"] == serde_json::json!([]), "{cpu:#}");
    for name in ["cores", "instruction sets", "measured"] {
        assert!(cpu["details"][name].is_string(), "{cpu:#}");
    }
    assert!(cpu["memory"]["free_bytes"].as_u64() > Some(0), "{cpu:#}");
    assert!(findings["model"].as_str().is_some_and(|model| model.contains("as they were handed over")), "{findings:#}");
    assert!(findings["state_dir"].as_str().is_some_and(|state| state.contains("can be written")), "{findings:#}");
    assert_eq!(fs::read_dir(folder.path().join("state")).expect("made").count(), 1, "only the lock is left");
}

#[test]
fn a_machine_without_cann_is_told_which_libraries_were_looked_for() {
    let (folder, nothing) = (TempDir::new().expect("a folder"), TempDir::new().expect("a folder"));
    let variables = [("BATON_ASCEND_LIBS", nothing.path().to_str().expect("UTF-8"))];
    let ended = baton_with(folder.path(), &variables, &["doctor", "--device", "ascend:0"]);
    assert_eq!(ended.code, 1, "{}{}", ended.stdout, ended.stderr);
    for words in ["device ascend:0", "cannot serve", "libascendcl.so", "libnnopbase.so", "libopapi.so", "set_env.sh"] {
        assert!(ended.stdout.contains(words), "no {words:?} in {}", ended.stdout);
    }
    // Nobody asked for one: that there is none is no problem.
    let ended = baton_with(folder.path(), &variables, &["doctor"]);
    assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
    assert!(ended.stdout.contains("cannot serve"), "{}", ended.stdout);
}

#[test]
fn a_simulated_npu_is_told_with_chip_and_memory() {
    let (folder, simulator) = (TempDir::new().expect("a folder"), common::simulator());
    let variables =
        [("BATON_ASCEND_LIBS", simulator.path().to_str().expect("UTF-8")), ("ASCEND_SIM_SOC", "Ascend310P3")];
    let ended = baton_with(folder.path(), &variables, &["doctor", "--json", "--device", "ascend:0"]);
    let findings: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!((ended.code, &findings["devices"][0]["chip"]), (0, &"Ascend310P3".into()), "{findings:#}");
    let beyond = baton_with(folder.path(), &variables, &["doctor", "--device", "ascend:7"]);
    assert_eq!(beyond.code, 1, "{}", beyond.stdout);
}

#[test]
fn what_is_wrong_is_a_problem_each_and_the_exit_code_says_so() {
    let folder = TempDir::new().expect("a folder");
    let model = folder.path().join("models/abacus");
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus"), &model);
    let mut config = fs::read_to_string(model.join("config.json")).expect("a file");
    config.push(' ');
    fs::write(model.join("config.json"), config).expect("a file");
    fs::write(folder.path().join("state"), "not a folder").expect("a file");
    let (ended, findings) = doctor(&folder, &["--device", "reference", "--state-dir", "state"]);
    assert_eq!(ended.code, 1, "{findings:#}");
    let problems = findings["problems"].as_array().expect("a list");
    assert_eq!(problems.len(), 2, "{problems:#?}");
    assert!(problems[0].to_string().contains("config.json"), "{problems:#?}");
    assert!(problems[1].to_string().contains("--state-dir state"), "{problems:#?}");
}

#[test]
fn a_report_for_those_who_help_has_settings_digests_and_a_self_test_and_no_secret() {
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("baton.toml"), "max-num-seqs = 7\nadmin-api-key = [\"sk-of-the-file\"]")
        .expect("a file");
    let variables = [
        ("BATON_SSL_CERTFILE", "/secret-folder/chain.pem"),
        ("BATON_SSL_KEYFILE", "/secret-folder/key.pem"),
        ("BATON_OTLP_TRACES_ENDPOINT", "http://collector:4318"),
        ("UNRELATED_TOKEN", "sk-unrelated"),
    ];
    let args = ["doctor", "--report", "-", "--config", "baton.toml"];
    let ended = baton_with(folder.path(), &variables, &args);
    assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
    let report: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let setting = |name: &str| (report["settings"][name]["value"].clone(), report["settings"][name]["from"].clone());
    assert_eq!(setting("max-num-seqs"), (7.into(), "file".into()));
    assert_eq!(setting("port"), (8000.into(), "default".into()));
    assert_eq!(setting("api-key"), (serde_json::json!(["[redacted]"]), "environment".into()));
    assert_eq!(setting("ssl-keyfile"), ("…/key.pem".into(), "environment".into()));
    let sha256 = |text: &Value| text.as_str().is_some_and(|text| text.len() == 64);
    let checkpoint = &report["checkpoint"];
    assert!(sha256(&checkpoint["config_sha256"]) && sha256(&checkpoint["handoff_generation"]), "{checkpoint:#}");
    let selftest = &report["selftests"][0];
    assert_eq!(
        (&selftest["device"], &selftest["verdict"], &selftest["failed"]),
        (&"cpu".into(), &"pass".into(), &0.into())
    );
    assert!(selftest["passed"].as_u64() > Some(300), "{selftest:#}");
    for part in ["baton", "system", "memory", "devices", "problems"] {
        assert!(!report[part].is_null(), "{part}");
    }
    let secrets =
        ["sk-of-secrets", "sk-of-the-file", "sk-unrelated", "secret-folder", "eve-lives", "mallory", "host-of-secrets"];
    secrets.iter().for_each(|secret| assert!(!ended.stdout.contains(secret), "{secret}: {report:#}"));
}

#[test]
fn a_report_says_what_is_wrong_with_the_settings_and_goes_to_its_file() {
    let folder = TempDir::new().expect("a folder");
    let variables = [("BATON_MAX_NUM_SEQS", "0")];
    let ended = baton_with(folder.path(), &variables, &["doctor", "--device", "cpu", "--report", "report.json"]);
    assert!(ended.code == 0 && ended.stdout.contains("device cpu"), "{}{}", ended.stdout, ended.stderr);
    let report = json(&folder.path().join("report.json"));
    assert!(report["settings"]["error"].as_str().is_some_and(|error| error.contains("--max-num-seqs")), "{report:#}");
    let refused = baton_with(folder.path(), &[], &["doctor", "--report", "no/such/report.json"]);
    assert!(refused.code == 2 && refused.stderr.contains("--report no/such/report.json"), "{}", refused.stderr);
}

fn copy(from: &Path, to: &PathBuf) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder").map(|entry| entry.expect("an entry").path()) {
        let to = to.join(entry.file_name().expect("a name"));
        if entry.is_dir() {
            copy(&entry, &to)
        } else {
            fs::write(&to, fs::read(&entry).expect("a file")).expect("a copy")
        }
    }
}
