//! Device memory in segments, from which blocks are cut and into which they melt back, and the pinned host memory through
//! which copies go.
//!
//! Invariants: all work is on one stream, so a block that is given back may be handed out at once: whoever gets it is
//! ordered behind whoever had it. A block starts on a 512-byte boundary of its segment and has 32 bytes behind its end, since
//! some kernels read past it. Free neighbours of one segment are one block. Pinned memory is reused only when the stream was
//! synchronised since.

use std::collections::{BTreeMap, BTreeSet};

use crate::object::Address;

/// Bytes behind a block that a kernel may read.
const TAIL: usize = 32;
/// Blocks are multiples of this: satisfies every alignment that operators ask for.
const GRAIN: usize = 512;
/// Blocks below [`LARGE`] share segments of this many bytes.
const SEGMENT: usize = 32 << 20;
/// What is at least this large gets a segment of its own.
const LARGE: usize = 8 << 20;
/// The runtime's large pages.
const PAGE: usize = 2 << 20;

/// How much memory there is and was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes of blocks in use.
    pub used: usize,
    /// The most that `used` was.
    pub peak: usize,
    /// Bytes that the device gave, in use or free.
    pub reserved: usize,
    /// Times that the device was asked.
    pub requests: usize,
}

/// Segments, and the blocks in them.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    /// What the device gave.
    segments: BTreeMap<usize, usize>,
    /// Address and size of free blocks, and the same by size.
    free: BTreeMap<usize, usize>,
    by_size: BTreeSet<(usize, usize)>,
    used: BTreeMap<usize, usize>,
    usage: MemoryUse,
}

impl Pool {
    /// Bytes of a block for `len`.
    pub(crate) fn block_bytes(len: usize) -> usize {
        (len.max(1) + TAIL).next_multiple_of(GRAIN)
    }

    /// Bytes to ask the device for when no free block has `bytes`; `bytes` themselves will do as well.
    pub(crate) fn segment_bytes(bytes: usize) -> usize {
        if bytes < LARGE { SEGMENT } else { bytes.next_multiple_of(PAGE) }
    }

    pub(crate) fn usage(&self) -> MemoryUse {
        self.usage
    }

    /// The smallest free block of at least `bytes`, cut to size.
    pub(crate) fn take(&mut self, bytes: usize) -> Option<Address> {
        let &(_, start) = self.by_size.range((bytes, 0)..).next()?;
        self.take_at(Address(start), bytes);
        Some(Address(start))
    }

    /// The first `bytes` of a free block.
    pub(crate) fn take_at(&mut self, Address(start): Address, bytes: usize) {
        let size = self.free[&start];
        self.remove_free(start, size);
        if size > bytes {
            self.insert_free(start + bytes, size - bytes);
        }
        self.used.insert(start, bytes);
        self.usage.used += bytes;
        self.usage.peak = self.usage.peak.max(self.usage.used);
    }

    /// Enters a segment that the device gave.
    pub(crate) fn adopt(&mut self, Address(start): Address, bytes: usize) {
        self.segments.insert(start, bytes);
        self.usage.reserved += bytes;
        self.usage.requests += 1;
        self.insert_free(start, bytes);
    }

    /// Takes a block back.
    pub(crate) fn give_back(&mut self, Address(mut start): Address) {
        let mut bytes = self.used.remove(&start).expect("a block is given back once");
        self.usage.used -= bytes;
        // Segments may touch; what is on the other side of such a border is no neighbour.
        let behind = start + bytes;
        if let Some(&size) = self.free.get(&behind).filter(|_| !self.segments.contains_key(&behind)) {
            self.remove_free(behind, size);
            bytes += size;
        }
        if let Some((&before, &size)) = self.free.range(..start).next_back()
            && before + size == start
            && !self.segments.contains_key(&start)
        {
            self.remove_free(before, size);
            (start, bytes) = (before, bytes + size);
        }
        self.insert_free(start, bytes);
    }

    /// Removes all segments that are wholly free, for the device.
    pub(crate) fn drain_free(&mut self) -> Vec<Address> {
        let whole =
            |(start, bytes): (&usize, &usize)| (self.free.get(start) == Some(bytes)).then_some((*start, *bytes));
        let segments: Vec<_> = self.segments.iter().filter_map(whole).collect();
        for &(start, bytes) in &segments {
            self.segments.remove(&start);
            self.remove_free(start, bytes);
            self.usage.reserved -= bytes;
        }
        segments.into_iter().map(|(start, _)| Address(start)).collect()
    }

