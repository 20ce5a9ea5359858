//! The exporter against the bundles that are committed: in the versions that they were made with, it writes each
//! `handoff.json` again, byte for byte; on a machine whose sums round in another way, all but the numbers, and these within [`ROUNDING`].

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Setting, say, timed};
use crate::python::{environment, finished};

/// Bundles under `models`, each with the options that its `handoff.json` was made with.
const BUNDLES: [(&str, &[&str]); 2] = [
    ("golden/handoff/tiny", &["--license", "Apache-2.0", "--max-new-tokens", "16", "--threads", "1"]),
    ("abacus", &["--license", "Apache-2.0", "--framework", "torch", "--threads", "1"]),
];

/// By how much a log-probability may differ, in nats.
const ROUNDING: f64 = 1e-4;

/// Runs the check, with an environment of Python in `folder`.
pub fn check(setting: &Setting) -> Result<()> {
    let folder = setting.folder;
    let exporter = crate::root().join("models/export");
    let python = timed("python packages", || environment(&folder.join("venv"), &exporter.join("requirements.txt")))?;
    for (name, options) in BUNDLES {
        timed(name, || {
            let bundle = crate::root().join("models").join(name);
            let out = folder.join(bundle.file_name().context("a folder")?);
            if out.exists() {
                fs::remove_dir_all(&out)?;
            }
            let mut command = Command::new(&python);
            command
                .arg(exporter.join("baton_export.py"))
                .arg(&bundle)
                .arg("--prompts")
                .arg(bundle.join("prompts.jsonl"));
            finished(command.arg("--out").arg(&out).args(options))?;
            let [committed, written] = [&bundle, &out].map(|folder| fs::read(folder.join("handoff.json")));
            let (committed, written) = (committed?, written?);
            if committed != written {
                let [a, b] = [&committed, &written].map(|text| serde_json::from_slice(text));
                say(&format!("{name}: not byte for byte; comparing values"));
                equal_but_for_rounding("handoff.json", &a?, &b?)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn equal_but_for_rounding(place: &str, a: &Value, b: &Value) -> Result<()> {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            ensure!(a.keys().eq(b.keys()), "{place}: other keys");
            a.iter().try_for_each(|(key, a)| equal_but_for_rounding(&format!("{place}.{key}"), a, &b[key]))
        }
        (Value::Array(a), Value::Array(b)) => {
            ensure!(a.len() == b.len(), "{place}: {} and {} values", a.len(), b.len());
            if let (Some(a), Some(b)) = (candidates(a), candidates(b)) {
                return same_candidates(place, &a, &b);
            }
            let mut pairs = a.iter().zip(b).enumerate();
            pairs.try_for_each(|(i, (a, b))| equal_but_for_rounding(&format!("{place}[{i}]"), a, b))
        }
        (Value::Number(a), Value::Number(b)) if a.is_f64() && b.is_f64() => {
            let (a, b) = (a.as_f64().context("a number")?, b.as_f64().context("a number")?);
            ensure!((a - b).abs() <= ROUNDING, "{place}: {a} and {b}");
            Ok(())
        }
        _ => {
            ensure!(a == b, "{place}: {a} and {b}");
            Ok(())
        }
    }
}

/// The likeliest tokens of a position with their log-probabilities, if that is what the list holds.
fn candidates(list: &[Value]) -> Option<Vec<(u64, f64)>> {
    let pair = |pair: &Value| match pair.as_array()?.as_slice() {
        [id, logprob] if logprob.is_f64() => Some((id.as_u64()?, logprob.as_f64()?)),
        _ => None,
    };
    list.iter().map(pair).collect()
}

/// The log-probabilities agree rank by rank; two tokens may have changed places where these are close, and the last
/// may be one that was left out before.
fn same_candidates(place: &str, a: &[(u64, f64)], b: &[(u64, f64)]) -> Result<()> {
    for (rank, (&(id, logprob), &(other, other_logprob))) in a.iter().zip(b).enumerate() {
        ensure!((logprob - other_logprob).abs() <= ROUNDING, "{place}, rank {rank}: {logprob} and {other_logprob}");
        let moved = a.iter().any(|&(moved, value)| moved == other && (value - logprob).abs() <= ROUNDING);
        ensure!(id == other || moved || rank + 1 == a.len(), "{place}, rank {rank}: token {id} and {other}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_rounding_may_differ() {
        let case = |name: &str, logprob: f64, top: Value| json!({"name": name, "ids": [1, 2], "logprobs": [logprob], "top": {"1": top}});
        let a = case("a", -0.5, json!([[3, -0.1], [5, -2.0], [7, -2.00001]]));
        let same = |b: Value| equal_but_for_rounding("it", &a, &b).is_ok();
        assert!(same(a.clone()));
        assert!(same(case("a", -0.50005, json!([[3, -0.10002], [7, -2.0], [5, -2.00002]]))));
        assert!(same(case("a", -0.5, json!([[3, -0.1], [5, -2.0], [9, -2.00001]]))));
        assert!(!same(case("b", -0.5, a["top"]["1"].clone())));
        assert!(!same(case("a", -0.501, a["top"]["1"].clone())));
        assert!(!same(case("a", -0.5, json!([[3, -0.1], [5, -2.0]]))));
        assert!(!same(case("a", -0.5, json!([[5, -0.1], [3, -2.0], [7, -2.00001]]))));
        assert!(!same(case("a", -0.5, json!([[3, -0.1], [9, -2.0], [7, -2.00001]]))));
        assert!(!same(case("a", -0.5, json!([[3, -0.1], [5, -2.001], [7, -2.00101]]))));
    }
}
