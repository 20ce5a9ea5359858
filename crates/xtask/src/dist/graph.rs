//! What a binary is made of: the crates that are linked into it, by `cargo metadata` and the lock file.
//!
//! Features are those of the whole workspace, so a crate may be among these that only tests ask for; none that is linked is
//! missing. What only build scripts use is not linked.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::PathBuf,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::root;

/// A crate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crate {
    pub name: String,
    pub version: String,
    /// An SPDX expression.
    pub license: String,
    pub repository: Option<String>,
    /// Its source on this machine.
    pub folder: PathBuf,
    /// SHA-256 of what the registry gave; `None` of a crate of the workspace.
    pub checksum: Option<String>,
    /// The crates that it uses, as [`Crate::id`] names them.
    pub uses: BTreeSet<String>,
}

impl Crate {
    /// Its package URL.
    pub fn id(&self) -> String {
        id(&self.name, &self.version)
    }
}

fn id(name: &str, version: &str) -> String {
    format!("pkg:cargo/{name}@{version}")
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    repository: Option<String>,
    source: Option<String>,
    manifest_path: PathBuf,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Lock {
    package: Vec<Locked>,
}

#[derive(Deserialize)]
struct Locked {
    name: String,
    version: String,
    checksum: Option<String>,
}

/// The package of this name in the workspace and all that is linked into it for a target, by name and version; the
/// package comes first.
pub fn linked(package: &str, target: &str) -> Result<Vec<Crate>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--offline", "--filter-platform", target])
        .current_dir(root())
        .output()
        .context("cargo did not start")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let Metadata { packages, resolve } = serde_json::from_slice(&output.stdout)?;
    let lock: Lock = toml::from_str(&fs::read_to_string(root().join("Cargo.lock"))?)?;
    let checksums: HashMap<_, _> =
        lock.package.into_iter().map(|locked| ((locked.name, locked.version), locked.checksum)).collect();
    let packages: HashMap<&str, &Package> = packages.iter().map(|package| (package.id.as_str(), package)).collect();
    let nodes: HashMap<&str, &Node> = resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let root = packages.values().find(|one| one.source.is_none() && one.name == package);
    let root = root.with_context(|| format!("the workspace has no package {package}"))?;

    let (mut crates, mut waiting) = (BTreeMap::new(), vec![root.id.as_str()]);
    while let Some(next) = waiting.pop() {
        let (package, node) = (packages[next], nodes[next]);
        let key = (next != root.id, package.name.clone(), package.version.clone());
        if crates.contains_key(&key) {
            continue;
        }
        let linked = node.deps.iter().filter(|dependency| dependency.dep_kinds.iter().any(|kind| kind.kind.is_none()));
        let used: Vec<&str> = linked.map(|dependency| dependency.pkg.as_str()).collect();
        let license = package.license.as_deref().with_context(|| format!("{} names no licence", package.name))?;
        crates.insert(
            key,
            Crate {
                name: package.name.clone(),
                version: package.version.clone(),
                // As it was written before SPDX expressions.
                license: license.replace('/', " OR "),
                repository: package.repository.clone(),
                folder: package.manifest_path.parent().context("a manifest in a folder")?.to_owned(),
                checksum: checksums.get(&(package.name.clone(), package.version.clone())).cloned().flatten(),
                uses: used.iter().map(|used| id(&packages[used].name, &packages[used].version)).collect(),
            },
        );
        waiting.extend(used);
    }
    Ok(crates.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::TARGETS;

    #[test]
    fn all_that_is_linked_is_there_with_its_checksum_and_nothing_of_tests_and_build_scripts() {
        for target in TARGETS {
            let crates = linked("baton", target).unwrap();
            assert_eq!(crates[0].name, "baton");
            let ids: BTreeSet<String> = crates.iter().map(Crate::id).collect();
            assert_eq!(ids.len(), crates.len());
            for one in &crates {
                assert!(one.uses.is_subset(&ids), "{one:?}");
                assert_eq!(one.checksum.is_none(), one.folder.starts_with(root().canonicalize().unwrap()), "{one:?}");
            }
            let has = |name: &str| crates.iter().any(|one| one.name == name);
            assert!(["baton-http", "baton-device-cuda", "tokio", "ring", "cudarc"].into_iter().all(has));
            assert!(!["baton-cuda-sim", "baton-oracle", "proptest", "cc", "xtask"].into_iter().any(has));
        }
        assert!(linked("nobody", TARGETS[0]).is_err());
    }
}
