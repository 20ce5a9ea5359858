//! The thread that owns a device: it alone calls CANN. Work comes in order over a bounded channel.
//!
//! Invariants: what is submitted runs in that order. When a piece of work fails, what the same thread submitted after it is
//! skipped until a call of that thread brings the failure to it; then the device goes on, if its error lets it. A caller gives up when no work was
//! done for as long as the device's timeout and a grace. What the device has collected is of one thread: it goes to the stream
//! before other work does, and before any call is answered.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

use baton_device::{DeviceError, Result};
use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};

use crate::abi::operators::Operators;
use crate::chip::Chip;
use crate::device::{Device, DeviceOptions};
use crate::error::AscendError;
use crate::libraries::Acl;
use crate::object::Address;

/// Pieces of work that may wait; more make the caller wait.
const QUEUE: usize = 4096;
/// How much longer than the device's own timeout a caller waits: the driver itself may hang.
const GRACE: Duration = Duration::from_secs(5);

type Work = Box<dyn FnOnce(&mut Device) -> std::result::Result<(), AscendError> + Send>;

type Answered = Box<dyn FnOnce(&mut Device, Option<Failure>) -> Option<Failure> + Send>;

enum Job {
    /// Its failure waits for the next call of the thread: whoever else uses the device meanwhile has nothing to do with it.
    Submit(ThreadId, &'static str, Work),
    /// Gets the failure of the thread's earlier work, or nothing; answers by itself, and gives its failure.
    Call(ThreadId, Answered),
    /// Behind all work that may use it.
    Free(Address),
    /// Runs also behind a failure: gives back what work has taken.
    Tidy(Box<dyn FnOnce(&mut Device) + Send>),
}

impl Job {
    /// Whether what the thread's work collected must go to the stream before this.
    fn ends_piece_of(&self, thread: ThreadId) -> bool {
        match self {
            Job::Submit(other, ..) => *other != thread,
            Job::Call(..) => true,
            Job::Free(_) | Job::Tidy(_) => false,
        }
    }
}

/// What failed, in which operation of the seam.
#[derive(Debug, Clone)]
struct Failure {
    op: &'static str,
    error: AscendError,
}

/// What came of waiting.
enum Waited<T> {
    Done(T),
    Late,
    Ended,
}

/// A device's thread.
pub(crate) struct Owner {
    acl: &'static Acl,
    name: String,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    ended: Receiver<()>,
    patience: Duration,
    /// Jobs done. A caller gives up only if there was none for as long as its patience lasts.
    served: Arc<AtomicU64>,
    /// Set when a wait was in vain; nobody waits again.
    hung: AtomicBool,
    /// Why the device makes no graphs, once there is a reason.
    objection: Arc<OnceLock<String>>,
}

impl Owner {
    /// Opens the device on a thread of its own. It makes graphs if there is no objection.
    pub(crate) fn start(
        acl: &'static Acl,
        name: String,
        options: DeviceOptions,
        chip: Chip,
        objection: Option<String>,
    ) -> Result<Self> {
        let objection = Arc::new(objection.map_or_else(OnceLock::new, OnceLock::from));
        let noted = objection.clone();
        let (jobs, queue) = bounded(QUEUE);
        let (opened, opening) = bounded(1);
        let (end, ended) = bounded::<()>(0);
        let served = Arc::new(AtomicU64::new(0));
        let count = served.clone();
        let work = move || {
            let _end = end;
            match Device::open(acl, options, chip, noted) {
                Ok(device) => {
                    let _ = opened.send(Ok(()));
                    serve(device, &queue, &count);
                }
                Err(error) => _ = opened.send(Err(error)),
            }
        };
        let unavailable = |reason| DeviceError::Unavailable { device: name.clone(), reason };
        let thread = thread::Builder::new()
            .name(name.clone())
            .spawn(work)
            .map_err(|error| unavailable(format!("no thread for it: {error}")))?;
        let patience = options.timeout + GRACE;
        match opening.recv_timeout(patience) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(unavailable(error.to_string())),
            Err(_) => return Err(unavailable(format!("it did not open within {} s", patience.as_secs()))),
        }
        Ok(Self {
            acl,
            name,
            jobs: Some(jobs),
            thread: Some(thread),
            ended,
            patience,
            served,
            hung: AtomicBool::new(false),
            objection,
        })
    }

    /// Why no graphs are made, or not any more, once all is done that was queued before but what is still collected.
    pub(crate) fn objection(&self) -> Option<&str> {
        let (done, answer) = bounded(1);
        // Not a call: a failure that waits for one is not for whoever asks this.
        self.tidy(move |_| _ = done.send(()));
        let _ = self.patiently("objection", |patience| match answer.recv_timeout(patience) {
            Err(RecvTimeoutError::Timeout) => Waited::Late,
            _ => Waited::Done(()),
        });
        self.objection.get().map(String::as_str)
    }

