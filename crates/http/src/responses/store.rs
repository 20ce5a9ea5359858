//! Responses that are kept: records of a folder, and what still runs.
//!
//! A record is seen from the moment it is given here, before the disk has it. When there is too much, the oldest leave.
//! What was still running when a process ended has failed, and is shown so.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;
use crate::keys::Owner;
use crate::responses::reply::failure;
use crate::store::{Folder, is_id};

/// Most responses that are kept, and the most bytes that they may have together.
const MAX_RECORDS: usize = 10_000;
const MAX_BYTES: u64 = 1 << 30;

/// What ids of responses begin with.
pub(crate) const PREFIX: &str = "resp_";

/// A response, and the conversation that it is a part of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
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
    pub fn conversation(mut self) -> Vec<Value> {
        let output = self.response["output"].take();
        let mut items = self.history;
        items.extend(self.input);
        items.extend(if let Value::Array(output) = output { output } else { Vec::new() });
        items
    }
}

/// See the head of the file.
#[derive(Debug)]
pub(crate) struct Responses {
    folder: Folder,
    max_records: usize,
    max_bytes: u64,
    shelf: Mutex<Shelf>,
    /// The folder is changed by one at a time.
    changing: Arc<Semaphore>,
    running: Mutex<HashMap<String, Arc<Running>>>,
}

#[derive(Debug, Default)]
struct Shelf {
    /// What is on disk, oldest first, with its bytes.
    kept: VecDeque<(String, u64)>,
    bytes: u64,
    /// What is on its way there.
    pending: HashMap<String, (Owner, Arc<Record>)>,
}

/// A response in the background.
#[derive(Debug, Default)]
pub(crate) struct Running {
    /// It has output.
    pub started: AtomicBool,
    /// Ends it.
    pub cancel: CancellationToken,
    /// It has ended, and its record says so.
    pub ended: CancellationToken,
}

impl Responses {
    /// The responses of a folder.
    pub fn open(folder: Folder) -> io::Result<Self> {
        let mut found = Vec::new();
        for name in folder.names()? {
            let Some(id) = name.strip_suffix(".json").filter(|id| is_id(PREFIX, id)) else { continue };
            let about = fs::metadata(folder.beside(id, "json"))?;
            found.push((about.modified()?, id.to_owned(), about.len()));
        }
        found.sort();
        let kept: VecDeque<_> = found.into_iter().map(|(_, id, bytes)| (id, bytes)).collect();
        let bytes = kept.iter().map(|(_, bytes)| bytes).sum();
        let shelf = Mutex::new(Shelf { kept, bytes, pending: HashMap::new() });
        let (changing, running) = (Arc::new(Semaphore::new(1)), Mutex::default());
        Ok(Self { folder, max_records: MAX_RECORDS, max_bytes: MAX_BYTES, shelf, changing, running })
    }

    /// Keeps a record under its response's id, in the place of an older one. It can be seen at once; whoever wants it to
    /// be on disk waits for what is returned. `guard` lives until then.
    pub fn put(self: &Arc<Self>, owner: Owner, record: Record, guard: impl Send + 'static) -> JoinHandle<()> {
        let id = record.response["id"].as_str().unwrap_or_default().to_owned();
        let record = Arc::new(record);
        self.shelf.lock().pending.insert(id.clone(), (owner, record.clone()));
        let responses = self.clone();
        tokio::spawn(async move {
            let _guard = guard;
            let Ok(_turn) = responses.changing.clone().acquire_owned().await else { return };
            let written = spawn_blocking(move || {
                responses.write(&id, owner, &record).inspect_err(|_| {
                    responses.shelf.lock().pending.remove(&id);
                })
            });
            if let Ok(Err(error)) = written.await {
                tracing::error!(%error, "a response could not be kept");
            }
        })
    }

    fn write(&self, id: &str, owner: Owner, record: &Arc<Record>) -> io::Result<()> {
        // It may have been deleted meanwhile, or given anew.
        let current = |shelf: &Shelf| shelf.pending.get(id).is_some_and(|(_, pending)| Arc::ptr_eq(pending, record));
        if !current(&self.shelf.lock()) {
            return Ok(());
        }
        self.folder.put(id, owner, &**record)?;
        let bytes = fs::metadata(self.folder.beside(id, "json"))?.len();
        let shelf = &mut *self.shelf.lock();
        if current(shelf) {
            shelf.pending.remove(id);
        }
        shelf.forget(id);
        shelf.kept.push_back((id.to_owned(), bytes));
        shelf.bytes += bytes;
        while shelf.kept.len() > self.max_records || shelf.bytes > self.max_bytes {
            let Some((oldest, bytes)) = shelf.kept.pop_front() else { break };
            shelf.bytes -= bytes;
            self.folder.remove(&oldest)?;
        }
        Ok(())
    }

    /// The record of this id, as it stands, if it is this owner's.
    pub async fn get(self: &Arc<Self>, id: &str, owner: Owner) -> Result<Option<Record>, ApiError> {
        // Before the record: what has ended meanwhile has its last record.
        let running = self.running(id);
        let pending = self.shelf.lock().pending.get(id).cloned();
        let record = match pending {
            Some((of, record)) => (of == owner).then(|| (*record).clone()),
            None => {
                let (responses, id) = (self.clone(), id.to_owned());
                let read = spawn_blocking(move || responses.folder.get::<Record>(&id, owner)).await;
                read.map_err(|_| ApiError::internal())?.map_err(unusable)?
            }
        };
        Ok(record.map(|record| as_it_stands(record, running.as_deref())))
    }

