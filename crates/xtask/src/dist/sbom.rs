//! The bill of materials of a binary, as CycloneDX 1.6 writes it in JSON.

use serde_json::{Value, json};

use crate::dist::graph::Crate;

/// What is linked into the first of these crates. `time`: seconds since 1970; `compiler`: version of Rust, whose standard
/// library is linked too.
pub fn document(crates: &[Crate], compiler: &str, time: chrono::DateTime<chrono::Utc>) -> Value {
    let std = format!("pkg:generic/rust-std@{compiler}");
    let mut components: Vec<Value> = crates[1..].iter().map(|one| component(one, "library")).collect();
    components.push(json!({
        "type": "library",
        "bom-ref": std,
        "name": "rust-std",
        "version": compiler,
        "licenses": [{"expression": "MIT OR Apache-2.0"}],
        "purl": std,
    }));
    let mut dependencies: Vec<Value> =
        crates.iter().map(|one| json!({"ref": one.id(), "dependsOn": one.uses})).collect();
    dependencies[0]["dependsOn"].as_array_mut().expect("a list").push(json!(std));
    dependencies.push(json!({"ref": std, "dependsOn": []}));
    json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
            "component": component(&crates[0], "application"),
        },
        "components": components,
        "dependencies": dependencies,
    })
}

fn component(one: &Crate, kind: &str) -> Value {
    let mut component = json!({
        "type": kind,
        "bom-ref": one.id(),
        "name": one.name,
        "version": one.version,
        "licenses": [{"expression": one.license}],
        "purl": one.id(),
    });
    if let Some(checksum) = &one.checksum {
        component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
    }
    if let Some(repository) = &one.repository {
        component["externalReferences"] = json!([{"type": "vcs", "url": repository}]);
    }
    component
}
