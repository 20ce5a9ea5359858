//! Responses that are kept: one file each in a folder, and what still runs.
//!
//! A record is complete or absent: it is written beside its place and moved there. It is seen from the moment it is
//! given here, before the disk has it. Only whoever sent the same key sees it; for everybody else it does not exist. When
//! there is too much, the oldest leave. What was still running when a process ended has failed, and is shown so.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::auth::Owner;
use crate::error::ApiError;
use crate::json;
use crate::responses::reply::failure;

/// Most responses that are kept, and the most bytes that they may have together.
const MAX_RECORDS: usize = 10_000;
const MAX_BYTES: u64 = 1 << 30;

const PREFIX: &str = "resp_";
const SUFFIX: &str = ".json";

/// A response, and the conversation that it is a part of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub owner: Owner,
    /// The object as it is sent.
    pub response: Value,
    /// Items of the conversation before the request's own.
    pub history: Vec<Value>,
    /// The request's own items.
    pub input: Vec<Value>,
}

impl Record {
    /// Whether the response is as it will always be.
    pub fn is_final(&self) -> bool {
        !matches!(self.response["status"].as_str(), Some("queued" | "in_progress"))
    }

    /// The whole conversation, the answer included.
    pub fn conversation(self) -> Vec<Value> {
        let output = match self.response {
            Value::Object(mut response) => response.remove("output"),
            _ => None,
        };
        let Some(Value::Array(output)) = output else { return [self.history, self.input].concat() };
        [self.history, self.input, output].concat()
    }
}

/// See the head of the file.
pub struct ResponseStore {
    folder: PathBuf,
    /// What is on disk, oldest first, with its bytes; what is on its way there.
    shelf: Mutex<Shelf>,
    running: Mutex<HashMap<String, Arc<Running>>>,
}

#[derive(Default)]
struct Shelf {
    kept: VecDeque<(String, u64)>,
    bytes: u64,
    pending: HashMap<String, Arc<Record>>,
}

/// A response in the background.
#[derive(Default)]
pub(crate) struct Running {
    /// It has output.
    pub started: AtomicBool,
    /// Ends it.
    pub cancel: CancellationToken,
    /// It has ended, and its record says so.
    pub ended: CancellationToken,
}