    /// Deletes the record of this id and ends it if it runs; false if there is none of this owner.
    pub async fn delete(self: &Arc<Self>, id: &str, owner: Owner) -> Result<bool, ApiError> {
        if self.get(id, owner).await?.is_none() {
            return Ok(false);
        }
        if let Some(running) = self.running(id) {
            running.cancel.cancel();
            running.ended.cancelled().await;
        }
        let _turn = self.changing.acquire().await.map_err(|_| ApiError::internal())?;
        let (responses, id) = (self.clone(), id.to_owned());
        let removed = spawn_blocking(move || {
            let pending = {
                let shelf = &mut *responses.shelf.lock();
                shelf.forget(&id);
                shelf.pending.remove(&id).is_some()
            };
            Ok(responses.folder.remove(&id)? || pending)
        });
        removed.await.map_err(|_| ApiError::internal())?.map_err(unusable)
    }

    /// Says that a response runs in the background. Whoever runs it calls [`ended`](Self::ended) in the end.
    pub fn begin(&self, id: &str) -> Arc<Running> {
        let running = Arc::new(Running::default());
        self.running.lock().insert(id.to_owned(), running.clone());
        running
    }

    /// A response in the background has ended, and its record has been given.
    pub fn ended(&self, id: &str) {
        if let Some(running) = self.running.lock().remove(id) {
            running.ended.cancel();
        }
    }

    /// The response of this id, if it runs in the background.
    pub fn running(&self, id: &str) -> Option<Arc<Running>> {
        self.running.lock().get(id).cloned()
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

/// A record says of a response that is not complete only that it was begun.
fn as_it_stands(mut record: Record, running: Option<&Running>) -> Record {
    match running {
        _ if record.is_final() => {}
        Some(running) if running.started.load(Ordering::Relaxed) => record.response["status"] = "in_progress".into(),
        Some(_) => {}
        None => {
            record.response["status"] = "failed".into();
            record.response["error"] = failure("the server ended before the response was complete");
        }
    }
    record
}

fn unusable(error: io::Error) -> ApiError {
    tracing::error!(%error, "the state folder cannot be used");
    ApiError::internal()
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::store::new_id;

    fn open(dir: &TempDir) -> Responses {
        Responses::open(Folder::open(dir.path().join("responses"), PREFIX).unwrap()).unwrap()
    }

    fn record(id: &str) -> Record {
        let response = json!({"id": id, "status": "completed", "output": [{"type": "message", "content": "answer"}]});
        Record { response, history: Vec::new(), input: vec![json!({"content": "question"})] }
    }

    async fn kept(responses: &Arc<Responses>, ids: &[String]) -> Vec<bool> {
        let mut kept = Vec::new();
        for id in ids {
            kept.push(responses.get(id, Owner::ANYONE).await.unwrap().is_some());
        }
        kept
    }

    #[tokio::test]
    async fn the_oldest_leave_when_there_are_too_many_or_too_large_ones() {
        let dir = TempDir::new().unwrap();
        let ids: Vec<_> = (0..4).map(|_| new_id(PREFIX)).collect();
        let responses = Arc::new(Responses { max_records: 2, ..open(&dir) });
        for id in &ids[..3] {
            responses.put(Owner::ANYONE, record(id), ()).await.unwrap();
        }
        assert_eq!(kept(&responses, &ids).await, [false, true, true, false]);
        let bytes = responses.shelf.lock().bytes;
        assert_eq!(bytes, 2 * fs::metadata(responses.folder.beside(&ids[1], "json")).unwrap().len());

        // A restart knows what there is, and one that is given anew counts once.
        let responses = Arc::new(Responses { max_bytes: bytes, ..open(&dir) });
        responses.put(Owner::ANYONE, record(&ids[2]), ()).await.unwrap();
        assert_eq!(kept(&responses, &ids[1..3]).await, [true, true]);
        assert_eq!(responses.shelf.lock().bytes, bytes);
        responses.put(Owner::ANYONE, record(&ids[3]), ()).await.unwrap();
        assert_eq!(kept(&responses, &ids).await, [false, false, true, true]);
    }

    #[tokio::test]
    async fn a_record_is_seen_before_it_is_on_disk_and_not_after_it_was_deleted() {
        let dir = TempDir::new().unwrap();
        let (responses, id) = (Arc::new(open(&dir)), new_id(PREFIX));
        let turn = responses.changing.clone().acquire_owned().await.unwrap();
        let written = responses.put(Owner::ANYONE, record(&id), ());
        assert_eq!(responses.get(&id, Owner::ANYONE).await.unwrap(), Some(record(&id)));
        assert_eq!(responses.get(&id, Owner::of_digest([7; 32])).await.unwrap(), None);
        assert!(responses.folder.names().unwrap().is_empty());
        drop(turn);
        assert!(responses.delete(&id, Owner::ANYONE).await.unwrap());
        written.await.unwrap();
        assert!(!responses.delete(&id, Owner::ANYONE).await.unwrap());
        assert!(responses.folder.names().unwrap().is_empty());
    }
}
