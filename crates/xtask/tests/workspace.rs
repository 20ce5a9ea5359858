//! Rules of the workspace that the compiler does not check: which crate may know which, what stays
//! out of where, and that the pages name only what exists.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Crate, the workspace crates it may use, and those its tests may use besides.
const EDGES: &[(&str, &[&str], &[&str])] = &[
    ("baton-ascend-sim", &[], &[]),
    ("baton-cuda-sim", &[], &[]),
    ("baton-device", &[], &[]),
    ("baton-device-ascend", &["baton-device"], &["baton-ascend-sim"]),
    ("baton-device-cpu", &["baton-device"], &[]),
    ("baton-device-cuda", &["baton-device"], &["baton-cuda-sim"]),
    (
        "baton-model",
        &["baton-device"],
        &["baton-ascend-sim", "baton-cuda-sim", "baton-device-ascend", "baton-device-cpu", "baton-device-cuda"],
    ),
    ("baton-oracle", &[], &["baton-device", "baton-model"]),
    ("baton-fairness", &[], &[]),
    ("baton-engine", &["baton-fairness", "baton-model"], &["baton-device-cpu"]),
    ("baton-text", &[], &[]),
    ("baton-handoff", &["baton-model", "baton-text"], &[]),
    ("baton-hub", &[], &[]),
    ("baton-encoder", &["baton-fairness"], &[]),
    ("baton-grammar", &["baton-model"], &[]),
    ("baton-http", &["baton-engine", "baton-grammar", "baton-text"], &["baton-loadgen"]),
    (
        "baton",
        &[
            "baton-device",
            "baton-device-ascend",
            "baton-device-cpu",
            "baton-device-cuda",
            "baton-encoder",
            "baton-engine",
            "baton-handoff",
            "baton-http",
            "baton-hub",
            "baton-loadgen",
            "baton-model",
            "baton-text",
        ],
        &["baton-ascend-sim", "baton-cuda-sim"],
    ),
    ("baton-compare", &["baton-loadgen"], &[]),
    ("baton-loadgen", &[], &[]),
    ("xtask", &["baton-cuda-sim", "baton-device", "baton-loadgen", "baton-model"], &[]),
];

/// Crates that must not know an HTTP server or an async runtime. Of these only `baton-hub` uses the network.
const PLAIN: &[&str] = &[
    "baton-ascend-sim",
    "baton-cuda-sim",
    "baton-device",
    "baton-device-ascend",
    "baton-device-cpu",
    "baton-device-cuda",
    "baton-encoder",
    "baton-fairness",
    "baton-handoff",
    "baton-hub",
    "baton-model",
    "baton-text",
];

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    metadata["packages"].as_array().expect("packages").clone()
}

fn dependencies(package: &Value, dev: bool) -> BTreeSet<String> {
    let all = package["dependencies"].as_array().expect("dependencies").iter();
    all.filter(|d| (d["kind"] == "dev") == dev).map(|d| d["name"].as_str().expect("name").to_owned()).collect()
}

#[test]
fn crates_know_only_the_crates_they_may() {
    let packages = packages();
    let names: BTreeSet<&str> = packages.iter().map(|p| p["name"].as_str().expect("name")).collect();
    assert_eq!(
        names,
        EDGES.iter().map(|e| e.0).collect(),
        "a crate without a line in EDGES, or a line without a crate"
    );
    for package in &packages {
        let name = package["name"].as_str().expect("name");
        let &(_, allowed, allowed_in_tests) = EDGES.iter().find(|e| e.0 == name).expect("checked above");
        for (dev, allowed) in [(false, allowed.to_vec()), (true, [allowed, allowed_in_tests].concat())] {
            let ours: Vec<String> =
                dependencies(package, dev).into_iter().filter(|d| names.contains(d.as_str())).collect();
            let extra: Vec<_> = ours.iter().filter(|d| !allowed.contains(&d.as_str())).collect();
            assert!(extra.is_empty(), "{name} (tests: {dev}) must not use {extra:?}");
        }
    }
}

