//! What a server says about a checkpoint, checked: one commit, and every file that will be fetched.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::{HubError, names};

/// The longest index that is read. DeepSeek-V3's has 9 MB.
pub(crate) const MAX_INDEX_BYTES: u64 = 64 << 20;
const MAX_SHARDS: usize = 10_000;

/// A file to be fetched.
#[derive(Debug, Clone)]
pub(crate) struct RemoteFile {
    /// Plain; with folders only if a bundle lists it.
    pub(crate) name: String,
    /// Bytes.
    pub(crate) size: u64,
    /// Its blob's name: hexadecimal digits.
    pub(crate) blob: String,
    /// Published by the hub, or promised by the bundle that it belongs to.
    pub(crate) sha256: Option<String>,
    /// `ETag` or `Last-Modified`, where there is no digest.
    pub(crate) validator: Option<String>,
    /// Where it is.
    pub(crate) url: String,
}

impl RemoteFile {
    /// Git's id of the file, where the hub keeps it in git itself: the SHA-1 of `blob SIZE\0` and its bytes.
    pub(crate) fn git_id(&self) -> Option<&str> {
        (self.blob.len() == 40).then_some(self.blob.as_str())
    }

    /// Whether bytes of an earlier run certainly belong to the same file, or will be found out if not.
    pub(crate) fn can_resume(&self) -> bool {
        self.sha256.is_some() || self.validator.is_some()
    }
}

/// A pinned checkpoint.
#[derive(Debug)]
pub(crate) struct Listing {
    /// Hexadecimal digits.
    pub(crate) commit: String,
    /// All of a bundle, else weights, config and whatever else is wanted.
    pub(crate) files: Vec<RemoteFile>,
}

/// The shards that an index names, each a plain safetensors name. The outer error says why it is no index.
pub(crate) fn shards(index: &[u8]) -> Result<Result<BTreeSet<String>, HubError>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|e| e.to_string())?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    if shards.is_empty() || shards.len() > MAX_SHARDS {
        return Err(format!("it names {} shards; accepted are 1 to {MAX_SHARDS}", shards.len()));
    }
    Ok(shards.iter().try_for_each(|name| names::check_shard(name)).map(|()| shards))
}
