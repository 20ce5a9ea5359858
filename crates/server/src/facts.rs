//! Facts about this build, its machine and its devices, as `baton doctor` and the report of `baton selftest` show them.

use std::{collections::BTreeMap, fs};

use baton_device::{Caps, DeviceFacts, LibraryFacts};
use serde_json::{Value, json};

/// The build: version and what it is compiled for.
pub fn build() -> BTreeMap<&'static str, String> {
    let libc = match () {
        () if cfg!(target_env = "gnu") => "gnu",
        () if cfg!(target_env = "musl") => "musl",
        () => "other",
    };
    let target = format!("{}-{}-{libc}", std::env::consts::ARCH, std::env::consts::OS);
    BTreeMap::from([("version", env!("CARGO_PKG_VERSION").to_owned()), ("target", target)])
}

/// Names and versions of the operating system, as far as it tells them.
pub fn system() -> BTreeMap<&'static str, String> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).map(|name| name.trim_matches('"'));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").ok();
    let facts = [("name", name.map(str::to_owned)), ("kernel", kernel.map(|kernel| kernel.trim().to_owned()))];
    facts.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
}

/// A device as JSON.
pub fn device(facts: &DeviceFacts) -> Value {
    let library = |library: &LibraryFacts| {
        let tried = library.tried.iter().map(|(file, problem)| json!({"file": file, "problem": problem}));
        json!({"role": library.role, "opened": library.opened, "tried": tried.collect::<Vec<_>>()})
    };
    json!({
        "device": facts.device,
        "chip": facts.chip,
        "count": facts.count,
        "memory": facts.memory.map(|memory| json!({"total_bytes": memory.total, "free_bytes": memory.free})),
        "versions": facts.versions,
        "libraries": facts.libraries.iter().map(library).collect::<Vec<_>>(),
        "symbols": facts.symbols,
        "details": facts.details,
        "missing": facts.missing,
    })
}

/// What a device offers as JSON.
pub fn caps(caps: &Caps) -> Value {
    fn words<T: ToString>(set: impl IntoIterator<Item = T>) -> Vec<String> {
        set.into_iter().map(|word| word.to_string()).collect()
    }
    json!({
        "isa": caps.isa,
        "threads": caps.threads,
        "kv_block_size": caps.kv_block_size,
        "kv_dtypes": words(&caps.kv_dtypes),
        "weight_formats": words(&caps.weight_formats),
        "activations": caps.activations.to_string(),
        "narrow_activations": words(&caps.narrow_activations),
        "ops": words(caps.ops.iter().map(|op| format!("{op:?}"))),
        "row_invariant": caps.row_invariant,
    })
}
