//! The worker pool: a region of numbered tasks, run by the caller and the workers together.
//!
//! Tasks are claimed one at a time from a counter, so a worker that is late or not scheduled at all
//! delays nobody; results must not depend on who runs a task. Between regions workers spin for some
//! microseconds, because the next region of a step follows at once, then sleep.
//!
//! Invariant: a job is read only after one of its tasks was claimed, and the caller leaves
//! [`Pool::run`] only when every claimed task has ended; so the job, which lives on the caller's
//! stack, outlives every use.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::affinity::{self, Allowed};

/// Below this much work, in multiply-adds, a region is not worth waking anyone: some 10 µs of one core.
const PARALLEL_WORK: usize = 1 << 18;
const TASKS_PER_THREAD: usize = 4;
/// How long an idle worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(40);

/// Threads that share the work of one backend.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    /// Held while a region runs; a second caller runs its tasks alone.
    region: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Number of the region in the upper half, tasks not yet claimed in the lower.
    tickets: OwnLine<AtomicU64>,
    /// Tasks not yet ended.
    pending: OwnLine<AtomicUsize>,
    job: UnsafeCell<Job>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    bell: Condvar,
    closing: AtomicBool,
    /// CPUs that workers can choose from, if they can.
    allowed: Option<Allowed>,
    caller_cpu: AtomicUsize,
}

/// Kept from sharing a cache line with what other threads write.
#[repr(align(128))]
struct OwnLine<T>(T);

#[derive(Clone, Copy)]
struct Job(*const (dyn Fn(usize) + Sync));

// SAFETY: `job` is written only while no task is claimed or claimable, read only between a claim and
// the end of the claimed task, and points to a `Sync` closure; all else is atomic or locked.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads`, the caller included.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            tickets: OwnLine(AtomicU64::new(0)),
            pending: OwnLine(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job(&|_| {})),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            bed: Mutex::new(()),
            bell: Condvar::new(),
            closing: AtomicBool::new(false),
            allowed: Allowed::detect(),
            caller_cpu: AtomicUsize::new(usize::MAX),
        });
        let mut pool = Self { shared, region: Mutex::new(()), workers: Vec::new() };
        for i in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new().name(format!("baton-cpu-{i}"));
            pool.workers.push(worker.spawn(move || shared.work())?);
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// How many of `items` a task should take, where all together are `work`: all if it is little, else
    /// so many that each thread finds some tasks and a late thread holds up little.
    pub(crate) fn share(&self, items: usize, work: usize) -> usize {
        let tasks = if work < PARALLEL_WORK || self.workers.is_empty() { 1 } else { TASKS_PER_THREAD * self.threads() };
        items.div_ceil(tasks).max(1)
    }

    /// Runs `task(0)`, …, `task(tasks - 1)` in any order, and returns when all have ended. `work` is
    /// the multiply-adds of all of them together; little work is done by the caller alone.
    ///
    /// # Panics
    /// With the panic of a task, after the other tasks have ended.
    pub(crate) fn run(&self, tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
        if tasks < 2 || work < PARALLEL_WORK || self.workers.is_empty() {
            return (0..tasks).for_each(task);
        }
        let _region = match self.region.try_lock() {
            Ok(region) => region,
            Err(TryLockError::Poisoned(region)) => region.into_inner(),
            Err(TryLockError::WouldBlock) => return (0..tasks).for_each(task),
        };
        self.shared.run(u32::try_from(tasks).expect("fewer than 2³² tasks"), &task);
    }
}

