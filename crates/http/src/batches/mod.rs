//! Batches: requests in a file, answered when there is time, as OpenAI has them.
//!
//! Every line goes through the same routes as a request of the batch's owner, so that no rule exists twice. The files of
//! results are the journal: a line's result is on disk before it counts, and after a restart a batch goes on with the lines
//! that have none. So each line has exactly one result, whenever the process ends; what was under way is asked again.

mod batch;
mod input;
mod results;
mod run;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::admission::Counter;
use crate::error::ApiError;
use crate::keys::Owner;
use crate::store::Folder;

pub(crate) use batch::{Batch, BatchObject, NewBatch};
pub(crate) use run::{cancel, resume, start};

/// Lines of all batches that are answered at once; requests of clients come before them in the engine's queue, whosever
/// they are.
const LINES_AT_ONCE: usize = 16;
/// Lines that wait, of all batches, at most, without keeping others from being answered. Each is in memory.
const LINES_ASIDE: usize = 64;
/// Batches of one owner that have not ended, at most.
const MAX_OPEN: usize = 100;
/// Batches of one owner that are kept; beyond them the oldest that have ended are forgotten, but for their files.
const MAX_KEPT: usize = 1000;

/// All batches of a state folder.
#[derive(Debug)]
pub(crate) struct Batches {
    folder: Folder,
    all: Mutex<BTreeMap<String, Entry>>,
    /// Held while a batch is changed, in memory and on disk.
    changing: Mutex<()>,
    lines: Arc<Semaphore>,
    /// Lines that wait until there is room for them, beside those.
    asides: Arc<Semaphore>,
    /// One input is checked at a time.
    checking: Semaphore,
    /// Batches that run.
    running: Counter,
    resumed: Mutex<bool>,
}

#[derive(Debug, Clone)]
struct Entry {
    owner: Owner,
    batch: Batch,
    /// Asks the run to stop for good.
    cancel: CancellationToken,
}

impl Batches {
    /// The batches of a folder.
    pub fn open(folder: Folder) -> io::Result<Self> {
        let entry = |(id, owner, batch)| (id, Entry { owner, batch, cancel: CancellationToken::new() });
        let all = folder.all::<Batch>()?.into_iter().map(entry).collect();
        Ok(Self {
            folder,
            all: Mutex::new(all),
            changing: Mutex::new(()),
            lines: Arc::new(Semaphore::new(LINES_AT_ONCE)),
            asides: Arc::new(Semaphore::new(LINES_ASIDE)),
            checking: Semaphore::new(1),
            running: Counter::default(),
            resumed: Mutex::new(false),
        })
    }

    /// The files of results that batches still write.
    pub fn unfinished_results(&self) -> HashSet<String> {
        let all = self.all.lock();
        let open = all.values().filter(|entry| !entry.batch.status.is_final());
        open.flat_map(|entry| [entry.batch.output_file_id.clone(), entry.batch.error_file_id.clone()]).collect()
    }

    /// Whether a batch that has not ended reads or writes this file.
    pub fn uses(&self, file: &str) -> bool {
        let of =
            |batch: &Batch| [&batch.input_file_id, &batch.output_file_id, &batch.error_file_id].map(|id| id == file);
        self.all.lock().values().any(|entry| !entry.batch.status.is_final() && of(&entry.batch).contains(&true))
    }

    /// A batch of this owner.
    pub fn get(&self, id: &str, owner: Owner) -> Result<BatchObject, ApiError> {
        let all = self.all.lock();
        let found = all.get(id).filter(|entry| entry.owner == owner);
        found.map(|entry| entry.batch.object(id)).ok_or_else(|| ApiError::stored_not_found("batch"))
    }

    /// All batches of this owner, the newest first.
    pub fn list(&self, owner: Owner) -> Vec<BatchObject> {
        let all = self.all.lock();
        let mut own: Vec<_> = all.iter().filter(|(_, entry)| entry.owner == owner).collect();
        own.sort_by(|(a_id, a), (b_id, b)| (b.batch.created_at, b_id).cmp(&(a.batch.created_at, a_id)));
        own.into_iter().map(|(id, entry)| entry.batch.object(id)).collect()
    }

    /// Waits until no batch runs: each stops by itself when the service drains.
    pub async fn stopped(&self) {
        self.running.idle().await;
    }

    /// Whether this owner may begin another batch.
    fn check_count(&self, owner: Owner) -> Result<(), ApiError> {
        let all = self.all.lock();
        let open = all.values().filter(|entry| entry.owner == owner && !entry.batch.status.is_final()).count();
        let message = format!("at most {MAX_OPEN} batches may be under way; wait for one to end");
        if open < MAX_OPEN { Ok(()) } else { Err(ApiError::too_many(&message)) }
    }

    /// Puts a new batch on disk, and forgets the oldest of its owner that are too many.
    fn add(&self, id: String, entry: Entry) -> io::Result<()> {
        self.folder.put(&id, entry.owner, &entry.batch)?;
        let forgotten: Vec<_> = {
            let mut all = self.all.lock();
            let owner = entry.owner;
            all.insert(id, entry);
            let own = all.values().filter(|entry| entry.owner == owner).count();
            let ended = all.iter().filter(|(_, entry)| entry.owner == owner && entry.batch.status.is_final());
            let mut ended: Vec<_> = ended.map(|(id, entry)| (entry.batch.created_at, id.clone())).collect();
            ended.sort();
            ended.truncate(own.saturating_sub(MAX_KEPT));
            ended.into_iter().map(|(_, id)| id).inspect(|id| drop(all.remove(id))).collect()
        };
        forgotten.iter().try_for_each(|id| self.folder.remove(id).map(drop))
    }

    /// Changes a batch, in memory and then on disk.
    fn change(&self, id: &str, change: impl FnOnce(&mut Batch)) -> io::Result<()> {
        // What is changed last is to be on disk last, and a record has one file beside it while it is written.
        let _turn = self.changing.lock();
        let Some((owner, batch)) = self.all.lock().get_mut(id).map(|entry| {
            change(&mut entry.batch);
            (entry.owner, entry.batch.clone())
        }) else {
            return Ok(());
        };
        self.folder.put(id, owner, &batch)
    }
}
