//! A directory served over HTTP(S): no listing is asked for. The names are those of the bundle's manifest; without one
//! they are known, or come from the index.
//!
//! A bundle's files are told by the digests that it promises. Of others there are none, so a file is told by its URL, its
//! size and its `ETag` or `Last-Modified`, and the SHA-256 of what came is recorded and checked from then on. Together
//! they stand for the commit.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};
use ureq::http::header;

use crate::{
    HubError,
    bundle::{self, Promise},
    client::{self, Client},
    fetch::hex,
    listing::{self, Listing, RemoteFile},
    names,
};

/// Lists what is fetched of the directory at `base`, which ends in `/`.
pub(crate) fn list(client: &Client<'_>, base: &str) -> Result<Listing, HubError> {
    let manifest = bundle::read(client, &format!("{base}{}", bundle::MANIFEST));
    let files = match unless_absent(manifest)? {
        Some(promised) => listed(client, base, promised)?,
        None => known(client, base)?,
    };
    let mut commit = Sha256::new();
    for file in &files {
        commit.update(format!("{}\n{}\n", file.name, file.blob));
    }
    Ok(Listing { commit: hex(commit), files })
}

/// The files of a bundle.
fn listed(client: &Client<'_>, base: &str, promised: BTreeMap<String, Promise>) -> Result<Vec<RemoteFile>, HubError> {
    if !bundle::has_weights(&promised) {
        return Err(HubError::NoWeights { target: base.into(), found: "its handoff.json lists none".into() });
    }
    let file = |(name, Promise { size, sha256 }): (String, Promise)| {
        let url = format!("{base}{}", names::encode_parts(&name));
        RemoteFile { name, size, blob: sha256.clone(), sha256: Some(sha256), validator: None, url }
    };
    let mut files: Vec<RemoteFile> = promised.into_iter().map(file).collect();
    files.extend(optional(client, base, bundle::SIGNATURE)?);
    Ok(files)
}

/// The files of a checkpoint that nobody lists.
fn known(client: &Client<'_>, base: &str) -> Result<Vec<RemoteFile>, HubError> {
    let mut files = vec![required(client, base, names::CONFIG)?];
    if let Some(index) = optional(client, base, names::INDEX)? {
        let document = client.document(&index.url, listing::MAX_INDEX_BYTES)?;
        let not_an_index = |reason| HubError::Answer { url: index.url.clone(), reason };
        let shards: BTreeSet<String> = listing::shards(&document).map_err(not_an_index)??;
        for shard in &shards {
            files.push(required(client, base, shard)?);
        }
        files.push(index);
    } else if let Some(single) = optional(client, base, names::SINGLE)? {
        files.push(single);
    } else {
        return Err(HubError::NoWeights { target: base.into(), found: "it has neither".into() });
    }
    for name in names::OPTIONAL {
        files.extend(optional(client, base, name)?);
    }
    Ok(files)
}

fn required(client: &Client<'_>, base: &str, name: &str) -> Result<RemoteFile, HubError> {
    let url = format!("{base}{}", names::encode_parts(name));
    let response = client.head(&url)?;
    let answer = |reason: &str| HubError::Answer { url: url.clone(), reason: reason.into() };
    let size = client::content_length(&response).ok_or_else(|| answer("the server does not say its size"))?;
    if size == 0 {
        return Err(HubError::Empty { file: name.into() });
    }
    let validator = validator(&response).ok_or_else(|| {
        answer("the server gives neither ETag nor Last-Modified, so a changed file could not be told")
    })?;
    let mut blob = Sha256::new();
    blob.update(format!("{url}\n{validator}\n{size}"));
    Ok(RemoteFile { name: name.into(), size, blob: hex(blob), sha256: None, validator: Some(validator), url })
}

fn optional(client: &Client<'_>, base: &str, name: &str) -> Result<Option<RemoteFile>, HubError> {
    unless_absent(required(client, base, name))
}

/// Object stores answer 403 for what does not exist when listing is not allowed.
fn unless_absent<T>(result: Result<T, HubError>) -> Result<Option<T>, HubError> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(HubError::NotFound { .. } | HubError::Denied { status: 403, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What changes when the file does.
pub(crate) fn validator(response: &ureq::http::Response<ureq::Body>) -> Option<String> {
    client::text(response, header::ETAG).or_else(|| client::text(response, header::LAST_MODIFIED)).map(str::to_owned)
}
