//! A model of a hub: `/api/models/ID/revision/REVISION` pins the commit, `/ID/resolve/COMMIT/FILE` has the files.
//!
//! Mirrors may list names alone; sizes and digests then come from the headers of each file.

use std::collections::BTreeMap;

use serde::Deserialize;
use ureq::http::header;

use crate::{
    HubError,
    client::{self, Client, LINKED_ETAG, LINKED_SIZE},
    error::shown,
    listing::{self, Listing, RemoteFile},
    names,
};

const MAX_ANSWER_BYTES: u64 = 64 << 20;

#[derive(Deserialize)]
struct Answer {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    /// Git's object id of the file, or of its LFS pointer.
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// Pins `revision` and lists what is fetched of it.
pub(crate) fn list(client: &Client<'_>, endpoint: &str, id: &str, revision: &str) -> Result<Listing, HubError> {
    let url = format!("{endpoint}/api/models/{id}/revision/{}?blobs=true", names::encode(revision));
    let wrong = |reason: String| HubError::Answer { url: shown(&url), reason };
    let answer: Answer =
        serde_json::from_slice(&client.document(&url, MAX_ANSWER_BYTES)?).map_err(|e| wrong(e.to_string()))?;
    if !names::is_commit(&answer.sha) || (names::is_commit(revision) && answer.sha != revision) {
        return Err(wrong("its sha is not the commit of this revision".into()));
    }
    let commit = answer.sha;
    let mut files = BTreeMap::new();
    for sibling in answer.siblings {
        // Every name is checked, also of files that are not wanted: a listing that lies is not used at all.
        if names::check_file(&sibling.rfilename)? {
            files.insert(sibling.rfilename.clone(), sibling);
        }
    }
    let file_url = |name: &str| format!("{endpoint}/{id}/resolve/{commit}/{}", names::encode(name));

    let target = || format!("{id}@{revision}");
    if !files.contains_key(names::CONFIG) {
        return Err(HubError::Missing { target: target(), files: vec![names::CONFIG.into()] });
    }
    let mut wanted: Vec<String> = vec![names::CONFIG.into()];
    wanted.extend(names::OPTIONAL.iter().filter(|n| files.contains_key(**n)).map(|n| n.to_string()));
    if files.contains_key(names::INDEX) {
        let index = client.document(&file_url(names::INDEX), listing::MAX_INDEX_BYTES)?;
        let not_an_index = |reason| HubError::Answer { url: file_url(names::INDEX), reason };
        wanted.push(names::INDEX.into());
        wanted.extend(listing::shards(&index).map_err(not_an_index)??);
    } else if files.contains_key(names::SINGLE) {
        wanted.push(names::SINGLE.into());
    } else {
        let is_weights =
            |n: &&String| [".bin", ".pt", ".pth", ".gguf", ".safetensors", ".h5"].iter().any(|e| n.ends_with(e));
        let found = files.keys().find(is_weights).map_or("nothing like it".into(), |n| format!("it has {n}"));
        return Err(HubError::NoWeights { target: target(), found });
    }
    let missing: Vec<String> = wanted.iter().filter(|n| !files.contains_key(*n)).cloned().collect();
    if !missing.is_empty() {
        return Err(HubError::Missing { target: target(), files: missing });
    }
    let files = wanted.iter().map(|name| remote(client, &files[name], file_url(name)));
    Listing::new(commit.clone(), files.collect::<Result<_, _>>()?)
}

fn remote(client: &Client<'_>, sibling: &Sibling, url: String) -> Result<RemoteFile, HubError> {
    let name = sibling.rfilename.clone();
    let (blob, size) = match sibling {
        Sibling { lfs: Some(lfs), .. } => (lfs.sha256.clone(), lfs.size),
        Sibling { blob_id: Some(id), size: Some(size), .. } => (id.clone(), *size),
        _ => described(client, &url)?,
    };
    // The digest of an LFS file is its SHA-256, any other's git's SHA-1.
    let well_formed = if sibling.lfs.is_some() { names::is_sha256(&blob) } else { names::is_commit(&blob) };
    if !well_formed {
        return Err(HubError::Answer {
            url,
            reason: format!("the digest of {name} is not 40 or 64 hexadecimal digits"),
        });
    }
    let sha256 = names::is_sha256(&blob).then(|| blob.clone());
    Ok(RemoteFile { name, size, blob, sha256, validator: None, url })
}

/// Digest and size of a file from its headers.
fn described(client: &Client<'_>, url: &str) -> Result<(String, u64), HubError> {
    let response = client.head(url)?;
    let etag = client::text(&response, LINKED_ETAG).or_else(|| client::text(&response, header::ETAG));
    let size =
        client::text(&response, LINKED_SIZE).map_or_else(|| client::content_length(&response), |s| s.parse().ok());
    match (etag, size) {
        (Some(etag), Some(size)) => Ok((etag.trim_start_matches("W/").trim_matches('"').to_owned(), size)),
        _ => Err(HubError::Answer { url: url.into(), reason: "the server does not say its digest and size".into() }),
    }
}