impl ResponseStore {
    /// The responses in a folder, which is made if there is none. Nobody else may write there.
    ///
    /// # Errors
    /// If the folder cannot be made or read.
    pub fn open(folder: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let mut found = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let (name, about) = (entry.file_name(), entry.metadata()?);
            let id = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)).filter(|id| is_id(id));
            match id {
                Some(id) => found.push((about.modified()?, id.to_owned(), about.len())),
                // Was being written when the process ended.
                None if about.is_file() => fs::remove_file(entry.path())?,
                None => {}
            }
        }
        found.sort();
        let kept: VecDeque<_> = found.into_iter().map(|(_, id, bytes)| (id, bytes)).collect();
        let bytes = kept.iter().map(|(_, bytes)| bytes).sum();
        let shelf = Mutex::new(Shelf { kept, bytes, pending: HashMap::new() });
        Ok(Self { folder: folder.to_owned(), shelf, running: Mutex::default() })
    }

    /// Keeps a record under its response's id, in the place of an older one. It can be seen at once; whoever wants it to
    /// be on disk waits for what is returned. `guard` lives until then.
    pub(crate) fn put(self: &Arc<Self>, record: Record, guard: impl Send + 'static) -> JoinHandle<()> {
        let id = record.response["id"].as_str().unwrap_or_default().to_owned();
        let record = Arc::new(record);
        self.shelf.lock().pending.insert(id.clone(), record.clone());
        let store = self.clone();
        spawn_blocking(move || {
            if let Err(error) = store.write(&id, &record) {
                store.shelf.lock().pending.remove(&id);
                tracing::error!(%error, "a response could not be kept");
            }
            drop(guard);
        })
    }

    fn write(&self, id: &str, record: &Arc<Record>) -> io::Result<()> {
        let bytes = json::write(&**record);
        let beside = self.folder.join(format!("{id}.{:016x}.new", rand::random::<u64>()));
        let written = (|| {
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&beside)?;
            file.write_all(&bytes)?;
            file.sync_all()
        })();
        let shelf = &mut *self.shelf.lock();
        // It may have been deleted meanwhile, or given anew.
        let current = shelf.pending.get(id).is_some_and(|pending| Arc::ptr_eq(pending, record));
        if written.is_err() || !current {
            let _ = fs::remove_file(&beside);
            return written;
        }
        fs::rename(&beside, self.file(id))?;
        shelf.pending.remove(id);
        shelf.forget(id);
        shelf.kept.push_back((id.to_owned(), bytes.len() as u64));
        shelf.bytes += bytes.len() as u64;
        while shelf.kept.len() > MAX_RECORDS || shelf.bytes > MAX_BYTES {
            let Some((oldest, bytes)) = shelf.kept.pop_front() else { break };
            shelf.bytes -= bytes;
            let _ = fs::remove_file(self.file(&oldest));
        }
        Ok(())
    }

    /// The record of this id, as it stands, if it is this owner's. `param`: the field that holds the id.
    pub(crate) async fn get(self: &Arc<Self>, id: &str, owner: &Owner, param: &str) -> Result<Record, ApiError> {
        let missing = || ApiError::response_not_found(param);
        if !is_id(id) {
            return Err(missing());
        }
        let running = self.running(id);
        let pending = self.shelf.lock().pending.get(id).cloned();
        let mut record = match pending {
            Some(record) => (*record).clone(),
            None => {
                let file = self.file(id);
                let read = spawn_blocking(move || {
                    let bytes = fs::read(file).ok()?;
                    serde_json::from_slice::<Record>(&bytes)
                        .inspect_err(|error| tracing::error!(%error, "a kept response cannot be read"))
                        .ok()
                });
                read.await.map_err(|_| ApiError::internal())?.ok_or_else(missing)?
            }
        };
        if !record.owner.is(owner) {
            return Err(missing());
        }
        if !record.is_final() {
            match running {
                Some(running) if running.started.load(Ordering::Relaxed) => {
                    record.response["status"] = "in_progress".into();
                }
                Some(_) => {}
                None => {
                    record.response["status"] = "failed".into();
                    record.response["error"] = failure("the server ended before the response was complete");
                }
            }
        }
        Ok(record)
    }

    /// Deletes the record of this id, if it is this owner's, and ends it if it runs.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, owner: &Owner) -> Result<(), ApiError> {
        self.get(id, owner, "response_id").await?;
        if let Some(running) = self.running(id) {
            running.cancel.cancel();
            running.ended.cancelled().await;
        }
        let (store, id) = (self.clone(), id.to_owned());
        let removed = spawn_blocking(move || {
            let mut shelf = store.shelf.lock();
            shelf.pending.remove(&id);
            shelf.forget(&id);
            match fs::remove_file(store.file(&id)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        });
        let removed = removed.await.map_err(|_| ApiError::internal())?;
        removed.map_err(|error| {
            tracing::error!(%error, "a kept response cannot be deleted");
            ApiError::internal()
        })
    }

    /// Says that a response runs in the background. Whoever runs it calls [`ended`](Self::ended) in the end.
    pub(crate) fn begin(&self, id: &str) -> Arc<Running> {
        let running = Arc::new(Running::default());
        self.running.lock().insert(id.to_owned(), running.clone());
        running
    }

    /// A response in the background has ended, and its record has been given.
    pub(crate) fn ended(&self, id: &str) {
        if let Some(running) = self.running.lock().remove(id) {
            running.ended.cancel();
        }
    }

    /// The response of this id, if it runs in the background.
    pub(crate) fn running(&self, id: &str) -> Option<Arc<Running>> {
        self.running.lock().get(id).cloned()
    }

    fn file(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}{SUFFIX}"))
    }
}

impl std::fmt::Debug for ResponseStore {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("ResponseStore").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl Shelf {
    fn forget(&mut self, id: &str) {
        if let Some(at) = self.kept.iter().position(|(kept, _)| kept == id)
            && let Some((_, bytes)) = self.kept.remove(at)
        {
            self.bytes -= bytes;
        }
    }
}

/// Whether a text is an id as we make them; nothing else may become a path.
fn is_id(text: &str) -> bool {
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    text.strip_prefix(PREFIX).is_some_and(|unique| unique.len() == 32 && unique.bytes().all(hex))
}
