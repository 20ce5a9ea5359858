//! Device memory: few large allocations of the driver, cut up here, so that nothing is asked of the driver in a step.
//!
//! Invariants: a block that is given back is not handed out again before the stream has passed everything queued until then,
//! except scratch, which only the one stream uses, in order. Scratch is first-fit among blocks of its own, so that equal
//! steps get equal addresses.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::gpu::Gpu;

/// What every address is a multiple of.
pub(crate) const ALIGNMENT: usize = 256;
/// Bytes that are asked of the driver at least.
const CHUNK: usize = 32 << 20;
/// The driver's own granularity.
const GRANULE: usize = 2 << 20;

/// A piece of device memory; dropping it gives it back.
pub(crate) struct Buffer {
    gpu: Arc<Gpu>,
    block: Block,
    kind: Kind,
}

impl Buffer {
    pub(crate) fn new(gpu: &Arc<Gpu>, block: Block, kind: Kind) -> Self {
        Self { gpu: gpu.clone(), block, kind }
    }

    /// Where it begins on the device.
    pub(crate) fn address(&self) -> u64 {
        self.block.address
    }

    /// Its size, as asked for.
    pub(crate) fn bytes(&self) -> usize {
        self.block.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.gpu.give_back(self.block, self.kind);
    }
}

/// How long a buffer lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Beyond a step.
    Lasting,
    /// Within an operation.
    Scratch,
}

/// A range of device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) address: u64,
    pub(crate) bytes: usize,
}

/// All memory of a device that is held here.
#[derive(Debug)]
pub(crate) struct Memory {
    lasting: Arena,
    scratch: Arena,
    /// Lasting blocks that queued work may still use.
    freed: Vec<Block>,
    /// Bytes of scratch in use, and the most that ever were.
    in_use: usize,
    most: usize,
    /// Allocations of the driver with their sizes.
    chunks: BTreeMap<u64, usize>,
}

impl Memory {
    /// Nothing yet. `isolated`: every block a chunk of its own, so that the checks of driver and tools see what reaches
    /// beyond it.
    pub(crate) fn new(isolated: bool) -> Self {
        let arena = || Arena { chunks: Vec::new(), isolated };
        Self { lasting: arena(), scratch: arena(), freed: Vec::new(), in_use: 0, most: 0, chunks: BTreeMap::new() }
    }

    /// A block, if there is room.
    pub(crate) fn take(&mut self, kind: Kind, bytes: usize) -> Option<Block> {
        let block = self.arena(kind).take(bytes)?;
        if kind == Kind::Scratch {
            self.in_use += self.scratch.room(bytes);
            self.most = self.most.max(self.in_use);
        }
        Some(block)
    }

    /// Gives a block back.
    pub(crate) fn give(&mut self, kind: Kind, block: Block) {
        match kind {
            Kind::Scratch => {
                self.in_use -= self.scratch.room(block.bytes);
                self.scratch.give(block);
            }
            Kind::Lasting => self.freed.push(block),
        }
    }

    /// Whether blocks wait for the stream to pass.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.freed.is_empty()
    }

    /// The stream has passed and nothing is queued: what was given back is free. Hands over the chunks in which nothing is
    /// in use.
    pub(crate) fn passed(&mut self) -> Vec<u64> {
        self.freed.drain(..).for_each(|block| self.lasting.give(block));
        self.idle(Kind::Lasting)
    }

    /// As [`Memory::passed`], the chunks of scratch. Later steps get other addresses than earlier ones had.
    pub(crate) fn idle_scratch(&mut self) -> Vec<u64> {
        self.idle(Kind::Scratch)
    }

    fn idle(&mut self, kind: Kind) -> Vec<u64> {
        let idle = self.arena(kind).idle();
        idle.iter().for_each(|chunk| _ = self.chunks.remove(chunk));
        idle
    }

    /// Bytes to ask of the driver for a block that finds no room: first the better, then the least.
    pub(crate) fn wanted(&self, bytes: usize) -> [usize; 2] {
        self.lasting.wanted(bytes)
    }

    /// Takes over memory of the driver.
    pub(crate) fn add(&mut self, kind: Kind, address: u64, bytes: usize) {
        self.chunks.insert(address, bytes);
        self.arena(kind).add(address, bytes);
    }

    /// Hands over all chunks.
    pub(crate) fn all(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.chunks).into_keys().collect()
    }

    /// Bytes of all chunks.
    pub(crate) fn allocated(&self) -> u64 {
        self.chunks.values().map(|bytes| *bytes as u64).sum()
    }

    /// Bytes of the chunks of scratch, and the most that were in use of them at once.
    pub(crate) fn scratch(&self) -> (u64, usize) {
        (self.scratch.chunks.iter().map(|chunk| chunk.bytes as u64).sum(), self.most)
    }

    /// Bytes of a chunk for blocks of these sizes; `None` if each gets its own, or if so many bytes are no number.
    pub(crate) fn together(&self, blocks: impl IntoIterator<Item = usize>) -> Option<usize> {
        if self.lasting.isolated {
            return None;
        }
        let add = |sum: usize, bytes: usize| sum.checked_add(bytes.checked_next_multiple_of(ALIGNMENT)?);
        blocks.into_iter().try_fold(0, add)?.max(1).checked_next_multiple_of(GRANULE)
    }

    fn arena(&mut self, kind: Kind) -> &mut Arena {
        match kind {
            Kind::Lasting => &mut self.lasting,
            Kind::Scratch => &mut self.scratch,
        }
    }
}

