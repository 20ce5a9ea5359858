//! `baton doctor --report`: what somebody who is to help needs to know, in one file.
//!
//! Invariant: it has no secret, no prompt and nothing of the environment but settings of ours; names and folders of this
//! machine are cleaned out of every text.

use std::{ffi::OsString, path::Path};

use anyhow::Result;
use baton_handoff::{Bundle, Digest};
use baton_model::Files;
use clap::{Args, Command};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{DoctorArgs, Findings};
use crate::{
    load,
    selftest::{self, privacy::Redactor},
    settings::{Origins, ServeArgs, Settings},
};

/// The form of the file.
const FORMAT: u32 = 1;
/// Bytes of a config or manifest that are read.
const MAX_FILE: u64 = 64 << 20;

/// The file, as JSON; a self-test that fails becomes one more problem.
pub(super) fn make(args: &DoctorArgs, findings: &mut Findings) -> Result<String> {
    let settings = settings(args);
    let mut selftests = Vec::new();
    for device in &findings.usable {
        let found = selftest(args, device);
        if found["verdict"] != "pass" {
            findings.problems.push(format!("device {device}: the self-test did not pass"));
        }
        selftests.push(found);
    }
    let checkpoint = match &settings {
        Ok((settings, _)) => checkpoint(settings.model.as_deref()),
        Err(_) => Value::Null,
    };
    let settings = settings.and_then(|(settings, origins)| settings.described(&origins));
    let mut report = json!({
        "format": FORMAT,
        "settings": settings.unwrap_or_else(|error| json!({"error": format!("{error:#}")})),
        "checkpoint": checkpoint,
        "selftests": selftests,
    });
    let Value::Object(found) = findings.value() else { unreachable!("findings are an object") };
    report.as_object_mut().expect("an object").extend(found);
    Redactor::here().clean(&mut report);
    Ok(serde_json::to_string_pretty(&report)? + "\n")
}

/// The settings that `baton serve` would have in this environment, and where each is from.
fn settings(args: &DoctorArgs) -> Result<(Settings, Origins)> {
    let config = args.config.iter().flat_map(|file| ["--config".into(), file.clone().into_os_string()]);
    let words = [OsString::from("serve")].into_iter().chain(config);
    let matches = ServeArgs::augment_args(Command::new("serve")).try_get_matches_from(words)?;
    let (given, mut origins) = ServeArgs::from_matches(&matches)?;
    Ok((given.with_file(&mut origins)?.resolve()?, origins))
}

/// Digests by which a checkpoint is known elsewhere. Nothing is fetched.
fn checkpoint(model: Option<&str>) -> Value {
    if model.is_some_and(|model| !Path::new(model).exists()) {
        return json!({"error": "it is not on this machine; the cache of what was fetched is not looked at"});
    }
    let look = || -> Result<Value> {
        let (name, files) = load::files(model)?;
        let digest = |name: &str| -> Result<Option<String>> {
            let bytes = files.read(name, MAX_FILE)?;
            Ok(bytes.map(|bytes| Digest(Sha256::digest(&bytes).into()).to_string()))
        };
        let generation = Bundle::open(&files)?.map(|bundle| bundle.manifest().generation.to_string());
        let config = if matches!(files, Files::Gguf(_)) { None } else { digest("config.json")? };
        Ok(json!({"name": name, "config_sha256": config, "handoff_generation": generation}))
    };
    look().unwrap_or_else(|error| json!({"error": format!("{error:#}")}))
}

fn selftest(args: &DoctorArgs, device: &str) -> Value {
    selftest::summary(device, args.state_dir.as_deref())
        .unwrap_or_else(|error| json!({"device": device, "verdict": "not_run", "error": format!("{error:#}")}))
}
