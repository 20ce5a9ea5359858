//! A step of decoding over longer and longer contexts: DeepSeek's three kinds of attention in published widths, four layers each,
//! with random weights. What the cache holds does not matter for speed, so nothing is computed before.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use baton_loadgen::plot;
use serde_json::Value;

use super::{Setting, record::Record};
use crate::random_model;

const MODELS: [(&str, &str); 3] =
    [("V3", "deepseek-v3-long"), ("V3.2", "deepseek-v32-long"), ("V4", "deepseek-v4-long")];
const CONTEXTS: [usize; 6] = [2048, 4096, 8192, 16_384, 32_768, 65_536];
/// Steps of a run, and runs of which the median counts.
const STEPS: &str = "8";
const RUNS: &str = "3";

/// Runs the check.
pub fn check(setting: &Setting) -> Result<()> {
    let binary = setting.binary()?;
    let mut record = Record::new("contexts");
    let mut lines = Vec::new();
    for (name, shape) in MODELS {
        let folder = setting.folder.join(shape);
        if !folder.exists() {
            random_model::folder(shape, folder.clone())?;
        }
        let times = milliseconds(&binary, &folder)?;
        record.figure(&format!("{name}_milliseconds_a_step"), CONTEXTS.into_iter().zip(&times).collect::<Vec<_>>())?;
        lines.push((name, times));
    }
    let labels = CONTEXTS.map(|context| format!("{}k", context / 1024));
    fs::write(setting.folder.join("contexts.svg"), plot::svg("Milliseconds a step", "context", &labels, &lines))?;
    let (all, sparse) = lines.split_at(1);
    for (name, times) in sparse {
        let ratio = all[0].1[CONTEXTS.len() - 1] / times[CONTEXTS.len() - 1];
        record.must(format!("{name} takes {ratio:.1} times less than V3 at 64k (at least 5)"), ratio >= 5.0);
    }
    record.finish(setting)
}

/// Of a step of one stream, for each context.
fn milliseconds(binary: &Path, model: &Path) -> Result<Vec<f64>> {
    let contexts = CONTEXTS.map(|context| context.to_string()).join(",");
    let mut command = Command::new(binary);
    command.args(["bench", "local"]).arg(model);
    command.args(["-p", "0", "-n", STEPS, "-d", &contexts, "-r", RUNS, "--json"]);
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let figures: Value = serde_json::from_slice(&output.stdout)?;
    let rate = |i: usize| figures["results"][i]["median_ts"].as_f64().with_context(|| figures.to_string());
    (0..CONTEXTS.len()).map(|i| Ok(1e3 / rate(i)?)).collect()
}
