//! What requests ask to be kept: records in the state folder, each of the key that made it.
//!
//! A record is one file, replaced in one step: a crash leaves the old one or the new one. Its name is an id that was made
//! or checked here, never what a client sent. To anybody but its owner a record does not exist. Everything here blocks:
//! call it through `Service::disk_work`.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::batches::Batches;
use crate::files::Files;
use crate::keys::Owner;
use crate::responses::{self, Responses};
use crate::usage::Usage;

/// Bytes of a record that is read.
const MAX_RECORD_BYTES: u64 = 64 << 20;
/// Hexadecimal digits of an id.
const ID_DIGITS: usize = 32;

/// A new id.
pub(crate) fn new_id(prefix: &str) -> String {
    format!("{prefix}{:032x}", rand::random::<u128>())
}

/// Whether this could have been made by [`new_id`], and is safe as a file's name.
pub(crate) fn is_id(prefix: &str, id: &str) -> bool {
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    id.strip_prefix(prefix).is_some_and(|digits| digits.len() == ID_DIGITS && digits.bytes().all(hex))
}

/// How much may be kept.
#[derive(Debug, Clone, Copy)]
pub struct StoreLimits {
    /// Bytes of a file that a client uploads.
    pub file_bytes: u64,
    /// Bytes of all files, results of batches included.
    pub total_bytes: u64,
}

/// Where all records lie. One process at a time may use it. Clones are the same.
#[derive(Debug, Clone)]
pub struct Store {
    files: Arc<Files>,
    batches: Arc<Batches>,
    responses: Arc<Responses>,
    usage: Arc<Usage>,
}

impl Store {
    /// The store in a folder, which is made if there is none.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn open(path: &Path, limits: StoreLimits) -> io::Result<Self> {
        let batches = Batches::open(Folder::open(path.join("batches"), "batch_")?)?;
        let files = Files::open(Folder::open(path.join("files"), "file-")?, limits, &batches.unfinished_results())?;
        let responses = Responses::open(Folder::open(path.join("responses"), responses::PREFIX)?)?;
        let usage = Usage::open(path.join("usage.json"))?;
        Ok(Self {
            files: Arc::new(files),
            batches: Arc::new(batches),
            responses: Arc::new(responses),
            usage: Arc::new(usage),
        })
    }

    /// Files that clients have uploaded, and those that batches left.
    pub(crate) fn files(&self) -> &Arc<Files> {
        &self.files
    }

    pub(crate) fn batches(&self) -> &Arc<Batches> {
        &self.batches
    }

    /// What `/v1/responses` keeps.
    pub(crate) fn responses(&self) -> &Arc<Responses> {
        &self.responses
    }

    /// What each key has used.
    pub(crate) fn usage(&self) -> &Arc<Usage> {
        &self.usage
    }
}

/// A folder of records of one kind.
#[derive(Debug, Clone)]
pub(crate) struct Folder {
    path: PathBuf,
    /// What its ids begin with.
    prefix: &'static str,
}

/// A record as its file has it.
#[derive(Serialize, Deserialize)]
struct Record<T> {
    owner: Owner,
    value: T,
}

impl Folder {
    /// Makes the folder, for its owner alone, if there is none, and clears away what a crash left half written.
    pub fn open(path: PathBuf, prefix: &'static str) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        let folder = Self { path, prefix };
        for name in folder.names()? {
            if name.ends_with(".new") {
                fs::remove_file(folder.path.join(name))?;
            }
        }
        Ok(folder)
    }

