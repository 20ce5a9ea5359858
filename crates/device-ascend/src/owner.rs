//! The thread that owns a device: it alone calls CANN. Work comes in order over a bounded channel.
//!
//! Invariants: what is submitted runs in that order. When a piece of work fails, what is submitted after it is skipped until a
//! call brings the failure to the caller; then the device goes on, if its error lets it. A caller waits no longer than the
//! device's timeout and a grace.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use baton_device::{DeviceError, Result};
use crossbeam_channel::{Receiver, Sender, bounded};

use crate::abi::codes::Class;
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

enum Job {
    /// Its failure waits for the next call.
    Submit(&'static str, Work),
    /// Gets the failure of earlier work, or nothing; answers by itself.
    Call(Box<dyn FnOnce(&mut Device, Option<Failure>) + Send>),
    /// Behind all work that may use it.
    Free(Address),
    /// Runs also behind a failure: gives back what work has taken.
    Tidy(Box<dyn FnOnce(&mut Device) + Send>),
}

/// What failed, in which operation of the seam.
#[derive(Debug, Clone)]
struct Failure {
    op: &'static str,
    error: AscendError,
}

/// A device's thread.
pub(crate) struct Owner {
    name: String,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    ended: Receiver<()>,
    patience: Duration,
    /// Set when a wait was in vain; nobody waits again.
    hung: AtomicBool,
}

impl Owner {
    /// Opens the device on a thread of its own.
    pub(crate) fn start(acl: &'static Acl, name: String, options: DeviceOptions, chip: Chip) -> Result<Self> {
        let (jobs, queue) = bounded(QUEUE);
        let (opened, opening) = bounded(1);
        let (end, ended) = bounded::<()>(0);
        let work = move || {
            let _end = end;
            match Device::open(acl, options, chip) {
                Ok(device) => {
                    let _ = opened.send(Ok(()));
                    serve(device, &queue);
                }
                Err(error) => _ = opened.send(Err(error)),
            }
        };
        let unavailable = |reason| DeviceError::Unavailable { device: name.clone(), reason };
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(work)
            .map_err(|error| unavailable(format!("no thread for it: {error}")))?;
        let patience = options.timeout + GRACE;
        match opening.recv_timeout(patience) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(unavailable(error.to_string())),
            Err(_) => return Err(unavailable(format!("it did not open within {} s", patience.as_secs()))),
        }
        Ok(Self { name, jobs: Some(jobs), thread: Some(thread), ended, patience, hung: AtomicBool::new(false) })
    }

    fn lost(&self, reason: String) -> DeviceError {
        DeviceError::Lost { device: self.name.clone(), reason }
    }

    fn send(&self, job: Job) -> Result<()> {
        let late = || self.lost(format!("its thread does not answer for {} s", self.patience.as_secs()));
        if self.hung.load(Ordering::Relaxed) {
            return Err(late());
        }
        let jobs = self.jobs.as_ref().expect("until it is dropped");
        jobs.send_timeout(job, self.patience).map_err(|error| {
            if error.is_timeout() {
                self.hung.store(true, Ordering::Relaxed);
                late()
            } else {
                self.lost("its thread has ended".into())
            }
        })
    }

    /// Queues work and returns at once.
    pub(crate) fn submit(
        &self,
        op: &'static str,
        work: impl FnOnce(&mut Device) -> std::result::Result<(), AscendError> + Send + 'static,
    ) -> Result<()> {
        self.send(Job::Submit(op, Box::new(work)))
    }

    /// Runs work behind all that is queued and waits for its result, or for that of what failed before.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        op: &'static str,
        work: impl FnOnce(&mut Device) -> std::result::Result<T, AscendError> + Send + 'static,
    ) -> Result<T> {
        let (answer, answers) = bounded(1);
        self.send(Job::Call(Box::new(move |device, earlier| {
            let result = match earlier {
                Some(failure) => Err(failure),
                None => caught(|| work(device)).map_err(|error| Failure { op, error }),
            };
            // A caller that has given up needs no answer.
            let _ = answer.send(result);
        })))?;
        match answers.recv_timeout(self.patience) {
            Ok(result) => result.map_err(|Failure { op, error }| error.into_device_error(&self.name, op)),
            Err(error) if error.is_timeout() => {
                self.hung.store(true, Ordering::Relaxed);
                Err(self.lost(format!("{op}: no answer for {} s", self.patience.as_secs())))
            }
            Err(_) => Err(self.lost(format!("{op}: its thread has ended"))),
        }
    }

    /// Gives a block back, behind all work queued before.
    pub(crate) fn free(&self, address: Address) {
        // Without its thread the device's memory is gone.
        let _ = self.send(Job::Free(address));
    }

    /// Gives back what work took on the device's thread, behind all work queued before, failed or not.
    pub(crate) fn tidy(&self, work: impl FnOnce(&mut Device) + Send + 'static) {
        // As above.
        let _ = self.send(Job::Tidy(Box::new(work)));
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.jobs = None;
        // The channel closes when the thread ends; one that hangs in the driver is left behind.
        let gone = !matches!(self.ended.recv_timeout(self.patience), Err(error) if error.is_timeout());
        if let (true, Some(thread)) = (gone, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// Takes work until nobody can send any more.
fn serve(mut device: Device, queue: &Receiver<Job>) {
    let mut failure: Option<Failure> = None;
    for job in queue {
        match job {
            Job::Submit(op, work) => {
                if failure.is_none() {
                    failure = caught(|| work(&mut device)).err().map(|error| Failure { op, error });
                }
            }
            Job::Call(work) => {
                let sticky = failure.clone().filter(|failure| is_final(failure.error.class()));
                work(&mut device, failure.take());
                // What a poisoned or lost device fails with, it fails with for ever.
                failure = sticky;
            }
            Job::Free(address) => device.free(address),
            Job::Tidy(work) => work(&mut device),
        }
    }
    device.close();
}

fn is_final(class: Class) -> bool {
    matches!(class, Class::Poisoned | Class::Lost)
}

/// A panic is a bug of ours, and no reason to leave callers waiting.
fn caught<T>(work: impl FnOnce() -> std::result::Result<T, AscendError>) -> std::result::Result<T, AscendError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text =
            panic.downcast_ref::<&str>().map(ToString::to_string).or_else(|| panic.downcast_ref::<String>().cloned());
        Err(AscendError::Gone { reason: format!("a panic: {}", text.unwrap_or_default()) })
    })
}