    pub(crate) fn operators(&self) -> &'static Operators {
        &self.acl.operators
    }

    fn lost(&self, reason: String) -> DeviceError {
        DeviceError::Lost { device: self.name.clone(), reason }
    }

    /// Tries until it goes well, the other side ends, or no job was done for as long as patience lasts; then nobody tries
    /// again.
    fn patiently<T>(&self, op: &str, mut attempt: impl FnMut(Duration) -> Waited<T>) -> Result<T> {
        let late = || self.lost(format!("{op}: its thread does not answer for {} s", self.patience.as_secs_f32()));
        if self.hung.load(Ordering::Relaxed) {
            return Err(late());
        }
        loop {
            let before = self.served.load(Ordering::Relaxed);
            match attempt(self.patience) {
                Waited::Done(value) => return Ok(value),
                Waited::Ended => return Err(self.lost(format!("{op}: its thread has ended"))),
                Waited::Late if self.served.load(Ordering::Relaxed) == before => {
                    self.hung.store(true, Ordering::Relaxed);
                    return Err(late());
                }
                Waited::Late => {}
            }
        }
    }

    fn send(&self, op: &'static str, job: Job) -> Result<()> {
        let jobs = self.jobs.as_ref().expect("until it is dropped");
        let mut job = Some(job);
        self.patiently(op, |patience| match jobs.send_timeout(job.take().expect("not sent yet"), patience) {
            Ok(()) => Waited::Done(()),
            Err(SendTimeoutError::Disconnected(_)) => Waited::Ended,
            Err(SendTimeoutError::Timeout(back)) => {
                job = Some(back);
                Waited::Late
            }
        })
    }

    /// Queues work and returns at once.
    pub(crate) fn submit(
        &self,
        op: &'static str,
        work: impl FnOnce(&mut Device) -> std::result::Result<(), AscendError> + Send + 'static,
    ) -> Result<()> {
        self.send(op, Job::Submit(thread::current().id(), op, Box::new(work)))
    }

    /// Runs work behind all that is queued and waits for its result, or for that of what failed before.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        op: &'static str,
        work: impl FnOnce(&mut Device) -> std::result::Result<T, AscendError> + Send + 'static,
    ) -> Result<T> {
        let (answer, answers) = bounded(1);
        let job = move |device: &mut Device, earlier| {
            let result = match earlier {
                Some(failure) => Err(failure),
                None => caught(|| work(device)).map_err(|error| Failure { op, error }),
            };
            let failure = result.as_ref().err().cloned();
            // A caller that has given up needs no answer.
            let _ = answer.send(result);
            failure
        };
        self.send(op, Job::Call(thread::current().id(), Box::new(job)))?;
        let result = self.patiently(op, |patience| match answers.recv_timeout(patience) {
            Ok(result) => Waited::Done(result),
            Err(RecvTimeoutError::Disconnected) => Waited::Ended,
            Err(RecvTimeoutError::Timeout) => Waited::Late,
        })?;
        result.map_err(|Failure { op, error }| error.into_device_error(&self.name, op))
    }

    /// Disconnected when the thread has ended.
    #[cfg(test)]
    pub(crate) fn ended(&self) -> Receiver<()> {
        self.ended.clone()
    }

    /// Gives a block back, behind all work queued before.
    pub(crate) fn free(&self, address: Address) {
        // Without its thread the device's memory is gone.
        let _ = self.send("free", Job::Free(address));
    }

    /// Gives back what work took on the device's thread, behind all work queued before, failed or not.
    pub(crate) fn tidy(&self, work: impl FnOnce(&mut Device) + Send + 'static) {
        // As above.
        let _ = self.send("tidy", Job::Tidy(Box::new(work)));
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.jobs = None;
        // The channel closes when the thread ends; one that hangs in the driver is left behind.
        let wait = |patience| match self.ended.recv_timeout(patience) {
            Err(RecvTimeoutError::Timeout) => Waited::Late,
            _ => Waited::Done(()),
        };
        if let (Ok(()), Some(thread)) = (self.patiently("close", wait), self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// Takes work until nobody can send any more.
fn serve(mut device: Device, queue: &Receiver<Job>, served: &AtomicU64) {
    let mut failures: HashMap<ThreadId, Failure> = HashMap::new();
    // What a poisoned or lost device fails with, it fails with for ever, and for everybody.
    let mut end: Option<Failure> = None;
    // Whose the device's piece is.
    let mut collected: Option<(ThreadId, &'static str)> = None;
    for job in queue {
        if let Some((thread, op)) = collected
            && job.ends_piece_of(thread)
        {
            collected = None;
            let failure = caught(|| device.end_piece()).err().map(|error| Failure { op, error });
            failures.extend(failure.clone().map(|failure| (thread, failure)));
            end = end.or(failure.filter(|failure| failure.error.class().is_final()));
        }
        let failure = match job {
            Job::Submit(thread, op, work) if end.is_none() && !failures.contains_key(&thread) => {
                let failure = caught(|| work(&mut device)).err().map(|error| Failure { op, error });
                if failure.is_some() {
                    device.pieces.forget();
                }
                collected = device.pieces.is_pending().then_some((thread, op));
                failures.extend(failure.clone().map(|failure| (thread, failure)));
                failure
            }
            Job::Submit(..) => None,
            Job::Call(thread, work) => work(&mut device, failures.remove(&thread).or_else(|| end.clone())),
            Job::Free(address) => {
                device.free(address);
                None
            }
            Job::Tidy(work) => {
                work(&mut device);
                None
            }
        };
        end = end.or(failure.filter(|failure| failure.error.class().is_final()));
        served.fetch_add(1, Ordering::Relaxed);
    }
    device.close();
}

/// A panic is a bug of ours, and no reason to leave callers waiting.
fn caught<T>(work: impl FnOnce() -> std::result::Result<T, AscendError>) -> std::result::Result<T, AscendError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text =
            panic.downcast_ref::<&str>().map(ToString::to_string).or_else(|| panic.downcast_ref::<String>().cloned());
        Err(AscendError::Gone { reason: format!("a panic: {}", text.unwrap_or_default()) })
    })
}