    /// An id for a new record.
    pub fn new_id(&self) -> String {
        new_id(self.prefix)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a file that belongs to a record lies: its id with another ending.
    pub fn beside(&self, id: &str, ending: &str) -> PathBuf {
        self.path.join(format!("{id}.{ending}"))
    }

    /// Writes or replaces a record; it is on disk when this returns.
    pub fn put<T: Serialize>(&self, id: &str, owner: Owner, value: &T) -> io::Result<()> {
        replace_file(&self.beside(id, "json"), &serde_json::to_vec(&Record { owner, value })?)
    }

    /// A record of this owner; `None` if there is none, or it is another's.
    pub fn get<T: DeserializeOwned>(&self, id: &str, owner: Owner) -> io::Result<Option<T>> {
        if !is_id(self.prefix, id) {
            return Ok(None);
        }
        match self.read(id) {
            Ok(Record { owner: of, value }) => Ok((of == owner).then_some(value)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes a record, whoever's it is; false if there is none.
    pub fn remove(&self, id: &str) -> io::Result<bool> {
        match fs::remove_file(self.beside(id, "json")) {
            Ok(()) => self.sync().map(|()| true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// All records with their owners. One that cannot be read is left out, and the log says so.
    pub fn all<T: DeserializeOwned>(&self) -> io::Result<Vec<(String, Owner, T)>> {
        let mut all = Vec::new();
        for name in self.names()? {
            let Some(id) = name.strip_suffix(".json").filter(|id| is_id(self.prefix, id)) else { continue };
            match self.read(id) {
                Ok(Record { owner, value }) => all.push((id.to_owned(), owner, value)),
                Err(error) => tracing::warn!(id, %error, "a record of the state folder cannot be read"),
            }
        }
        Ok(all)
    }

    /// Makes what has happened to names in the folder survive a power cut.
    pub fn sync(&self) -> io::Result<()> {
        sync_folder(&self.path)
    }

    /// The names of all its files.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        fs::read_dir(&self.path)?.map(name).collect()
    }

    fn read<T: DeserializeOwned>(&self, id: &str) -> io::Result<Record<T>> {
        let mut bytes = Vec::new();
        File::open(self.beside(id, "json"))?.take(MAX_RECORD_BYTES).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }
}

/// Makes or replaces a file `x.json` in one step, by way of `x.json.new`; it is on disk when this returns.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("json.new");
    let mut file = create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_folder(path.parent().unwrap_or(Path::new(".")))
}

/// Makes what has happened to names in a folder survive a power cut.
fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A new or emptied file, for its owner alone.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    File::options().create(true).write(true).truncate(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const OTHER: Owner = Owner::of_digest([7; 32]);

    fn open(dir: &TempDir) -> Folder {
        Folder::open(dir.path().join("things"), "thing_").unwrap()
    }

    #[test]
    fn a_record_is_its_owners_alone_and_survives() {
        let dir = TempDir::new().unwrap();
        let (id, other) = (new_id("thing_"), new_id("thing_"));
        open(&dir).put(&id, Owner::ANYONE, &"first").unwrap();
        open(&dir).put(&id, Owner::ANYONE, &"second").unwrap();
        open(&dir).put(&other, OTHER, &"third").unwrap();
        let folder = open(&dir);
        assert_eq!(folder.get::<String>(&id, Owner::ANYONE).unwrap().as_deref(), Some("second"));
        assert_eq!(folder.get::<String>(&id, OTHER).unwrap(), None);
        let mut all = folder.all::<String>().unwrap();
        all.sort_by(|a, b| a.2.cmp(&b.2));
        assert_eq!(all, [(id.clone(), Owner::ANYONE, "second".into()), (other, OTHER, "third".into())]);
        assert!(folder.remove(&id).unwrap() && !folder.remove(&id).unwrap());
        assert_eq!(folder.get::<String>(&id, Owner::ANYONE).unwrap(), None);
    }

    #[test]
    fn what_is_no_id_names_no_file() {
        let dir = TempDir::new().unwrap();
        let folder = open(&dir);
        fs::write(dir.path().join("outside.json"), "{}").unwrap();
        for id in ["", "thing_", "thing_../../outside", "../outside", "thing_0", &"thing_f".repeat(5)] {
            assert!(!is_id("thing_", id) && folder.get::<String>(id, Owner::ANYONE).unwrap().is_none(), "{id}");
        }
        assert!(is_id("thing_", &new_id("thing_")) && !is_id("thing_", &new_id("thing-")));
    }

    #[test]
    fn what_a_crash_left_half_written_is_cleared_away_and_damage_is_left_out() {
        let dir = TempDir::new().unwrap();
        let (folder, id) = (open(&dir), new_id("thing_"));
        fs::write(folder.beside(&id, "json.new"), "{\"owner\":").unwrap();
        fs::write(folder.beside(&id, "json"), "{\"owner\":").unwrap();
        let folder = open(&dir);
        assert!(!folder.beside(&id, "json.new").exists());
        assert_eq!(folder.all::<String>().unwrap(), []);
        assert!(folder.get::<String>(&id, Owner::ANYONE).is_err());
    }
}
