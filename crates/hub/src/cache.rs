//! The cache's layout, which is that of Hugging Face tools:
//!
//! ```text
//! models--org--name/blobs/<etag>                 a file's bytes; <etag>.incomplete while it is fetched
//!                  /refs/<revision>              the commit
//!                  /snapshots/<commit>/<file>    a link to ../../blobs/<etag>, one more ../ for each folder in its name
//!                  /.baton/<commit>.json         ours: sizes and digests of the snapshot's files
//!                  /.staging/<commit>/           ours: a snapshot before it is renamed into place
//! .locks/models--org--name/<etag>.lock           held while a blob is fetched, theirs and ours
//! ```
//!
//! A directory that is not on a hub has the same layout in a cache of our own, under the SHA-256 of its URL.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    Event, HubError, Options, Progress, Snapshot, Target, bundle,
    error::at,
    fetch::{self, hex},
    listing, names,
};

/// Files up to this size are hashed again whenever a snapshot is used: config, tokenizer, template.
pub(crate) const SMALL_BYTES: u64 = 32 << 20;

/// What was fetched, as recorded beside a snapshot.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Fetched {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) sha256: String,
}

#[derive(Serialize, Deserialize)]
struct Record {
    files: Vec<Fetched>,
}

/// What the cache holds of a revision.
pub(crate) enum Found {
    Complete(Snapshot),
    /// With what is missing, in words.
    Incomplete(String),
}

/// One model's or directory's part of the cache.
pub(crate) struct Folder {
    root: PathBuf,
    locks: PathBuf,
}

impl Folder {
    pub(crate) fn of(target: &Target, options: &Options) -> Self {
        let (cache, name) = match target {
            Target::Model { id, .. } => (&options.hub_cache, format!("models--{}", id.replace('/', "--"))),
            Target::Directory { url } => (&options.directory_cache, hex(Sha256::new_with_prefix(url))),
        };
        Folder { root: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// The path of a blob, or of what there is of it.
    pub(crate) fn blob(&self, name: &str) -> PathBuf {
        self.root.join("blobs").join(name)
    }

    /// Makes the folder of blobs.
    pub(crate) fn create(&self) -> Result<PathBuf, HubError> {
        let blobs = self.root.join("blobs");
        at(&blobs, fs::create_dir_all(&blobs))?;
        Ok(blobs)
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    fn record(&self, commit: &str) -> PathBuf {
        self.root.join(".baton").join(format!("{commit}.json"))
    }

    /// Looks a revision up, without the network.
    pub(crate) fn find(&self, revision: &str) -> Result<Found, HubError> {
        let commit = if names::is_commit(revision) {
            revision.to_owned()
        } else {
            let path = self.root.join("refs").join(revision);
            match fs::read_to_string(&path) {
                Ok(text) => text.trim().to_owned(),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    return Ok(Found::Incomplete("nothing of this revision".into()));
                }
                Err(cause) => return Err(HubError::Io { path, cause }),
            }
        };
        let folder = self.snapshot(&commit);
        if !names::is_commit(&commit) || !folder.is_dir() {
            return Ok(Found::Incomplete("no snapshot of this revision".into()));
        }
        let record = self.record(&commit);
        let missing = match fs::read(&record) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(record) => check_recorded(&folder, &record),
                Err(_) => Some(format!("{} is damaged", record.display())),
            },
            Err(_) => check_foreign(&folder),
        };
        Ok(match missing {
            Some(missing) => Found::Incomplete(missing),
            None => Found::Complete(Snapshot { folder, commit, fetched_bytes: 0 }),
        })
    }

    /// Takes a lock of this folder, and says so if that must wait. It is free when the file is dropped.
    pub(crate) fn lock(&self, name: &str, progress: &Progress<'_>) -> Result<File, HubError> {
        at(&self.locks, fs::create_dir_all(&self.locks))?;
        let path = self.locks.join(format!("{name}.lock"));
        let file = at(&path, File::options().create(true).append(true).open(&path))?;
        if file.try_lock().is_err() {
            progress(Event::Waiting { path: &path });
            at(&path, file.lock())?;
        }
        Ok(file)
    }

