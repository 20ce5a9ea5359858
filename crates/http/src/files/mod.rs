//! Files that clients upload, and those that batches leave.
//!
//! A file is its bytes, `<id>.data`, and then its record, which makes it exist. So what a crash interrupts never existed, and
//! the next start clears it away. All bytes on disk are counted, those that are still being written too, and their sum is
//! bounded.

mod download;
mod multipart;
mod upload;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::error::ApiError;
use crate::keys::Owner;
use crate::store::{Folder, StoreLimits};

pub(crate) use download::Download;
pub(crate) use upload::receive;

/// Files of one owner that are kept at once.
const MAX_FILES: usize = 10_000;

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct FileInfo {
    pub bytes: u64,
    /// Seconds since 1970, as all times here.
    pub created_at: u64,
    /// From then on it does not exist.
    pub expires_at: Option<u64>,
    pub filename: String,
    pub purpose: String,
}

/// A file as OpenAI shows it.
#[derive(Debug, Serialize)]
pub(crate) struct FileObject {
    pub id: String,
    object: &'static str,
    pub bytes: u64,
    created_at: u64,
    expires_at: Option<u64>,
    filename: String,
    purpose: String,
    status: &'static str,
    status_details: Option<()>,
}

impl FileObject {
    fn new(id: &str, info: &FileInfo) -> Self {
        let FileInfo { bytes, created_at, expires_at, filename, purpose } = info.clone();
        let (object, status) = ("file", "processed");
        Self {
            id: id.to_owned(),
            object,
            bytes,
            created_at,
            expires_at,
            filename,
            purpose,
            status,
            status_details: None,
        }
    }
}

/// All files of a state folder.
#[derive(Debug)]
pub(crate) struct Files {
    folder: Folder,
    limits: StoreLimits,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, (Owner, FileInfo)>,
    /// Bytes on disk, and those promised to what is being written.
    used_bytes: u64,
}

/// The disk has no room for this, by the limit that was set.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the files that are kept have as many bytes as they may")]
pub(crate) struct Full;

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Files {
    /// The files of a folder. Bytes without a record are removed, but for those that `unfinished` batches still write.
    pub fn open(folder: Folder, limits: StoreLimits, unfinished: &HashSet<String>) -> io::Result<Self> {
        let mut state = State::default();
        for (id, owner, info) in folder.all::<FileInfo>()? {
            if !data(&folder, &id).exists() {
                tracing::warn!(id, "the bytes of a file are gone from the state folder");
                continue;
            }
            state.files.insert(id, (owner, info));
        }
        for name in folder.names()? {
            let path = folder.path().join(&name);
            let known = |id: &str| state.files.contains_key(id) || unfinished.contains(id);
            match name.strip_suffix(".data") {
                Some(id) if known(id) => state.used_bytes += fs::metadata(path)?.len(),
                None if !name.ends_with(".part") => {}
                _ => fs::remove_file(path)?,
            }
        }
        Ok(Self { folder, limits, state: Mutex::new(state) })
    }

    /// What is known of a file of this owner.
    pub fn get(&self, id: &str, owner: Owner) -> Result<FileObject, ApiError> {
        self.info(id, owner).map(|info| FileObject::new(id, &info))
    }

    fn info(&self, id: &str, owner: Owner) -> Result<FileInfo, ApiError> {
        let state = self.state.lock();
        let found = state.files.get(id).filter(|(of, info)| *of == owner && !info.is_expired());
        found.map(|(_, info)| info.clone()).ok_or_else(|| ApiError::stored_not_found("file"))
    }

    /// All files of this owner, the newest first.
    pub fn list(&self, owner: Owner, purpose: Option<&str>) -> Vec<FileObject> {
        let state = self.state.lock();
        let fits = |info: &FileInfo| purpose.is_none_or(|purpose| info.purpose == purpose) && !info.is_expired();
        let files = state.files.iter().filter(|(_, (of, info))| *of == owner && fits(info));
        let mut files: Vec<_> = files.map(|(id, (_, info))| FileObject::new(id, info)).collect();
        files.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        files
    }

    /// The bytes of a file.
    pub fn open_data(&self, id: &str) -> io::Result<File> {
        File::open(data(&self.folder, id))
    }

    /// Removes a file.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        let Some((_, info)) = self.state.lock().files.remove(id) else { return Ok(()) };
        self.folder.remove(id)?;
        fs::remove_file(data(&self.folder, id))?;
        self.release(info.bytes);
        Ok(())
    }

    /// Removes what has expired, but for what is in use.
    fn sweep(&self, in_use: impl Fn(&str) -> bool) -> io::Result<()> {
        let expired: Vec<_> = {
            let state = self.state.lock();
            state.files.iter().filter(|(_, (_, info))| info.is_expired()).map(|(id, _)| id.clone()).collect()
        };
        expired.iter().filter(|id| !in_use(id)).try_for_each(|id| self.remove(id))
    }

    /// Where bytes lie, or will lie, that get a record when they are complete.
    pub fn data(&self, id: &str) -> PathBuf {
        data(&self.folder, id)
    }

    /// An id for a new file.
    pub fn new_id(&self) -> String {
        self.folder.new_id()
    }

    /// Lets the file exist whose bytes are complete.
    pub fn publish(&self, id: &str, owner: Owner, info: FileInfo) -> io::Result<()> {
        self.folder.put(id, owner, &info)?;
        self.state.lock().files.insert(id.to_owned(), (owner, info));
        Ok(())
    }

    /// Counts bytes that are about to be written.
    pub fn reserve(&self, bytes: u64) -> Result<(), Full> {
        let mut state = self.state.lock();
        let used = state.used_bytes.saturating_add(bytes);
        if used > self.limits.total_bytes {
            return Err(Full);
        }
        state.used_bytes = used;
        Ok(())
    }

    /// Counts bytes no more.
    pub fn release(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.used_bytes = state.used_bytes.saturating_sub(bytes);
    }

    /// Whether there is room for another file of this owner.
    fn check_count(&self, owner: Owner) -> Result<(), ApiError> {
        match self.state.lock().files.values().filter(|(of, _)| *of == owner).count() < MAX_FILES {
            true => Ok(()),
            false => Err(ApiError::storage_full("as many files are kept as can be; delete some first")),
        }
    }
}

impl FileInfo {
    fn is_expired(&self) -> bool {
        self.expires_at.is_some_and(|at| at <= now())
    }
}

fn data(folder: &Folder, id: &str) -> PathBuf {
    folder.beside(id, "data")
}
