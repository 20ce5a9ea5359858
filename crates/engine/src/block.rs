//! Who holds which cache block, and which blocks are worth keeping.
//!
//! The life of a block:
//!
//! 1. *free*: on the stack of free blocks, content unknown.
//! 2. *held*: [`allocate`](BlockAllocator::allocate) hands it to one sequence, which fills it.
//! 3. *held and published*: [`publish`](BlockAllocator::publish) names its content. From now on
//!    [`acquire`](BlockAllocator::acquire) lets other sequences hold it too; nobody writes it again.
//! 4. *cached*: the last holder has [released](BlockAllocator::release) it. It keeps its content and
//!    can be acquired again, until `allocate` finds no free block and takes the one that [`CachedBlocks`]
//!    gives up next: back to 2.
//!
//! A block released without being published, or after [`unpublish`](BlockAllocator::unpublish), is
//! free at once. Invariant: every block is free, cached or held; `free + cached + held = total`.

use std::collections::BTreeMap;

use crate::cached::CachedBlocks;
use crate::{BlockStats, Tenant};

/// Index of a block of its kind in the cache, below [`baton_model::RunSpec::num_blocks`] or
/// [`baton_model::Passing::num_blocks`].
pub(crate) type BlockId = u32;

/// Names a block's tokens, all tokens before them, and their scope.
pub(crate) type BlockHash = [u8; 32];

/// Blocks of both kinds, each in an order of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub kept: Vec<BlockId>,
    /// See [`baton_model::RunSpec::passing`].
    pub passing: Vec<BlockId>,
}

impl Blocks {
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.passing.is_empty()
    }

    pub fn extend(&mut self, other: Self) {
        self.kept.extend(other.kept);
        self.passing.extend(other.passing);
    }
}

/// Reference counts, the free blocks in the order in which they are given up, and the index of
/// published ones.
pub(crate) struct BlockAllocator {
    blocks: Vec<Block>,
    /// The next to allocate is the last.
    free: Vec<BlockId>,
    cached: CachedBlocks,
    /// Published blocks, held or cached.
    index: BTreeMap<BlockHash, BlockId>,
    /// Counts releases.
    releases: u64,
}

#[derive(Default)]
struct Block {
    /// Sequences that hold it.
    ref_count: u32,
    /// Its key in `cached`, while it is there.
    released_at: u64,
    /// Set while it is published.
    content: Option<Content>,
}

struct Content {
    tenant: Tenant,
    hash: BlockHash,
    tokens: Box<[u32]>,
}

impl BlockAllocator {
    /// All blocks free.
    pub fn new(num_blocks: usize) -> Self {
        let ids = 0..BlockId::try_from(num_blocks).expect("block ids are 32 bits");
        Self {
            blocks: ids.clone().map(|_| Block::default()).collect(),
            free: ids.rev().collect(),
            cached: CachedBlocks::default(),
            index: BTreeMap::new(),
            releases: 0,
        }
    }

