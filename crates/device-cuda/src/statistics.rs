//! Counting what is done, so that a step that allocates, waits or does not run as a graph shows.

use std::sync::atomic::{AtomicU64, Ordering};

/// What was done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Kernels and calls of libraries that were queued.
    pub launches: u64,
    /// Lists of them that ran one by one.
    pub lists: u64,
    /// Lists that ran as a graph.
    pub replays: u64,
    /// Graphs that were made.
    pub captures: u64,
    /// Copies to the device in steps.
    pub uploads: u64,
    /// Bytes of those.
    pub uploaded: u64,
    /// Copies to the host.
    pub reads: u64,
    /// Bytes of those.
    pub read: u64,
    /// Times that the host waited for what it had queued.
    pub waits: u64,
    /// Allocations of the driver.
    pub allocations: u64,
    /// Bytes of those that were not given back.
    pub allocated: u64,
}

/// [`Statistics`] while they are counted.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) launches: AtomicU64,
    pub(crate) lists: AtomicU64,
    pub(crate) replays: AtomicU64,
    pub(crate) captures: AtomicU64,
    pub(crate) uploads: AtomicU64,
    pub(crate) uploaded: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) read: AtomicU64,
    pub(crate) waits: AtomicU64,
    pub(crate) allocations: AtomicU64,
}

/// Counts.
pub(crate) fn add(counter: &AtomicU64, more: usize) {
    counter.fetch_add(more as u64, Ordering::Relaxed);
}

impl Counters {
    /// What was counted, beside what is allocated now.
    pub(crate) fn read(&self, allocated: u64) -> Statistics {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Statistics {
            launches: of(&self.launches),
            lists: of(&self.lists),
            replays: of(&self.replays),
            captures: of(&self.captures),
            uploads: of(&self.uploads),
            uploaded: of(&self.uploaded),
            reads: of(&self.reads),
            read: of(&self.read),
            waits: of(&self.waits),
            allocations: of(&self.allocations),
            allocated,
        }
    }
}
