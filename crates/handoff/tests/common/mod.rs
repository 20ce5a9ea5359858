//! Bundles for tests, written as a training site writes them.

use std::fs;
use std::path::Path;

use baton_handoff::{Digest, MANIFEST};
use serde_json::{Value, json};

/// A manifest of these files, with one case.
pub fn manifest<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Value {
    let mut files: Vec<_> = files.into_iter().collect();
    files.sort();
    let lines: String = files.iter().map(|(name, content)| format!("{}  {name}\n", Digest::of(content))).collect();
    let entries: serde_json::Map<_, _> = files
        .iter()
        .map(|(name, content)| {
            ((*name).to_owned(), json!({"bytes": content.len(), "sha256": Digest::of(content).to_string()}))
        })
        .collect();
    json!({
        "format": "baton-handoff",
        "version": 1,
        "model": {"name": "tiny", "license": "Apache-2.0", "lineage": {"steps": 100, "parents": [null, "seed"]}},
        "generation": Digest::of(lines.as_bytes()).to_string(),
        "files": entries,
        "trained": {"dtype": "bfloat16", "quantization": null, "framework": "torch", "commit": "abc"},
        "computed": {"dtype": "float32", "framework": "torch", "device": "cpu"},
        "requires": ["sliding_window"],
        "tolerances": {
            "float32": tolerances(0.001, 1.0),
            "int4": tolerances(0.5, 0.9),
        },
        "cases": [
            {
                "name": "chat",
                "chat": {
                    "messages": [{"role": "user", "content": "hi"}],
                    "tools": [{"type": "function"}],
                    "template_kwargs": {"thinking": false},
                    "add_generation_prompt": true
                },
                "prompt": "user: hi",
                "prompt_ids": [0, 3, 395],
                "greedy_ids": [5, 209],
                "margins": [16.4, 0.0],
                "logprobs": [-3.1, -2.25, 0.0, -0.7],
                "top": {"2": [[5, -0.0], [231, -16.453232]], "3": [[209, -0.7], [7, -0.7]]}
            },
            {"name": "ids", "prompt_ids": [1, 2], "greedy_ids": [], "margins": [], "logprobs": [-1.5], "top": {}}
        ]
    })
}

/// Tolerances of a class, of which two say how coarse it is.
pub fn tolerances(max: f64, agreement: f64) -> Value {
    json!({
        "max_abs_logprob_diff": max,
        "mean_abs_logprob_diff": max / 10.0,
        "p99_abs_logprob_diff": max / 2.0,
        "kl": max / 100.0,
        "top1_agreement": agreement,
        "perplexity_ratio": 1.0 + max
    })
}

/// Writes files and their manifest into a folder.
#[allow(dead_code, reason = "not every test that has this module writes bundles")]
pub fn write(folder: &Path, files: &[(&str, &[u8])]) -> Value {
    for (name, content) in files {
        fs::create_dir_all(folder.join(name).parent().unwrap()).unwrap();
        fs::write(folder.join(name), content).unwrap();
    }
    let manifest = manifest(files.iter().copied());
    fs::write(folder.join(MANIFEST), manifest.to_string()).unwrap();
    manifest
}
