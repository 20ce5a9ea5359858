//! The worker pool: a region of numbered tasks, run by the caller and the workers together.
//!
//! Tasks are claimed one at a time from a counter, so a worker that is late or not scheduled at all
//! delays nobody; results must not depend on who runs a task. There is a counter for each memory node:
//! threads take the tasks of their own node first, then help the others (see [`crate::topology`]).
//! Between regions workers spin for some microseconds, because the next region of a step follows at once, then sleep.
//!
//! On a busy machine a scheduler does two things that would make a region slower than the caller alone. It wakes a
//! worker beside the caller and leaves it there for good: a worker that finds itself on the caller's CPU leaves it. And
//! it takes a worker with a claimed task off its CPU, for milliseconds: a caller that has nothing else to do brings it
//! to its own.
//!
//! Invariant: a job is read only after one of its tasks was claimed, and the caller leaves
//! [`Pool::run`] only when every claimed task has ended; so the job, which lives on the caller's
//! stack, outlives every use.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::affinity::{self, Thread};
use crate::topology::{Topology, share};

/// Below this much work, in multiply-adds, a region is not worth waking anyone: some 10 µs of one core.
const PARALLEL_WORK: usize = 1 << 18;
const TASKS_PER_THREAD: usize = 4;
/// How long an idle worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(40);
/// A worker with a task whose processor time stands still for so long is off its CPU.
const LATE: Duration = Duration::from_micros(100);

/// Threads that share the work of one backend.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    /// Held while a region runs; a second caller runs its tasks alone.
    region: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// By node: number of the region in the upper half, tasks not yet claimed in the lower.
    tickets: Vec<OwnLine<AtomicU64>>,
    /// Tasks not yet ended.
    pending: OwnLine<AtomicUsize>,
    job: OwnLine<UnsafeCell<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    bell: Condvar,
    closing: AtomicBool,
    topology: Topology,
    /// Threads of all nodes up to each.
    ends: Vec<usize>,
    caller_cpu: OwnLine<AtomicUsize>,
    seats: Vec<OwnLine<Seat>>,
}

/// What the caller knows of a worker.
struct Seat {
    node: usize,
    /// Its thread while it has a task, else one of the values below.
    busy: AtomicI32,
    /// Its processor time when the caller last looked, in ns.
    seen: AtomicU64,
}

/// A seat's worker has no task.
const IDLE: Thread = 0;
/// It has one, and was brought to the caller's CPU.
const BROUGHT: Thread = -1;