    /// Blocks that [`allocate`](Self::allocate) can give.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// A block held once, its content unknown: a free one, else the cached one that is given up next.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                let id = self.cached.pop()?;
                self.unpublish(id);
                id
            }
        };
        self.blocks[id as usize].ref_count = 1;
        Some(id)
    }

    /// The published block of this hash. Tokens are compared too, so that a collision is harmless.
    pub fn lookup(&self, hash: &BlockHash, tokens: &[u32]) -> Option<BlockId> {
        let id = *self.index.get(hash)?;
        let content = self.blocks[id as usize].content.as_ref().expect("an indexed block is published");
        (*content.tokens == *tokens).then_some(id)
    }

    /// Whether nobody holds the block.
    pub fn is_unheld(&self, id: BlockId) -> bool {
        self.blocks[id as usize].ref_count == 0
    }

    /// Whether one sequence holds the block, and no other.
    pub fn is_held_once(&self, id: BlockId) -> bool {
        self.blocks[id as usize].ref_count == 1
    }

    /// Holds a published block once more.
    pub fn acquire(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        let Some(content) = &block.content else { panic!("block {id} is acquired without being published") };
        if block.ref_count == 0 {
            self.cached.remove(content.tenant, block.released_at);
        }
        block.ref_count += 1;
    }

    /// Holds the block once less. The last holder leaves it cached if it is published, else free.
    pub fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        block.ref_count = block.ref_count.checked_sub(1).expect("a released block is held");
        if block.ref_count > 0 {
            return;
        }
        if let Some(content) = &block.content {
            self.releases += 1;
            block.released_at = self.releases;
            self.cached.insert(content.tenant, self.releases, id);
        } else {
            self.free.push(id);
        }
    }

    /// Names the content of a held, full block, which is this tenant's. If another block of this content is published, that one
    /// stays the one to share.
    pub fn publish(&mut self, id: BlockId, tenant: Tenant, hash: BlockHash, tokens: &[u32]) {
        let block = &mut self.blocks[id as usize];
        assert!(block.ref_count > 0, "block {id} is published without being held");
        if block.content.is_none() && !self.index.contains_key(&hash) {
            block.content = Some(Content { tenant, hash, tokens: tokens.into() });
            self.index.insert(hash, id);
        }
    }

    /// Forgets the content of a block that is not cached, so that nobody acquires it any more.
    pub fn unpublish(&mut self, id: BlockId) {
        if let Some(content) = self.blocks[id as usize].content.take() {
            self.index.remove(&content.hash);
        }
    }

    /// Frees and returns all cached blocks.
    pub fn forget_cached(&mut self) -> Vec<BlockId> {
        let cached: Vec<BlockId> = std::mem::take(&mut self.cached).iter().map(|(_, _, id)| id).collect();
        cached.iter().for_each(|&id| self.unpublish(id));
        self.free.extend(&cached);
        cached
    }

    /// Where the blocks are.
    pub fn stats(&self) -> BlockStats {
        let (total, cached, free) = (self.blocks.len(), self.cached.len(), self.free.len());
        BlockStats { total, used: total - cached - free, cached, free }
    }
}