/// Chunks of the driver and what is free in them.
#[derive(Debug)]
struct Arena {
    chunks: Vec<Chunk>,
    isolated: bool,
}

#[derive(Debug)]
struct Chunk {
    address: u64,
    bytes: usize,
    /// Free ranges by offset, none empty, none touching another.
    free: Vec<(usize, usize)>,
}

impl Arena {
    /// The first place with room in the latest chunk that has any: what was asked of the driver for some blocks is theirs.
    fn take(&mut self, bytes: usize) -> Option<Block> {
        let room = self.room(bytes);
        let isolated = self.isolated;
        let fit = |chunk: &mut Chunk| {
            let free = &mut chunk.free;
            let at = free.iter().position(|(_, length)| if isolated { *length == room } else { *length >= room })?;
            let (offset, length) = free[at];
            if length == room {
                free.remove(at);
            } else {
                free[at] = (offset + room, length - room);
            }
            Some(Block { address: chunk.address + offset as u64, bytes })
        };
        self.chunks.iter_mut().rev().find_map(fit)
    }

    /// Gives a block back.
    fn give(&mut self, block: Block) {
        let room = self.room(block.bytes);
        let chunk = self.chunks.iter_mut().find(|chunk| chunk.holds(block.address)).expect("a block of this arena");
        let offset = (block.address - chunk.address) as usize;
        let at = chunk.free.partition_point(|(start, _)| *start < offset);
        chunk.free.insert(at, (offset, room));
        // With the next one first: its removal does not move this one.
        for left in [at, at.wrapping_sub(1)] {
            let pair = chunk.free.get(left..).and_then(|free| free.first_chunk());
            if let Some(&[(start, length), (next, more)]) = pair
                && start + length == next
            {
                chunk.free[left] = (start, length + more);
                chunk.free.remove(left + 1);
            }
        }
    }

    /// Bytes to ask of the driver for a block that finds no room: first the better, then the least.
    fn wanted(&self, bytes: usize) -> [usize; 2] {
        let room = self.room(bytes);
        let least = if self.isolated { room } else { room.next_multiple_of(GRANULE) };
        [if self.isolated || least >= CHUNK { least } else { CHUNK }, least]
    }

    /// Takes over memory of the driver.
    fn add(&mut self, address: u64, bytes: usize) {
        self.chunks.push(Chunk { address, bytes, free: vec![(0, bytes)] });
    }

    /// Hands over the chunks in which nothing is in use.
    fn idle(&mut self) -> Vec<u64> {
        let idle = |chunk: &mut Chunk| chunk.free == [(0, chunk.bytes)];
        self.chunks.extract_if(.., idle).map(|chunk| chunk.address).collect()
    }

    fn room(&self, bytes: usize) -> usize {
        bytes.max(1).next_multiple_of(if self.isolated { 1 } else { ALIGNMENT })
    }
}

impl Chunk {
    fn holds(&self, address: u64) -> bool {
        (self.address..self.address + self.bytes as u64).contains(&address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena() -> Arena {
        Arena { chunks: Vec::new(), isolated: false }
    }

    #[test]
    fn equal_requests_get_equal_addresses_and_all_of_them_together_leave_one_range() {
        let mut arena = arena();
        arena.add(1 << 20, 1 << 20);
        let sizes = [1, 300, 70_000, 256, 0, 4096];
        let mut before = Vec::new();
        for order in [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 4, 5, 1, 3]] {
            let blocks: Vec<Block> = sizes.iter().map(|bytes| arena.take(*bytes).expect("room")).collect();
            let mut ranges: Vec<_> = blocks.iter().map(|b| (b.address, b.address + b.bytes.max(1) as u64)).collect();
            ranges.sort_unstable();
            assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ranges:?}");
            assert!(ranges.iter().all(|(start, _)| start % ALIGNMENT as u64 == 0));
            assert!(before.is_empty() || before == blocks);
            order.iter().for_each(|&i| arena.give(blocks[i]));
            assert_eq!(arena.chunks[0].free, [(0, 1 << 20)]);
            before = blocks;
        }
        assert_eq!(arena.idle(), [1 << 20]);
    }

    #[test]
    fn a_full_arena_says_so_and_what_is_given_back_is_found_again() {
        let mut arena = arena();
        arena.add(4096, 1024);
        let blocks: Vec<Block> = (0..4).map(|_| arena.take(256).expect("room")).collect();
        assert_eq!(arena.take(1), None);
        arena.give(blocks[2]);
        assert_eq!(arena.take(257), None);
        assert_eq!(arena.take(10).map(|block| block.address), Some(blocks[2].address));
        assert!(arena.idle().is_empty());
    }

    #[test]
    fn large_blocks_are_asked_for_as_they_are_and_small_ones_together() {
        let arena = arena();
        assert_eq!(arena.wanted(10), [CHUNK, GRANULE]);
        assert_eq!(arena.wanted(CHUNK + 1), [CHUNK + GRANULE; 2]);
        assert_eq!(Arena { chunks: Vec::new(), isolated: true }.wanted(10), [10, 10]);
    }
}
