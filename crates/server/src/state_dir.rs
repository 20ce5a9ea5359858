//! `--state-dir`: what must outlive the process, for one server at a time.

use std::fs::{DirBuilder, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A folder that this process alone uses, until it is dropped.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// The system unlocks it when the process ends, however it ends.
    _lock: File,
}

impl StateDir {
    /// Makes the folder, for its owner alone, if there is none, and locks it.
    pub fn open(path: &Path) -> Result<Self> {
        let context = || format!("--state-dir {}", path.display());
        DirBuilder::new().recursive(true).mode(0o700).create(path).with_context(context)?;
        let lock = File::options().create(true).truncate(false).write(true).open(path.join("lock"));
        let lock = lock.with_context(context)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => bail!("{}: another server uses it", context()),
            Err(TryLockError::Error(error)) => Err(error).with_context(context),
        }
    }

    /// Where a file of it lies.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}