#[cfg(test)]
impl BlockAllocator {
    /// Checks the invariant and all redundancy, given how often each block is held.
    pub fn check(&self, held: &BTreeMap<BlockId, u32>) -> Result<(), String> {
        let mut places = vec![0; self.blocks.len()];
        for id in self.free.iter().copied().chain(self.cached.iter().map(|(_, _, id)| id)) {
            places[id as usize] += 1;
        }
        for (block, id) in self.blocks.iter().zip(0..) {
            let count = held.get(&id).copied().unwrap_or(0);
            if block.ref_count != count {
                return Err(format!("block {id} counts {} holders, there are {count}", block.ref_count));
            }
            if places[id as usize] != usize::from(count == 0) {
                return Err(format!("block {id}, held {count} times, is {} times free or cached", places[id as usize]));
            }
            if let Some(content) = &block.content
                && self.index.get(&content.hash) != Some(&id)
            {
                return Err(format!("published block {id} is not indexed"));
            }
        }
        for (tenant, released_at, id) in self.cached.iter() {
            let block = &self.blocks[id as usize];
            let is_its = block.content.as_ref().is_some_and(|content| content.tenant == tenant);
            if !is_its || block.released_at != released_at {
                return Err(format!("cached block {id} is not as it was released"));
            }
        }
        let published = self.blocks.iter().filter(|block| block.content.is_some()).count();
        if published != self.index.len() {
            return Err(format!("{published} blocks are published, {} indexed", self.index.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Contents are of two tenants.
    fn tenant(content: u8) -> Tenant {
        Tenant([content % 2; 32])
    }

    /// The same rules on plain lists, without counts or indices.
    struct Naive {
        total: usize,
        /// One entry per holder.
        held: Vec<BlockId>,
        /// Oldest release first.
        cached: Vec<BlockId>,
        /// Content of published blocks.
        content: BTreeMap<BlockId, u8>,
    }

    impl Naive {
        fn free(&self) -> Vec<BlockId> {
            (0..self.total as u32).filter(|id| !self.held.contains(id) && !self.cached.contains(id)).collect()
        }

        fn release(&mut self, index: usize) -> BlockId {
            let id = self.held.remove(index);
            if !self.held.contains(&id) && self.content.contains_key(&id) {
                self.cached.push(id);
            }
            id
        }

        /// The oldest of whoever keeps most, of equals the oldest of all.
        fn evict(&mut self) -> BlockId {
            let owner = |id: &BlockId| tenant(self.content[id]);
            let kept = |id: &BlockId| self.cached.iter().filter(|other| owner(other) == owner(id)).count();
            let most = self.cached.iter().map(kept).max().unwrap();
            let place = self.cached.iter().position(|id| kept(id) == most).unwrap();
            self.cached.remove(place)
        }

        fn counts(&self) -> BTreeMap<BlockId, u32> {
            let mut counts = BTreeMap::new();
            self.held.iter().for_each(|&id| *counts.entry(id).or_default() += 1);
            counts
        }
    }

    #[derive(Debug, Clone)]
    enum Event {
        Allocate,
        /// Of the content.
        Acquire(u8),
        /// Of the n-th holder.
        Release(usize),
        /// Of the n-th holder's block, with the content.
        Publish(usize, u8),
        /// Of the n-th holder's block.
        Unpublish(usize),
        ForgetCached,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            3 => Just(Event::Allocate),
            3 => (0..12u8).prop_map(Event::Acquire),
            4 => any::<usize>().prop_map(Event::Release),
            4 => (any::<usize>(), 0..12u8).prop_map(|(n, content)| Event::Publish(n, content)),
            1 => any::<usize>().prop_map(Event::Unpublish),
            1 => Just(Event::ForgetCached),
        ]
    }

    proptest! {
        #[test]
        fn the_allocator_does_what_the_naive_model_does(
            total in 1..8usize,
            events in prop::collection::vec(event(), 1..200),
        ) {
            let mut real = BlockAllocator::new(total);
            let mut naive = Naive { total, held: vec![], cached: vec![], content: BTreeMap::new() };
            for event in events {
                let nth = |n: usize| (!naive.held.is_empty()).then(|| n % naive.held.len());
                match event {
                    Event::Allocate => {
                        let id = real.allocate();
                        let free = naive.free();
                        match id {
                            Some(id) if free.is_empty() => prop_assert_eq!(naive.evict(), id),
                            Some(id) => prop_assert!(free.contains(&id)),
                            None => prop_assert!(free.is_empty() && naive.cached.is_empty()),
                        }
                        naive.content.retain(|content_id, _| Some(*content_id) != id);
                        naive.held.extend(id);
                    }
                    Event::Acquire(content) => {
                        let found = real.lookup(&[content; 32], &[content.into()]);
                        let expected = naive.content.iter().find(|(_, c)| **c == content).map(|(id, _)| *id);
                        prop_assert_eq!(found, expected);
                        prop_assert_eq!(real.lookup(&[content; 32], &[99]), None, "other tokens must not match");
                        if let Some(id) = found {
                            real.acquire(id);
                            naive.cached.retain(|&cached| cached != id);
                            naive.held.push(id);
                        }
                    }
                    Event::Release(n) => if let Some(n) = nth(n) {
                        real.release(naive.release(n));
                    },
                    Event::Publish(n, content) => if let Some(n) = nth(n) {
                        let id = naive.held[n];
                        real.publish(id, tenant(content), [content; 32], &[content.into()]);
                        if !naive.content.contains_key(&id) && !naive.content.values().any(|c| *c == content) {
                            naive.content.insert(id, content);
                        }
                    },
                    Event::Unpublish(n) => if let Some(n) = nth(n) {
                        real.unpublish(naive.held[n]);
                        naive.content.remove(&naive.held[n]);
                    },
                    Event::ForgetCached => {
                        let mut cached = std::mem::take(&mut naive.cached);
                        cached.sort_unstable();
                        let mut forgotten = real.forget_cached();
                        forgotten.sort_unstable();
                        prop_assert_eq!(&forgotten, &cached);
                        naive.content.retain(|id, _| !cached.contains(id));
                    }
                }
                real.check(&naive.counts()).map_err(TestCaseError::fail)?;
                prop_assert_eq!(real.stats().cached, naive.cached.len());
                prop_assert_eq!(real.stats().free, naive.free().len());
                prop_assert_eq!(real.available(), naive.cached.len() + naive.free().len());
            }
        }
    }

    #[test]
    fn a_leaked_block_is_noticed() {
        let mut allocator = BlockAllocator::new(2);
        let _leaked = allocator.allocate();
        assert!(allocator.check(&BTreeMap::new()).is_err());
    }
}
