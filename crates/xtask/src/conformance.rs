//! The clients of the world against the server: each suite of `crates/server/tests/sdk` in an environment of its own, with a record of
//! versions, counts and times. `.ci/run` runs the first; it would take too long for all.
//!
//! Environments are made under `target/conformance` from pinned requirements, and made anew when these change.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use clap::builder::PossibleValuesParser;

use crate::python::{environment, finished};

/// A suite: its folder below `crates/server/tests/sdk`, and how its packages are installed.
struct Suite {
    name: &'static str,
    folder: &'static str,
    packages: Packages,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Packages {
    /// `requirements.txt`, by pip.
    Python,
    /// `package-lock.json`, by npm; the tests are begun by those of Python.
    Node,
}

const SUITES: &[Suite] = &[
    Suite { name: "official", folder: "", packages: Packages::Python },
    Suite { name: "frameworks", folder: "frameworks", packages: Packages::Python },
    Suite { name: "lm-eval", folder: "lm_eval", packages: Packages::Python },
    Suite { name: "node", folder: "node", packages: Packages::Node },
];

const SDK: &str = "crates/server/tests/sdk";

/// Arguments of the chore.
#[derive(clap::Args)]
pub struct Args {
    /// Only these suites; all if none is named
    #[arg(value_name = "SUITE", value_parser = PossibleValuesParser::new(SUITES.iter().map(|suite| suite.name)))]
    suites: Vec<String>,
    /// The binary to start
    #[arg(long, default_value = "target/release/baton")]
    binary: PathBuf,
    /// Where the record is written
    #[arg(long, value_name = "FILE", default_value = "benches/results/conformance.md")]
    record: PathBuf,
}

/// What a run of a suite came to.
struct Outcome {
    versions: Vec<String>,
    install_seconds: f64,
    run_seconds: f64,
    /// pytest's last line.
    summary: String,
    /// The tests that failed.
    failed: Vec<String>,
}

/// Runs the chore.
pub fn main(args: &Args) -> Result<()> {
    let binary = args.binary.canonicalize().with_context(|| format!("{}: build it first", args.binary.display()))?;
    let mut rows = Vec::new();
    for suite in SUITES.iter().filter(|suite| args.suites.is_empty() || args.suites.iter().any(|s| s == suite.name)) {
        let outcome = run(suite, &binary).with_context(|| suite.name.to_owned())?;
        say(&format!("{}: {}", suite.name, outcome.summary));
        rows.push((suite, outcome));
    }
    let record = crate::root().join(&args.record);
    fs::write(&record, text(&rows)).with_context(|| record.display().to_string())?;
    let failed: usize = rows.iter().map(|(_, outcome)| outcome.failed.len()).sum();
    ensure!(failed == 0, "{failed} tests failed; see {}", args.record.display());
    Ok(())
}

fn run(suite: &Suite, binary: &Path) -> Result<Outcome> {
    let (folder, environments) = (crate::root().join(SDK).join(suite.folder), crate::root().join("target/conformance"));
    let start = Instant::now();
    // The tests for Node are begun by pytest, which the first suite has.
    let python = match suite.packages {
        Packages::Python => environment(&environments.join(suite.name), &folder.join("requirements.txt"))?,
        Packages::Node => {
            finished(Command::new("npm").args(["ci", "--no-audit", "--no-fund"]).current_dir(&folder))?;
            environment(&environments.join(SUITES[0].name), &crate::root().join(SDK).join("requirements.txt"))?
        }
    };
    let install_seconds = start.elapsed().as_secs_f64();

    let files = fs::read_dir(&folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let tests = files.filter(|file| file.extension().is_some_and(|e| e == "py") && named(file).starts_with("test_"));
    let mut pytest = Command::new(&python);
    pytest.args(["-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]).args(tests);
    pytest.current_dir(crate::root()).env("BATON", binary);
    let start = Instant::now();
    let output = pytest.output().context("pytest")?;
    let run_seconds = start.elapsed().as_secs_f64();
    let printed = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        say(&printed);
    }
    let summary = printed.lines().rev().find(|line| line.contains(" in ")).unwrap_or("nothing was run").to_owned();
    // A log that pytest shows has lines that begin with ERROR too.
    let names_test = |test: &str| test.starts_with(SDK);
    let is_failure =
        |line: &&str| ["FAILED ", "ERROR "].iter().any(|kind| line.strip_prefix(kind).is_some_and(names_test));
    let failed: Vec<_> = printed.lines().filter(is_failure).map(str::to_owned).collect();
    ensure!(output.status.success() || !failed.is_empty(), "pytest did not run: {summary}");
    Ok(Outcome { versions: versions(suite, &folder)?, install_seconds, run_seconds, summary, failed })
}

fn named(file: &Path) -> std::borrow::Cow<'_, str> {
    file.file_name().unwrap_or_default().to_string_lossy()
}

/// The packages that a suite names, with their pinned versions.
fn versions(suite: &Suite, folder: &Path) -> Result<Vec<String>> {
    match suite.packages {
        Packages::Python => {
            let text = fs::read_to_string(folder.join("requirements.txt"))?;
            Ok(text.lines().filter(|line| line.contains("==")).map(|line| line.replace("==", " ")).collect())
        }
        Packages::Node => {
            let read = |name: &str| -> Result<serde_json::Value> {
                Ok(serde_json::from_slice(&fs::read(folder.join(name))?)?)
            };
            let (package, lock) = (read("package.json")?, read("package-lock.json")?);
            let Some(names) = package["dependencies"].as_object() else { bail!("package.json has no dependencies") };
            let version = |name: &String| {
                let version = &lock["packages"][format!("node_modules/{name}")]["version"];
                format!("{name} {}", version.as_str().unwrap_or("?"))
            };
            Ok(names.keys().map(version).collect())
        }
    }
}

/// The record.
fn text(rows: &[(&Suite, Outcome)]) -> String {
    let mut text = String::from(
        "# Conformance: other people's clients against Baton\n\n\
         Written by `cargo xtask conformance`; the suites are in `crates/server/tests/sdk`. Each starts the server with the bundled model.\n\n\
         | Suite | Packages | Tests | Installed in | Run in |\n|---|---|---|---|---|\n",
    );
    for (suite, outcome) in rows {
        let versions = outcome.versions.join(", ");
        let Outcome { summary, install_seconds, run_seconds, .. } = outcome;
        let counts = summary.split(" in ").next().unwrap_or_default().trim_matches(['=', ' ']);
        text += &format!("| {} | {versions} | {counts} | {install_seconds:.0} s | {run_seconds:.0} s |\n", suite.name);
    }
    let failed: Vec<_> = rows.iter().flat_map(|(_, outcome)| &outcome.failed).collect();
    if !failed.is_empty() {
        text += "\nFailed:\n\n";
        failed.iter().for_each(|line| text += &format!("- `{line}`\n"));
    }
    text
}

#[allow(clippy::print_stdout)] // the chore's result
fn say(line: &str) {
    println!("{line}");
}