    /// Makes a snapshot visible: the record first, then the folder in one rename. `files` are (fetched, blob name).
    pub(crate) fn publish(&self, commit: &str, files: Vec<(Fetched, String)>) -> Result<PathBuf, HubError> {
        let staging = self.root.join(".staging").join(commit);
        if staging.exists() {
            at(&staging, fs::remove_dir_all(&staging))?;
        }
        at(&staging, fs::create_dir_all(&staging))?;
        let mut folders = BTreeSet::new();
        for (file, blob) in &files {
            let link = staging.join(&file.name);
            folders.extend(Path::new(&file.name).ancestors().skip(1).map(Path::to_owned));
            at(&link, fs::create_dir_all(link.parent().expect("below staging")))?;
            let up = "../".repeat(2 + file.name.matches('/').count());
            at(&link, symlink(format!("{up}blobs/{blob}"), &link))?;
        }
        let sync = |top: &Path| folders.iter().try_for_each(|f| at(top.join(f), sync_folder(&top.join(f))));
        sync(&staging)?;
        let record = Record { files: files.into_iter().map(|(file, _)| file).collect() };
        write_atomically(&self.record(commit), &serde_json::to_vec_pretty(&record).expect("plain values"))?;

        let snapshot = self.snapshot(commit);
        let parent = self.root.join("snapshots");
        at(&parent, fs::create_dir_all(&parent))?;
        if snapshot.exists() {
            // Another tool began it. The record lists all files, so until the last one is there it is incomplete.
            for file in &record.files {
                let link = snapshot.join(&file.name);
                at(&link, fs::create_dir_all(link.parent().expect("below the snapshot")))?;
                at(&link, fs::rename(staging.join(&file.name), &link))?;
            }
            at(&staging, fs::remove_dir_all(&staging))?;
            sync(&snapshot)?;
        } else {
            at(&snapshot, fs::rename(&staging, &snapshot))?;
        }
        at(&parent, sync_folder(&parent))?;
        Ok(snapshot)
    }

    /// Notes which commit a revision is today.
    pub(crate) fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if names::is_commit(revision) {
            return Ok(());
        }
        write_atomically(&self.root.join("refs").join(revision), commit.as_bytes())
    }
}

/// The first file that is not as recorded.
fn check_recorded(folder: &Path, record: &Record) -> Option<String> {
    record.files.iter().find_map(|file| {
        let path = folder.join(&file.name);
        let Ok(metadata) = fs::metadata(&path) else {
            return Some(format!("{} is missing", file.name));
        };
        let intact = metadata.len() == file.size
            && (file.size > SMALL_BYTES || fetch::sha256(&path).is_ok_and(|digest| digest == file.sha256));
        (!intact).then(|| format!("{} is not what was fetched", file.name))
    })
}

/// What a snapshot of another tool lacks: such tools fetch file by file, so a folder alone says little.
fn check_foreign(folder: &Path) -> Option<String> {
    if let Ok(manifest) = fs::read(folder.join(bundle::MANIFEST)) {
        let Ok(Ok(promised)) = bundle::parse(&manifest) else {
            return Some(format!("{} is damaged", bundle::MANIFEST));
        };
        let whole = |name: &str, size| fs::metadata(folder.join(name)).is_ok_and(|m| m.is_file() && m.len() == size);
        let missing = promised.into_iter().find(|(name, promise)| !whole(name, promise.size));
        return missing.map(|(name, _)| format!("{name} is missing"));
    }
    let there = |name: &str| fs::metadata(folder.join(name)).is_ok_and(|m| m.is_file() && m.len() > 0);
    let shards = match fs::read(folder.join(names::INDEX)) {
        Ok(index) => match listing::shards(&index) {
            Ok(Ok(shards)) => shards.into_iter().collect(),
            _ => return Some(format!("{} is damaged", names::INDEX)),
        },
        Err(_) => vec![names::SINGLE.to_owned()],
    };
    let missing = [names::CONFIG.to_owned()].into_iter().chain(shards).find(|name| !there(name));
    match missing {
        Some(name) => Some(format!("{name} is missing")),
        None if names::TOKENIZERS.iter().any(|name| there(name)) => None,
        None => Some("a tokenizer is missing".into()),
    }
}

/// Replaces a small file in one step.
fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), HubError> {
    let folder = path.parent().expect("a file in a folder");
    at(folder, fs::create_dir_all(folder))?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    at(&temporary, written)?;
    at(path, fs::rename(&temporary, path))?;
    at(folder, sync_folder(folder))
}

/// Makes renames in a folder survive a power cut.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
