//! Bundles with faults planted in them, and what `baton verify` says.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// Bytes in front of a safetensors header: its length.
const HEADER_AT: usize = 8;

/// A copy of a bundle that a test may spoil.
pub struct Bundle {
    folder: TempDir,
}

/// What `baton verify` ended with.
#[derive(Debug)]
pub struct Verdict {
    pub code: i32,
    /// What it wrote, if it wrote a report.
    pub report: Value,
    pub stderr: String,
}

/// A folder under `models`.
pub fn models(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models")).join(name)
}

impl Bundle {
    /// A copy of a folder.
    pub fn copy(of: &Path) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        copy(of, folder.path());
        Self { folder }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Changes the bytes of a file.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.file(name)).expect(name);
        let before = bytes.clone();
        change(&mut bytes);
        assert_ne!(bytes, before, "{name} is as it was");
        fs::write(self.file(name), bytes).expect(name);
    }

    /// Replaces text in a file, which must be there.
    pub fn replace(&self, name: &str, old: &str, new: &str) {
        let text = fs::read_to_string(self.file(name)).expect(name);
        assert!(text.contains(old), "{name} has no {old:?}");
        fs::write(self.file(name), text.replacen(old, new, 1)).expect(name);
    }

    /// Changes the manifest.
    pub fn manifest(&self, change: impl FnOnce(&mut Value)) {
        let mut manifest = read_json(&self.file("handoff.json"));
        change(&mut manifest);
        fs::write(self.file("handoff.json"), manifest.to_string()).expect("handoff.json");
    }

    /// Changes tensors of `model.safetensors`: their bytes, in the order of the names.
    pub fn tensors<const N: usize>(&self, names: [&str; N], change: impl FnOnce([&mut [u8]; N])) {
        self.edit("model.safetensors", |file| {
            let places = places(file);
            let mut parts: Vec<Vec<u8>> = names.iter().map(|name| file[places[*name].clone()].to_vec()).collect();
            let slices: Vec<&mut [u8]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
            change(slices.try_into().expect("as many as names"));
            for (name, part) in names.iter().zip(&parts) {
                file[places[*name].clone()].copy_from_slice(part);
            }
        });
    }

    /// Changes the elements of a bf16 tensor.
    pub fn bf16(&self, name: &str, change: impl Fn(usize, f32) -> f32) {
        self.tensors([name], |[bytes]| {
            for (i, element) in bytes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let value = f32::from_bits(u32::from(u16::from_le_bytes(*element)) << 16);
                *element = ((change(i, value).to_bits() >> 16) as u16).to_le_bytes();
            }
        });
    }

    /// Makes the digests of files, and those of tensors if wanted, fit what is there: a fault from before the hand-off.
    pub fn digest_anew(&self, tensors: bool) {
        let mut names = Vec::new();
        files(self.path(), "", &mut names);
        names.retain(|name| !name.starts_with("handoff.json"));
        names.sort();
        let (mut entries, mut lines) = (serde_json::Map::new(), String::new());
        for name in names {
            let bytes = fs::read(self.file(&name)).expect("listed");
            let digest = hex(&bytes);
            lines += &format!("{digest}  {name}\n");
            entries.insert(name, json!({"bytes": bytes.len(), "sha256": digest}));
        }
        let weights = fs::read(self.file("model.safetensors")).expect("weights");
        let places = places(&weights);
        self.manifest(|manifest| {
            manifest["generation"] = json!(hex(lines.as_bytes()));
            manifest["files"] = entries.into();
            if tensors && let Some(listed) = manifest["tensors"].as_object_mut() {
                for (name, entry) in listed {
                    entry["sha256"] = json!(hex(&weights[places[name].clone()]));
                }
            }
        });
    }

    /// Runs `baton verify` on it.
    pub fn verify(&self, flags: &[&str]) -> Verdict {
        let run =
            Command::new(env!("CARGO_BIN_EXE_baton")).arg("verify").arg(self.path()).arg("--json").args(flags).output();
        let run = run.expect("baton runs");
        Verdict {
            code: run.status.code().expect("it ends by itself"),
            report: serde_json::from_slice(&run.stdout).unwrap_or_default(),
            stderr: String::from_utf8_lossy(&run.stderr).into_owned(),
        }
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let to = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            fs::create_dir(&to).expect("a folder");
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), &to).expect("a file");
            // Copies keep a mode without write permission.
            fs::set_permissions(&to, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("ours");
        }
    }
}

fn files(folder: &Path, prefix: &str, names: &mut Vec<String>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let entry = entry.expect("an entry");
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.file_type().expect("a type").is_dir() {
            true => files(&entry.path(), &format!("{name}/"), names),
            false => names.push(name),
        }
    }
}

/// Where each tensor lies in a safetensors file.
fn places(file: &[u8]) -> BTreeMap<String, std::ops::Range<usize>> {
    let header = u64::from_le_bytes(file[..HEADER_AT].try_into().expect("eight bytes")) as usize;
    let data = HEADER_AT + header;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&file[HEADER_AT..data]).expect("a header");
    let place = |entry: &Value| {
        let at = |i: usize| entry["data_offsets"][i].as_u64().expect("an offset") as usize;
        data + at(0)..data + at(1)
    };
    header
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, entry)| (name.clone(), place(entry)))
        .collect()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON")
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