#[test]
fn compute_text_and_fetching_know_no_server_and_no_runtime() {
    for package in packages().iter().filter(|p| PLAIN.contains(&p["name"].as_str().expect("name"))) {
        let found: Vec<_> = dependencies(package, false)
            .into_iter()
            .filter(|d| ["tokio", "axum", "hyper"].contains(&d.as_str()))
            .collect();
        assert!(found.is_empty(), "{} uses {found:?}", package["name"]);
    }
}

#[test]
fn banned_crates_are_not_in_the_lock_file() {
    let deny = read("deny.toml");
    let bans = deny.split("[bans]").nth(1).expect("deny.toml has [bans]");
    let banned: Vec<&str> = bans.lines().filter_map(|l| l.split("crate = \"").nth(1)?.split('"').next()).collect();
    assert!(banned.len() >= 5, "deny.toml bans {banned:?}");
    let lock = read("Cargo.lock");
    for name in banned {
        assert!(!lock.contains(&format!("\nname = \"{name}\"\n")), "{name} is banned and in Cargo.lock");
    }
}

#[test]
fn pages_name_only_paths_that_exist() {
    for page in ["README.md", "ARCHITECTURE.md"] {
        let text = read(page);
        let tops = ["crates/", "models/", "deploy/", "benches/", ".ci/", ".cargo/"];
        let paths: Vec<&str> = text
            .split('`')
            .skip(1)
            .step_by(2)
            .filter(|p| tops.iter().any(|t| p.starts_with(t)) && !p.contains(['<', '*', '{', ' ']))
            .collect();
        assert!(!paths.is_empty(), "{page} names no path");
        for path in paths {
            assert!(root().join(path).exists(), "{page} names {path}, which does not exist");
        }
    }
}

/// Every file of Rust, tests included.
fn sources() -> Vec<PathBuf> {
    files(&["crates", "benches"], |file| file.extension().is_some_and(|e| e == "rs"))
}

/// The files below some folders that are asked for.
fn files(below: &[&str], wanted: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = below.iter().map(|folder| root().join(folder)).collect();
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if wanted(&entry) {
                files.push(entry);
            }
        }
    }
    files
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let says = |file: &PathBuf| fs::read_to_string(file).expect("a text file").starts_with("//!");
    let silent: Vec<_> = sources().into_iter().filter(|file| !says(file)).collect();
    assert!(silent.is_empty(), "no opening //! in {silent:?}");
}

#[test]
fn the_page_of_faults_has_every_case_and_names_tests_and_checks_that_exist() {
    let page = read("deploy/docs/reliability.md");
    let sources: String = sources().into_iter().map(|file| fs::read_to_string(file).expect("a text file")).collect();
    let records: Vec<String> = files(&["benches/results"], |file| file.extension().is_some_and(|e| e == "md"))
        .into_iter()
        .map(|file| fs::read_to_string(file).expect("a text file"))
        .collect();
    let recorded = |name: &str| records.iter().any(|record| record.contains(name));
    let mut cases = BTreeSet::new();
    for row in page.lines().filter(|line| line.starts_with("| R") || line.starts_with("| | ")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let &[case, fault, _, tests, _] = &cells[..] else {
            assert!(row.contains("Fault"), "not five cells: {row}");
            continue;
        };
        if fault == "Fault" {
            continue;
        }
        cases.extend(case.strip_prefix('R').map(|number| number.parse::<u32>().expect("a number")));
        // Each name, and what is said of it before the next one.
        let pieces: Vec<&str> = tests.split('`').skip(1).collect();
        assert!(!pieces.is_empty() || tests == "not run", "{case} has no test");
        for named in pieces.chunks(2) {
            let &[name, said] = named else { panic!("{case}: a name without an end") };
            let found = match name.strip_prefix("long ") {
                Some(check) => {
                    let owed = ["not run", "has not completed"].iter().any(|words| said.contains(words));
                    assert!(owed || recorded(name), "{case}: no record under benches/results is of `{name}`");
                    sources.contains(&format!("(\"{check}\", {check}::check)"))
                }
                None => sources.contains(&format!("fn {name}(")),
            };
            assert!(found, "{case} names {name}, which does not exist");
        }
    }
    let missing: Vec<u32> = (1..=52).filter(|case| !cases.contains(case)).collect();
    assert!(missing.is_empty(), "no row for {missing:?}");
}