/// Kept from sharing a cache line with what other threads write.
#[repr(align(128))]
struct OwnLine<T>(T);

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: `job` is written only while no task is claimed or claimable, read only between a claim and
// the end of the claimed task, and points to a `Sync` closure; all else is atomic or locked.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads`, the caller included.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        Self::on(Topology::detect(), threads)
    }

    fn on(topology: Topology, threads: usize) -> std::io::Result<Self> {
        let homes = topology.homes(threads);
        let seat = |&node| OwnLine(Seat { node, busy: AtomicI32::new(IDLE), seen: AtomicU64::new(0) });
        let shared = Arc::new(Shared {
            tickets: (0..topology.nodes()).map(|_| OwnLine(AtomicU64::new(0))).collect(),
            pending: OwnLine(AtomicUsize::new(0)),
            job: OwnLine(UnsafeCell::new(Job { task: &|_| {}, tasks: 0 })),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            bed: Mutex::new(()),
            bell: Condvar::new(),
            closing: AtomicBool::new(false),
            ends: (0..topology.nodes()).map(|node| homes.partition_point(|&home| home <= node)).collect(),
            topology,
            caller_cpu: OwnLine(AtomicUsize::new(usize::MAX)),
            seats: homes.iter().skip(1).map(seat).collect(),
        });
        let mut pool = Self { shared, region: Mutex::new(()), workers: Vec::new() };
        for i in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new().name(format!("baton-cpu-{i}"));
            pool.workers.push(worker.spawn(move || shared.work(&shared.seats[i - 1].0))?);
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
        unsafe { *self.job.0.get() = Job { task, tasks: tasks as usize } };
        self.pending.0.store(tasks as usize, SeqCst);
        let cpu = affinity::current();
        self.caller_cpu.0.store(cpu, SeqCst);
        for (node, tickets) in self.tickets.iter().enumerate() {
            let number = (tickets.0.load(SeqCst) >> 32) as u32;
            let tasks = share(&self.ends, tasks as usize, node).len();
            tickets.0.store(u64::from(number.wrapping_add(1)) << 32 | tasks as u64, SeqCst);
        }
        if self.sleepers.load(SeqCst) > 0 {
            self.ring();
        }
        let node = self.topology.node_of(cpu);
        while let Some(task) = self.claim(node) {
            self.run_task(task);
            self.pending.0.fetch_sub(1, SeqCst);
        }
        self.wait();
        if let Some(panic) = lock(&self.panic).take() {
            resume_unwind(panic);
        }
    }

    /// A task of this node if one is left, else of another.
    fn claim(&self, node: usize) -> Option<usize> {
        let nodes = self.tickets.len();
        (node..node + nodes).find_map(|node| {
            let (node, tickets) = (node % nodes, &self.tickets[node % nodes].0);
            let mut now = tickets.load(SeqCst);
            loop {
                let left = now as u32 as usize;
                if left == 0 {
                    return None;
                }
                match tickets.compare_exchange_weak(now, now - 1, SeqCst, SeqCst) {
                    Ok(_) => {
                        // SAFETY: a task of the current region is claimed and not ended, so its job is in place.
                        let tasks = unsafe { (*self.job.0.get()).tasks };
                        return Some(share(&self.ends, tasks, node).start + left - 1);
                    }
                    Err(other) => now = other,
                }
            }
        })
    }

    /// Runs a claimed task, which the caller of this then counts as ended.
    fn run_task(&self, task: usize) {
        // SAFETY: a task of the current region is claimed and not ended, so its job is in place and alive.
        let job = unsafe { &*(*self.job.0.get()).task };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(task))) {
            lock(&self.panic).get_or_insert(panic);
        }
    }

    /// Waits until every claimed task has ended.
    fn wait(&self) {
        let (start, mut late) = (Instant::now(), LATE);
        while self.pending.0.load(SeqCst) > 0 {
            let waited = start.elapsed();
            if waited < SPIN {
                std::hint::spin_loop();
                continue;
            }
            if waited > late {
                late = waited + LATE;
                self.bring_a_late_worker();
            }
            std::thread::yield_now();
        }
    }

    /// Moves a worker that has a task, but no CPU, to the caller's.
    fn bring_a_late_worker(&self) {
        for OwnLine(seat) in &self.seats {
            let thread = seat.busy.load(SeqCst);
            if thread <= IDLE || self.topology.cpus(seat.node).is_empty() {
                continue;
            }
            let time = affinity::processor_time(thread).as_nanos() as u64;
            if seat.seen.swap(time, SeqCst) == time {
                affinity::confine(thread, [affinity::current()].into_iter());
                if seat.busy.compare_exchange(thread, BROUGHT, SeqCst, SeqCst).is_err() {
                    // It has ended the task meanwhile and does not know that it was moved.
                    self.confine_to_home(thread, seat);
                }
                return;
            }
        }
    }

    fn confine_to_home(&self, thread: Thread, seat: &Seat) {
        affinity::confine(thread, self.topology.cpus(seat.node).iter().copied());
    }

    /// The life of a worker.
    fn work(&self, seat: &Seat) {
        let thread = affinity::this_thread();
        if self.topology.nodes() > 1 {
            self.confine_to_home(thread, seat);
        }
        let mut idle_since = Instant::now();
        while !self.closing.load(SeqCst) {
            self.leave_the_callers_cpu(thread, seat);
            if let Some(task) = self.claim(seat.node) {
                seat.busy.store(thread, SeqCst);
                self.run_task(task);
                if seat.busy.swap(IDLE, SeqCst) == BROUGHT {
                    self.confine_to_home(thread, seat);
                }
                self.pending.0.fetch_sub(1, SeqCst);
                idle_since = Instant::now();
            } else if idle_since.elapsed() < SPIN {
                std::hint::spin_loop();
            } else {
                self.sleep();
                idle_since = Instant::now();
            }
        }
    }

    /// Whether a task is left to be claimed.
    fn open(&self) -> bool {
        self.tickets.iter().any(|tickets| tickets.0.load(SeqCst) as u32 > 0)
    }

    /// Before work that the caller could do meanwhile.
    fn leave_the_callers_cpu(&self, thread: Thread, seat: &Seat) {
        if self.open() {
            let cpu = affinity::current();
            if cpu == self.caller_cpu.0.load(SeqCst) {
                let others = self.topology.cpus(seat.node).iter().copied().filter(|&other| other != cpu);
                affinity::confine(thread, others);
            }
        }
    }

    /// Sleeps until a region opens or the pool closes. The opener publishes, then reads `sleepers`;
    /// a sleeper counts itself, then reads what is published: one of the two sees the other.
    fn sleep(&self) {
        let mut bed = lock(&self.bed);
        self.sleepers.fetch_add(1, SeqCst);
        while !self.open() && !self.closing.load(SeqCst) {
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
    fn tasks_of_several_memory_nodes_run_exactly_once_whoever_comes() {
        let cpus = affinity::allowed();
        // The same CPUs, told to be two nodes; then three, one of them without a thread.
        for (nodes, threads) in [(2, 2), (2, 4), (3, 2)] {
            let all: Vec<String> = cpus.iter().map(ToString::to_string).collect();
            let topology = Topology::new(&cpus, &vec![all.join(","); nodes]);
            assert_eq!(topology.nodes(), nodes);
            let pool = Pool::on(topology, threads).unwrap();
            for tasks in [2, 3, 64] {
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
    fn a_worker_that_holds_a_task_but_no_processor_is_brought_to_the_caller_and_goes_home() {
        let pool = Pool::new(2).unwrap();
        let seat = &pool.shared.seats[0].0;
        let (caller, brought) = (std::thread::current().id(), AtomicBool::new(false));
        // The worker sleeps, which to its processor time is the same as being taken off.
        let met = std::sync::Barrier::new(2);
        pool.run(2, MUCH, |_| {
            met.wait();
            if std::thread::current().id() != caller {
                let start = Instant::now();
                while !brought.load(SeqCst) && start.elapsed() < Duration::from_secs(60) {
                    std::thread::sleep(Duration::from_millis(5));
                    brought.store(seat.busy.load(SeqCst) == BROUGHT, SeqCst);
                }
            }
        });
        assert_eq!(brought.into_inner(), cfg!(target_os = "linux"));
        assert_eq!(seat.busy.load(SeqCst), IDLE);
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
