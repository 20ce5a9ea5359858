//! Runs the template engine on a thread of its own.
//!
//! The engine counts its instructions and the data it makes, but it walks nested expressions and values by recursion,
//! and compares and prints shared values without counting. So it gets a stack that is deep enough for whatever its
//! other limits admit, and the caller waits only so long. A job that overruns cannot be ended; while two such are
//! still running, new ones are refused, so that no template can take more than two cores.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// Address space of a job's stack; memory is taken only as far as the stack really grows.
const STACK_BYTES: usize = 256 << 20;

/// Jobs that may still be running after their caller has gone.
const MAX_LATE: usize = 2;

/// Why there is no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Overrun {
    /// The time is up, or too many earlier jobs have overrun and still run.
    Time,
    /// The job panicked.
    Panic,
    /// No thread could be started.
    Thread,
}

const RUNNING: u8 = 0;
const DONE: u8 = 1;
const LATE: u8 = 2;

/// Counts the late jobs of whoever shares it.
#[derive(Debug, Default, Clone)]
pub(crate) struct Sandbox {
    late: Arc<AtomicUsize>,
}

impl Sandbox {
    /// Runs a job and waits for its result, at most for `limit`.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Overrun> {
        if self.late.load(Ordering::Acquire) >= MAX_LATE {
            return Err(Overrun::Time);
        }
        let (sender, receiver) = mpsc::sync_channel(1);
        let finish = Finish { state: Arc::new(AtomicU8::new(RUNNING)), late: self.late.clone() };
        let state = finish.state.clone();
        let thread = std::thread::Builder::new().name("template".into()).stack_size(STACK_BYTES);
        let spawned = thread.spawn(move || {
            let _finish = finish;
            // The caller may have gone.
            let _ = sender.send(job());
        });
        spawned.map_err(|_| Overrun::Thread)?;
        match receiver.recv_timeout(limit) {
            Ok(result) => Ok(result),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(Overrun::Panic),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                self.late.fetch_add(1, Ordering::AcqRel);
                if state.swap(LATE, Ordering::AcqRel) == DONE {
                    // It ended just now and has not seen that it was late.
                    self.late.fetch_sub(1, Ordering::AcqRel);
                }
                Err(Overrun::Time)
            }
        }
    }
}

/// Dropped when the job ends, also by a panic.
struct Finish {
    state: Arc<AtomicU8>,
    late: Arc<AtomicUsize>,
}

impl Drop for Finish {
    fn drop(&mut self) {
        if self.state.swap(DONE, Ordering::AcqRel) == LATE {
            self.late.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn a_result_comes_back_and_a_panic_is_an_error() {
        let sandbox = Sandbox::default();
        assert_eq!(sandbox.run(LONG, || 7), Ok(7));
        assert_eq!(sandbox.run(LONG, || -> u8 { std::panic::resume_unwind(Box::new("x")) }), Err(Overrun::Panic));
        assert_eq!(sandbox.late.load(Ordering::Acquire), 0);
    }

    #[test]
    fn late_jobs_are_given_up_and_block_new_ones_until_they_end() {
        let sandbox = Sandbox::default();
        let releases: Vec<_> = (0..MAX_LATE)
            .map(|_| {
                let (release, wait) = mpsc::channel::<()>();
                assert_eq!(sandbox.run(Duration::from_millis(1), move || wait.recv()), Err(Overrun::Time));
                release
            })
            .collect();
        assert_eq!(sandbox.run(LONG, || ()), Err(Overrun::Time), "refused without being started");
        drop(releases);
        while sandbox.late.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        assert_eq!(sandbox.run(LONG, || ()), Ok(()));
    }
}
