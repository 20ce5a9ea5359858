//! Device memory that is kept for reuse, and the pinned host memory through which copies go.
//!
//! Invariants: all work is on one stream, so a block that is given back may be handed out at once: whoever gets it is
//! ordered behind whoever had it. A block starts on the runtime's 64-byte boundary and has 32 bytes behind its end, since
//! some kernels read past it. Pinned memory is reused only when the stream was synchronised since.

use std::collections::BTreeMap;

use crate::object::Address;

/// Bytes behind a block that a kernel may read.
const TAIL: usize = 32;
/// Blocks are multiples of this: satisfies every alignment that operators ask for.
const GRAIN: usize = 512;

/// Blocks given back, and those in use.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: BTreeMap<usize, Vec<Address>>,
    used: BTreeMap<Address, usize>,
}

impl Pool {
    /// Bytes to ask the device for when `len` are wanted.
    pub(crate) fn block_bytes(len: usize) -> usize {
        (len.max(1) + TAIL).next_multiple_of(GRAIN)
    }

    /// A free block of at least `bytes`, and at most a quarter more.
    pub(crate) fn take(&mut self, bytes: usize) -> Option<Address> {
        let (&size, blocks) = self.free.range_mut(bytes..=bytes + bytes / 4).find(|(_, blocks)| !blocks.is_empty())?;
        let address = blocks.pop().expect("it is not empty");
        self.used.insert(address, size);
        Some(address)
    }

    /// Enters a block that the device gave.
    pub(crate) fn adopt(&mut self, address: Address, bytes: usize) {
        self.used.insert(address, bytes);
    }

    /// Takes a block back.
    pub(crate) fn give_back(&mut self, address: Address) {
        let size = self.used.remove(&address).expect("a block is given back once");
        self.free.entry(size).or_default().push(address);
    }

    /// Removes all free blocks, for the device.
    pub(crate) fn drain_free(&mut self) -> Vec<Address> {
        std::mem::take(&mut self.free).into_values().flatten().collect()
    }

    /// Removes all blocks, for the device.
    pub(crate) fn drain(&mut self) -> Vec<Address> {
        let used = std::mem::take(&mut self.used).into_keys();
        self.drain_free().into_iter().chain(used).collect()
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
    fn a_block_given_back_serves_the_next_of_its_size_and_no_much_smaller_one() {
        let mut pool = Pool::default();
        let bytes = Pool::block_bytes(10_000);
        pool.adopt(Address(4096), bytes);
        assert_eq!(pool.take(bytes), None, "it is in use");
        pool.give_back(Address(4096));
        assert_eq!(pool.take(bytes / 2), None);
        assert_eq!(pool.take(bytes - GRAIN), Some(Address(4096)));
        assert_eq!(pool.drain(), [Address(4096)]);
    }

    #[test]
    fn a_block_has_room_for_reads_past_its_end() {
        for len in [0, 1, 480, 481, 512, 100_000] {
            assert!(Pool::block_bytes(len) >= len + TAIL && Pool::block_bytes(len).is_multiple_of(GRAIN), "{len}");
        }
    }
}