impl Pool {
    /// Calls `f` with every item and its number, as tasks of one region; `work` is that of all of them.
    pub(crate) fn each<T: Send>(&self, items: impl Iterator<Item = T>, work: usize, f: impl Fn(usize, T) + Sync) {
        let items: Vec<_> = items.map(|item| Mutex::new(Some(item))).collect();
        self.run(items.len(), work, |i| f(i, lock(&items[i]).take().expect("a task runs once")));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.closing.store(true, SeqCst);
        self.shared.ring();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks, so it has none of its own to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn run(&self, tasks: u32, task: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes, and no use outlives this call (see the invariant).
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        // SAFETY: the last region has ended and this one is not yet open, so nobody reads.
        unsafe { *self.job.get() = Job(task) };
        self.pending.0.store(tasks as usize, SeqCst);
        if self.allowed.is_some() {
            self.caller_cpu.store(affinity::current(), SeqCst);
        }
        let number = (self.tickets.0.load(SeqCst) >> 32) as u32;
        self.tickets.0.store(u64::from(number.wrapping_add(1)) << 32 | u64::from(tasks), SeqCst);
        if self.sleepers.load(SeqCst) > 0 {
            self.ring();
        }
        while self.claim_and_run() {}
        let start = Instant::now();
        while self.pending.0.load(SeqCst) > 0 {
            if start.elapsed() < SPIN { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if let Some(panic) = lock(&self.panic).take() {
            resume_unwind(panic);
        }
    }

    /// Runs one task if one is left.
    fn claim_and_run(&self) -> bool {
        let mut tickets = self.tickets.0.load(SeqCst);
        let task = loop {
            let unclaimed = tickets as u32;
            if unclaimed == 0 {
                return false;
            }
            match self.tickets.0.compare_exchange_weak(tickets, tickets - 1, SeqCst, SeqCst) {
                Ok(_) => break unclaimed as usize - 1,
                Err(now) => tickets = now,
            }
        };
        // SAFETY: a task of the current region is claimed and not ended, so its job is in place and alive.
        let job = unsafe { &*(*self.job.get()).0 };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(task))) {
            lock(&self.panic).get_or_insert(panic);
        }
        self.pending.0.fetch_sub(1, SeqCst);
        true
    }

    /// The life of a worker.
    fn work(&self) {
        let mut idle_since = Instant::now();
        while !self.closing.load(SeqCst) {
            self.leave_the_callers_cpu();
            if self.claim_and_run() {
                idle_since = Instant::now();
            } else if idle_since.elapsed() < SPIN {
                std::hint::spin_loop();
            } else {
                self.sleep();
                idle_since = Instant::now();
            }
        }
    }

    /// Before work that the caller could do meanwhile.
    fn leave_the_callers_cpu(&self) {
        let Some(allowed) = &self.allowed else { return };
        if self.tickets.0.load(SeqCst) as u32 > 0 {
            let cpu = affinity::current();
            if cpu == self.caller_cpu.load(SeqCst) {
                allowed.leave(cpu);
            }
        }
    }

    /// Sleeps until a region opens or the pool closes. The opener publishes, then reads `sleepers`;
    /// a sleeper counts itself, then reads what is published: one of the two sees the other.
    fn sleep(&self) {
        let mut bed = lock(&self.bed);
        self.sleepers.fetch_add(1, SeqCst);
        while self.tickets.0.load(SeqCst) as u32 == 0 && !self.closing.load(SeqCst) {
            bed = self.bell.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, SeqCst);
    }

    fn ring(&self) {
        let _bed = lock(&self.bed);
        self.bell.notify_all();
    }
}

/// Nothing is ever left half-done under these locks, so poison means nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slice whose disjoint parts are written by the tasks of one region.
pub(crate) struct Disjoint<'a> {
    start: *mut f32,
    len: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it hands out parts by the contract of `part` only, and f32 may be written from any thread.
unsafe impl Sync for Disjoint<'_> {}

impl<'a> Disjoint<'a> {
    pub(crate) fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// The same slice once more; the obligation of `part` spans both.
    pub(crate) fn again(&self) -> Disjoint<'_> {
        Disjoint { ..*self }
    }

    /// One part.
    ///
    /// # Safety
    /// No other part that overlaps it is alive.
    #[allow(clippy::mut_from_ref)] // what this type is for
    #[inline(always)]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: within the borrowed slice; that nobody else has it is the caller's obligation.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MUCH: usize = PARALLEL_WORK;

    #[test]
    fn every_task_runs_exactly_once_in_every_region() {
        for threads in 1..5 {
            let pool = Pool::new(threads).unwrap();
            for tasks in [0, 1, 2, 7, 100] {
                for _ in 0..50 {
                    let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, MUCH, |t| {
                        runs[t].fetch_add(1, SeqCst);
                    });
                    assert!(runs.iter().all(|r| r.load(SeqCst) == 1));
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_and_a_dropped_pool_ends_them() {
        let pool = Pool::new(3).unwrap();
        while pool.shared.sleepers.load(SeqCst) < 2 {
            std::thread::yield_now();
        }
        // Two tasks that wait for each other need a second thread.
        let met = std::sync::Barrier::new(2);
        pool.run(2, MUCH, |_| {
            met.wait();
        });
        drop(pool);
    }

    #[test]
    fn a_panic_in_any_task_reaches_the_caller_and_the_pool_stays_usable() {
        let pool = Pool::new(2).unwrap();
        for bad in 0..4 {
            let outcome = catch_unwind(AssertUnwindSafe(|| pool.run(4, MUCH, |t| assert_ne!(t, bad, "task {t}"))));
            let panic = outcome.expect_err("the panic of the task");
            assert!(panic.downcast_ref::<String>().unwrap().contains(&format!("task {bad}")));
        }
        let sum = AtomicUsize::new(0);
        pool.run(10, MUCH, |t| {
            sum.fetch_add(t, SeqCst);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn callers_at_the_same_time_and_nested_regions_all_finish() {
        let pool = Pool::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(4, MUCH, |_| {
                            pool.run(3, MUCH, |_| {
                                sum.fetch_add(1, SeqCst);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 3 * 100 * 4 * 3);
    }
}