    /// Removes all segments, for the device.
    pub(crate) fn drain(&mut self) -> Vec<Address> {
        std::mem::take(self).segments.into_keys().map(Address).collect()
    }

    fn insert_free(&mut self, start: usize, bytes: usize) {
        self.free.insert(start, bytes);
        self.by_size.insert((bytes, start));
    }

    fn remove_free(&mut self, start: usize, bytes: usize) {
        self.free.remove(&start);
        self.by_size.remove(&(bytes, start));
    }
}

/// Page-locked host memory, handed out from the front until it is reset.
#[derive(Debug)]
pub(crate) struct Pinned {
    start: *mut u8,
    len: usize,
    used: usize,
}

impl Pinned {
    /// Bytes of the arena; a copy takes at most half of them at once.
    pub(crate) const BYTES: usize = 16 << 20;

    /// No memory.
    pub(crate) const NONE: Self = Self { start: std::ptr::null_mut(), len: 0, used: 0 };

    /// # Safety
    /// `start` are `len` bytes of page-locked memory that live as long as this and belong to nobody else.
    pub(crate) unsafe fn new(start: *mut u8, len: usize) -> Self {
        Self { start, len, used: 0 }
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start
    }

    /// `len` bytes that nothing in flight uses; `None` if the stream must be synchronised first.
    pub(crate) fn take(&mut self, len: usize) -> Option<*mut u8> {
        let start = self.used.next_multiple_of(64);
        if start + len > self.len {
            return None;
        }
        self.used = start + len;
        // SAFETY: inside the arena.
        Some(unsafe { self.start.add(start) })
    }

    /// Everything may be used again: nothing is in flight.
    pub(crate) fn reset(&mut self) {
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_in_use_never_overlap_and_all_memory_comes_back_whatever_the_order() {
        let mut pool = Pool::default();
        // Two segments that touch, and one apart.
        for (start, bytes) in [(1 << 20, 64 * GRAIN), ((1 << 20) + 64 * GRAIN, 32 * GRAIN), (1 << 30, 16 * GRAIN)] {
            pool.adopt(Address(start), bytes);
        }
        let mut live: Vec<(usize, usize)> = Vec::new();
        let mut random = 1u64;
        for _ in 0..5000 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let value = (random >> 33) as usize;
            if value % 5 < 3 {
                let bytes = Pool::block_bytes(value % (9 * GRAIN));
                if let Some(Address(start)) = pool.take(bytes) {
                    assert!(start.is_multiple_of(GRAIN));
                    let apart = |&(other, len): &(usize, usize)| other + len <= start || start + bytes <= other;
                    assert!(live.iter().all(apart), "{start:#x} overlaps");
                    let segment = |(first, len): (&usize, &usize)| *first <= start && start + bytes <= first + len;
                    assert!(pool.segments.iter().any(segment), "{start:#x} leaves its segment");
                    live.push((start, bytes));
                }
            } else if !live.is_empty() {
                pool.give_back(Address(live.swap_remove(value % live.len()).0));
            }
            let free: usize = pool.free.values().sum();
            assert_eq!(free + pool.usage.used, pool.usage.reserved);
            assert_eq!(pool.usage.used, live.iter().map(|block| block.1).sum::<usize>());
            assert_eq!(pool.free.len(), pool.by_size.len());
        }
        assert!(pool.usage.peak > 64 * GRAIN);
        live.iter().for_each(|&(start, _)| pool.give_back(Address(start)));
        assert_eq!(pool.drain_free().len(), 3, "free neighbours are one block");
        assert_eq!((pool.usage.reserved, pool.drain()), (0, vec![]));
    }

    #[test]
    fn a_block_given_back_serves_the_next_that_fits_into_it() {
        let mut pool = Pool::default();
        let bytes = Pool::block_bytes(10_000);
        pool.adopt(Address(4096), bytes);
        assert_eq!(pool.take(bytes), Some(Address(4096)));
        assert_eq!(pool.take(GRAIN), None, "it is in use");
        assert!(pool.drain_free().is_empty(), "and so is its segment");
        pool.give_back(Address(4096));
        assert_eq!(pool.take(bytes - GRAIN), Some(Address(4096)));
        assert_eq!(pool.take(GRAIN), Some(Address(4096 + bytes - GRAIN)));
        assert_eq!(pool.drain(), [Address(4096)]);
    }

    #[test]
    fn a_block_has_room_for_reads_past_its_end() {
        for len in [0, 1, 480, 481, 512, 100_000] {
            assert!(Pool::block_bytes(len) >= len + TAIL && Pool::block_bytes(len).is_multiple_of(GRAIN), "{len}");
        }
    }
}
