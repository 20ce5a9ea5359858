//! A model of a hub: `/api/models/ID/revision/REVISION` pins the commit, `/ID/resolve/COMMIT/FILE` has the files.
//!
//! If there is a bundle's manifest, it says which files are fetched. Mirrors may list names alone; sizes and digests then come from the headers of each file.

use std::collections::BTreeMap;

use serde::Deserialize;
use ureq::http::header;

use crate::{
    HubError,
    bundle::{self, Promise},
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
        names::check_file(&sibling.rfilename)?;
        files.insert(sibling.rfilename.clone(), sibling);
    }
    let repository = Repository {
        client,
        target: format!("{id}@{revision}"),
        base: format!("{endpoint}/{id}/resolve/{commit}"),
        files,
    };
    let files =
        if repository.files.contains_key(bundle::MANIFEST) { repository.listed()? } else { repository.known()? };
    Ok(Listing { commit, files })
}

/// A model at a commit.
struct Repository<'a> {
    client: &'a Client<'a>,
    /// As it was asked for.
    target: String,
    /// Without a final slash.
    base: String,
    /// All that it has, by name.
    files: BTreeMap<String, Sibling>,
}

impl Repository<'_> {
    fn url(&self, name: &str) -> String {
        format!("{}/{}", self.base, names::encode_parts(name))
    }

    /// The files of a bundle.
    fn listed(&self) -> Result<Vec<RemoteFile>, HubError> {
        let promised = bundle::read(self.client, &self.url(bundle::MANIFEST))?;
        if !bundle::has_weights(&promised) {
            return Err(self.no_weights("its handoff.json lists none".into()));
        }
        self.all_there(promised.keys())?;
        let mut files =
            promised.iter().map(|(name, promise)| self.remote(name, Some(promise))).collect::<Result<Vec<_>, _>>()?;
        if self.files.contains_key(bundle::SIGNATURE) {
            files.push(self.remote(bundle::SIGNATURE, None)?);
        }
        Ok(files)
    }

    /// The files of a checkpoint that nobody lists.
    fn known(&self) -> Result<Vec<RemoteFile>, HubError> {
        let has = |name: &str| self.files.contains_key(name);
        if !has(names::CONFIG) {
            return Err(HubError::Missing { target: self.target.clone(), files: vec![names::CONFIG.into()] });
        }
        let mut wanted: Vec<String> = vec![names::CONFIG.into()];
        wanted.extend(names::OPTIONAL.iter().filter(|n| has(n)).map(|n| n.to_string()));
        if has(names::INDEX) {
            let url = self.url(names::INDEX);
            let index = self.client.document(&url, listing::MAX_INDEX_BYTES)?;
            wanted.push(names::INDEX.into());
            wanted.extend(listing::shards(&index).map_err(|reason| HubError::Answer { url, reason })??);
        } else if has(names::SINGLE) {
            wanted.push(names::SINGLE.into());
        } else {
            let endings = [".bin", ".pt", ".pth", ".gguf", ".safetensors", ".h5"];
            let is_weights = |n: &&String| !n.contains('/') && endings.iter().any(|e| n.ends_with(e));
            let found = self.files.keys().find(is_weights);
            return Err(self.no_weights(found.map_or("nothing like it".into(), |n| format!("it has {n}"))));
        }
        self.all_there(&wanted)?;
        wanted.iter().map(|name| self.remote(name, None)).collect()
    }

    fn no_weights(&self, found: String) -> HubError {
        HubError::NoWeights { target: self.target.clone(), found }
    }

    fn all_there<'n>(&self, names: impl IntoIterator<Item = &'n String>) -> Result<(), HubError> {
        let missing: Vec<String> = names.into_iter().filter(|n| !self.files.contains_key(*n)).cloned().collect();
        if missing.is_empty() { Ok(()) } else { Err(HubError::Missing { target: self.target.clone(), files: missing }) }
    }

    /// A file that is there, and is what a bundle promises.
    fn remote(&self, name: &str, promise: Option<&Promise>) -> Result<RemoteFile, HubError> {
        let (url, sibling) = (self.url(name), &self.files[name]);
        let (blob, size) = match sibling {
            Sibling { lfs: Some(lfs), .. } => (lfs.sha256.clone(), lfs.size),
            Sibling { blob_id: Some(id), size: Some(size), .. } => (id.clone(), *size),
            _ => described(self.client, &url)?,
        };
        // The digest of an LFS file is its SHA-256, any other's git's SHA-1.
        let well_formed = if sibling.lfs.is_some() { names::is_sha256(&blob) } else { names::is_commit(&blob) };
        if !well_formed {
            return Err(HubError::Answer {
                url,
                reason: format!("the digest of {name} is not 40 or 64 hexadecimal digits"),
            });
        }
        let published = names::is_sha256(&blob).then_some(blob.as_str());
        match promise {
            Some(promise) => promise.compare(name, size, published)?,
            None if size == 0 => return Err(HubError::Empty { file: name.into() }),
            None => {}
        }
        let sha256 = promise.map(|p| p.sha256.as_str()).or(published).map(str::to_owned);
        Ok(RemoteFile { name: name.into(), size, blob, sha256, validator: None, url })
    }
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
