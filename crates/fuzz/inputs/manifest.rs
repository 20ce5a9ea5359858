//! A `handoff.json`, its signature, the keys that are trusted, and the one safetensors file beside it: parsed, and what is
//! parsed is opened as a bundle and checked in full.

use super::parts;
use baton_handoff::{Bundle, MANIFEST, Manifest, SIGNATURE, TrustedKeys};
use std::fs;

/// Longest message about a manifest, in bytes: they are shown and logged.
const MAX_MESSAGE: usize = 64 << 10;

pub fn run(data: &[u8]) -> bool {
    let [json, signature, keys, tensors] = parts::split(data);
    let keys = std::str::from_utf8(keys).ok().and_then(|text| TrustedKeys::parse(text).ok()).unwrap_or_default();
    match Manifest::parse(json) {
        Err(error) => {
            let message = error.to_string();
            assert!(message.len() < MAX_MESSAGE && !message.contains('\u{1b}'), "{message:?}");
            return false;
        }
        Ok(manifest) => assert_eq!(manifest.generation, Manifest::generation_of(&manifest.files)),
    }
    let Ok(folder) = tempfile::tempdir() else { return false };
    for (name, content) in [(MANIFEST, json), (SIGNATURE, signature), ("model.safetensors", tensors)] {
        fs::write(folder.path().join(name), content).expect("a temporary file");
    }
    let files = baton_model::Files::Folder(folder.path().into());
    let Ok(Some(bundle)) = Bundle::open(&files) else { return signature.len() > 16 << 10 };
    let _ = bundle.signature(&keys).to_string();
    let integrity = bundle.verify_files(&|_| {});
    // Whatever it says of tensors, only a file that is listed is looked at.
    let _ = bundle.verify_tensors(&|_| {});
    integrity.snapshot.unchanged().is_ok()
}
