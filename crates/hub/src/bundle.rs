//! A bundle: a checkpoint whose `handoff.json` lists every file. All of them are fetched and nothing else, since whoever
//! verifies the copy misses each one that is not there, and refuses each one that is not listed.
//!
//! Read here is what a pull needs; every other rule of the format is the verifier's. The manifest is one of the files that
//! it promises, as it was read: so the list that was followed and the one that is kept are the same.

use std::collections::BTreeMap;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{HubError, client::Client, error::shown, fetch::hex, names};

/// Lists the files.
pub(crate) const MANIFEST: &str = "handoff.json";
/// Signs the manifest, if there is one, and is not listed.
pub(crate) const SIGNATURE: &str = "handoff.json.minisig";

/// The longest manifest that a verifier reads.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;
const MAX_FILES: usize = 1 << 16;

/// What a file must be.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Promise {
    /// Bytes.
    #[serde(rename = "bytes")]
    pub(crate) size: u64,
    /// 64 lower-case hexadecimal digits.
    pub(crate) sha256: String,
}

impl Promise {
    /// Whether a server's word of a file, as far as it says something, is that of the manifest.
    pub(crate) fn compare(&self, file: &str, size: u64, sha256: Option<&str>) -> Result<(), HubError> {
        if size != self.size {
            let file = file.into();
            return Err(match size {
                0 => HubError::Empty { file },
                size => HubError::Size { file, expected: self.size, actual: Some(size) },
            });
        }
        match sha256.filter(|digest| *digest != self.sha256) {
            None => Ok(()),
            Some(actual) => {
                Err(HubError::Digest { file: file.into(), expected: self.sha256.clone(), actual: actual.into() })
            }
        }
    }
}

/// Reads the manifest at `url`. Gives what it promises of every file by name, itself included.
pub(crate) fn read(client: &Client<'_>, url: &str) -> Result<BTreeMap<String, Promise>, HubError> {
    let document = client.document(url, MAX_MANIFEST_BYTES)?;
    let mut files = parse(&document).map_err(|reason| HubError::Answer { url: shown(url), reason })??;
    let own = Promise { size: document.len() as u64, sha256: hex(Sha256::new_with_prefix(&document)) };
    files.insert(MANIFEST.into(), own);
    Ok(files)
}

/// The files that a manifest lists, each with a name that may become a path. The outer error says why it is no manifest.
pub(crate) fn parse(manifest: &[u8]) -> Result<Result<BTreeMap<String, Promise>, HubError>, String> {
    #[derive(Deserialize)]
    struct Manifest {
        files: BTreeMap<String, Promise>,
    }
    let Manifest { files } = serde_json::from_slice(manifest).map_err(|e| format!("it is no hand-off: {e}"))?;
    if files.is_empty() || files.len() > MAX_FILES {
        return Err(format!("it lists {} files; accepted are 1 to {MAX_FILES}", files.len()));
    }
    if let Some((name, promise)) = files.iter().find(|(_, promise)| !names::is_sha256(&promise.sha256)) {
        let (name, digest) = (names::excerpt(name), names::excerpt(&promise.sha256));
        return Err(format!("the digest of {name:?} is {digest:?}, not 64 lower-case hexadecimal digits"));
    }
    let is_folder = |name: &str| {
        files
            .range(format!("{name}/")..)
            .next()
            .is_some_and(|(next, _)| next.strip_prefix(name).is_some_and(|rest| rest.starts_with('/')))
    };
    let check = |name: &String| {
        names::check_listed(name)?;
        let refused = |reason| Err(HubError::Name { name: names::excerpt(name), reason });
        if [MANIFEST, SIGNATURE].contains(&name.as_str()) {
            return refused("it is the manifest's or its signature's");
        }
        if is_folder(name) {
            return refused("it is a folder of another file too");
        }
        Ok(())
    };
    Ok(files.keys().try_for_each(check).map(|()| files))
}

/// Whether there are weights among the files, in a format that cannot carry code.
pub(crate) fn has_weights(files: &BTreeMap<String, Promise>) -> bool {
    files.keys().any(|name| name.ends_with(".safetensors") || name.ends_with(".gguf"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(files: serde_json::Value) -> Result<Result<BTreeMap<String, Promise>, HubError>, String> {
        parse(json!({"cases": [1], "files": files, "version": 9}).to_string().as_bytes())
    }

    fn listing(names: &[&str]) -> serde_json::Value {
        names.iter().map(|n| ((*n).to_owned(), json!({"bytes": 1, "sha256": "a".repeat(64)}))).collect()
    }

    #[test]
    fn only_names_that_a_bundle_may_have_are_taken() {
        let good = ["config.json", "train/data.py", "train.json", "train-a", ".gitattributes", "a/b/c/d/e/f/g/h"];
        assert_eq!(parsed(listing(&good)).unwrap().unwrap().len(), good.len());
        let deep = ["a"; 9].join("/");
        for name in ["../x", "/x", "a/../../x", "train/", "a\\b", "x\n", &deep, MANIFEST, SIGNATURE, "w.bin", "a/W.PKL"]
        {
            assert!(matches!(parsed(listing(&["config.json", name])), Ok(Err(HubError::Name { .. }))), "{name:?}");
        }
        // "train-a" lies between the two in byte order.
        let both = listing(&["train", "train-a", "train/data.py"]);
        assert!(matches!(parsed(both), Ok(Err(HubError::Name { name, .. })) if name == "train"));
    }

    #[test]
    fn what_is_no_list_of_digests_is_refused() {
        for files in [
            json!({}),
            json!([]),
            json!(null),
            json!({"a": {}}),
            json!({"a": {"bytes": -1, "sha256": "a".repeat(64)}}),
            json!({"a": {"bytes": 1, "sha256": "../../x"}}),
            json!({"a": {"bytes": 1, "sha256": "A".repeat(64)}}),
        ] {
            parsed(files).unwrap_err();
        }
    }

    #[test]
    fn a_server_that_says_otherwise_than_the_manifest_is_told_the_file() {
        let promise = Promise { size: 3, sha256: "a".repeat(64) };
        promise.compare("x", 3, None).unwrap();
        promise.compare("x", 3, Some(&"a".repeat(64))).unwrap();
        assert!(matches!(promise.compare("x", 0, None), Err(HubError::Empty { file }) if file == "x"));
        assert!(matches!(promise.compare("x", 4, None), Err(HubError::Size { expected: 3, actual: Some(4), .. })));
        assert!(matches!(promise.compare("x", 3, Some(&"b".repeat(64))), Err(HubError::Digest { .. })));
    }
}
