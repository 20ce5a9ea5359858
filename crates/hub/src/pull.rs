//! One pull, in order: cache, lock, listing, blobs, snapshot, ref.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    HubError, Options, Target,
    cache::{Folder, Found},
    client::Client,
    directory,
    fetch::Fetch,
    repository,
};

/// A complete checkpoint in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// A folder in Hugging Face layout, its files links into the cache.
    pub folder: PathBuf,
    /// What the revision is pinned to.
    pub commit: String,
    /// Bytes that had to be fetched; 0 if the cache had everything.
    pub fetched_bytes: u64,
}

/// What happens during a pull.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Another process holds this lock.
    Waiting {
        /// The lock file.
        path: &'a Path,
    },
    /// The server said what there is.
    Listed {
        /// What the revision is pinned to.
        commit: &'a str,
        /// Files of the checkpoint.
        files: usize,
        /// Bytes of all of them.
        size: u64,
        /// Bytes of `size` that the cache has already.
        present: u64,
    },
    /// A file grew, or began anew.
    Bytes {
        /// Its name.
        file: &'a str,
        /// Bytes here.
        done: u64,
        /// Bytes it will have.
        size: u64,
        /// Bytes here of all files, of [`Event::Listed`]'s `size`.
        all_done: u64,
    },
    /// A request failed and will be made again.
    Retry {
        /// The file or URL.
        what: &'a str,
        /// Why.
        error: &'a HubError,
        /// How long until then.
        delay: Duration,
    },
}

/// Told of every [`Event`], from several threads; must not block.
pub type Progress<'a> = dyn Fn(Event<'_>) + Sync + 'a;

/// Gives the checkpoint's folder, from the cache if it is complete there (then without any network), else fetched.
/// Blocks; may run in several threads and processes at once.
///
/// # Errors
/// Whatever [`HubError`] stops it. What was fetched so far is kept out of sight, and the next pull goes on from there.
pub fn pull(target: &Target, options: &Options, progress: &Progress<'_>) -> Result<Snapshot, HubError> {
    let folder = Folder::of(target, options);
    let revision = target.revision();
    match folder.find(revision)? {
        Found::Complete(snapshot) if options.offline || !options.refresh => return Ok(snapshot),
        Found::Incomplete(missing) if options.offline => {
            return Err(HubError::Offline { target: target.to_string(), missing });
        }
        _ => {}
    }
    let client = Client::new(options, progress)?;
    let _lock = folder.lock("baton", progress)?;
    if let (Found::Complete(snapshot), false) = (folder.find(revision)?, options.refresh) {
        return Ok(snapshot); // fetched by whom we waited for
    }
    let listing = match target {
        Target::Model { id, revision } => repository::list(&client, &options.endpoint, id, revision)?,
        Target::Directory { url } => directory::list(&client, url)?,
    };
    let snapshot = match folder.find(&listing.commit)? {
        Found::Complete(snapshot) => snapshot,
        Found::Incomplete(_) => {
            let fetch = Fetch { client: &client, folder: &folder, options, progress };
            let (files, fetched_bytes) = fetch.all(&listing.commit, &listing.files)?;
            let blobs = listing.files.iter().map(|f| f.blob.clone());
            let path = folder.publish(&listing.commit, files.into_iter().zip(blobs).collect())?;
            Snapshot { folder: path, commit: listing.commit, fetched_bytes }
        }
    };
    folder.write_ref(revision, &snapshot.commit)?;
    Ok(snapshot)
}
