//! Block tables of sequences, and the prefix cache that lets them share.
//!
//! A full block is named by a keyed hash of all tokens up to its end, of their scope, of the adapter's
//! digest and of the engine's namespace; a later sequence that starts with the same tokens, in the same scope, with the
//! same adapter or none, takes the block instead of computing it.
//! The key is random per process, so names can be neither predicted nor forced to collide.
//!
//! What a model reads of the last tokens only lies in passing blocks, which are named alike and have an allocator of their own. A
//! sequence gets them as its tokens are planned and gives back those behind it; the prefix of another is of use only as far as
//! the passing blocks at its end are still cached. There are as many as running sequences can have together
//! ([`Passing::fewest`]), so nobody waits for one or is preempted for one: they are no concern of the scheduler.
//!
//! Invariant: a published block was computed and its values are finite. The scheduler publishes a
//! sequence's blocks only when a token was sampled behind them; attention had read all of them for
//! it, so a value that is not finite would have shown. Drafts that are not accepted lie behind all tokens
//! and are never published.

use baton_model::{Adapter, PASSED, Passing, RunSpec};
use sha2::{Digest, Sha256};

use crate::block::{BlockAllocator, BlockHash, BlockId, Blocks};
use crate::sequence::Sequence;
use crate::{BlockStats, CacheScope};

/// The blocks of one sequence, in the order of its positions.
#[derive(Default)]
pub(crate) struct BlockTable {
    blocks: Vec<BlockId>,
    /// Of the tokens that were planned; the first `num_passed` were given back.
    passing: Vec<BlockId>,
    num_passed: usize,
    /// How many of `blocks` were offered to the cache or came from it.
    num_published: usize,
    /// How many tokens had been computed when one was last sampled behind them; those from the cache count.
    num_proven: usize,
    /// Names of the first full blocks of the tokens. Tokens are only ever appended, so names once
    /// computed stay, also while the table is empty.
    hashes: Vec<BlockHash>,
}

impl BlockTable {
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// In the order of positions, [`PASSED`] for those that were given back.
    pub fn passing(&self) -> &[BlockId] {
        &self.passing
    }

    /// Both kinds, of the first `count` blocks.
    pub fn first(&self, count: usize) -> Blocks {
        let passing = self.passing.get(..count).unwrap_or_default();
        Blocks { kept: self.blocks[..count].to_vec(), passing: passing.to_vec() }
    }

    /// Passing blocks that it holds.
    fn held_passing(&self) -> &[BlockId] {
        &self.passing[self.num_passed..]
    }
}

/// How a sequence begins that has no block yet.
pub(crate) struct Beginning {
    /// Cached blocks of its prefix.
    cached: Vec<BlockId>,
    /// Cached passing blocks at its end.
    passing: Vec<BlockId>,
    /// Blocks that it takes of those available, for all its known tokens.
    pub needed: usize,
}

/// Gives blocks to sequences and takes them back.
pub(crate) struct BlockManager {
    allocator: BlockAllocator,
    /// `None` if nothing passes.
    passing: Option<PassingBlocks>,
    block_size: usize,
    /// `None` if prefixes are not cached.
    hasher: Option<BlockHasher>,
}

struct PassingBlocks {
    allocator: BlockAllocator,
    rule: Passing,
}

impl BlockManager {
    /// `hasher`: names the blocks of the prefix cache; `None` for no cache.
    pub fn new(spec: &RunSpec, hasher: Option<BlockHasher>) -> Self {
        assert!(spec.block_size > 0, "blocks hold at least one token");
        let passing = |rule: Passing| PassingBlocks { allocator: BlockAllocator::new(rule.num_blocks), rule };
        Self {
            allocator: BlockAllocator::new(spec.num_blocks),
            passing: spec.passing.map(passing),
            block_size: spec.block_size,
            hasher,
        }
    }

    pub fn block_size(&self) -> usize {
        self.block_size
    }

    pub fn stats(&self) -> BlockStats {
        self.allocator.stats()
    }

    /// Whether something passes.
    pub fn has_passing(&self) -> bool {
        self.passing.is_some()
    }

    /// Where the passing blocks are, if there are any.
    pub fn passing_stats(&self) -> Option<BlockStats> {
        self.passing.as_ref().map(|own| own.allocator.stats())
    }

    /// Of the blocks of its first `num_tokens` tokens, how many the sequence could take from the cache. The last token
    /// is always computed, since its logits are wanted.
    pub fn shareable_blocks(&self, sequence: &Sequence, num_tokens: usize) -> usize {
        let num_tokens = (num_tokens - 1).min(sequence.num_cacheable());
        if self.hasher.is_some() { num_tokens / self.block_size } else { 0 }
    }

    /// Blocks that sequences can be given.
    pub fn available(&self) -> usize {
        self.allocator.available()
    }

    /// How a sequence begins that has no block yet.
    pub fn beginning(&self, sequence: &mut Sequence) -> Beginning {
        debug_assert!(sequence.table.blocks.is_empty(), "a waiting sequence holds no block");
        let (cached, passing) = self.cached_prefix(sequence);
        let taken_from_cache = cached.iter().filter(|&&id| self.allocator.is_unheld(id)).count();
        let new = sequence.tokens.len().div_ceil(self.block_size) - cached.len();
        Beginning { cached, passing, needed: taken_from_cache + new }
    }

    /// Blocks that are available to what begins so once `other` has none. Of a prefix that both have they are no gain: it
    /// stands at the same places in both.
    pub fn freed_for(&self, beginning: &Beginning, other: &Sequence) -> usize {
        let is_gain =
            |(i, &id): (usize, &BlockId)| self.allocator.is_held_once(id) && beginning.cached.get(i) != Some(&id);
        other.table.blocks.iter().enumerate().filter(|block| is_gain(*block)).count()
    }

    /// Gives a sequence without blocks all that its known tokens need, from the cache as far as that
    /// reaches, and sets `num_computed`. It begins so, and the blocks that it needs are available.
    pub fn admit(&mut self, sequence: &mut Sequence, Beginning { cached, passing, needed }: Beginning) {
        assert!(self.available() >= needed, "available blocks were counted");
        // Held before anything is allocated, which could evict them.
        cached.iter().for_each(|&id| self.allocator.acquire(id));
        if let Some(own) = &mut self.passing {
            passing.iter().for_each(|&id| own.allocator.acquire(id));
            sequence.table.num_passed = cached.len() - passing.len();
            sequence.table.passing = [vec![PASSED; cached.len() - passing.len()], passing].concat();
        }
        sequence.num_computed = cached.len() * self.block_size;
        sequence.table.num_published = cached.len();
        sequence.table.num_proven = sequence.num_computed;
        sequence.table.blocks = cached;
        assert!(self.grow(sequence, sequence.tokens.len()), "available blocks were counted");
    }

    /// The published blocks of the longest prefix of the sequence from which it can go on: kept ones, and the passing ones that
    /// it must have at its end.
    fn cached_prefix(&self, sequence: &mut Sequence) -> (Vec<BlockId>, Vec<BlockId>) {
        let mut cached = self.cached_kept(sequence);
        let Some(own) = &self.passing else { return (cached, Vec::new()) };
        // Back from the end, each block once: what ends behind one that is missing lacks it too.
        let (mut end, mut index, mut passing) = (cached.len(), cached.len(), Vec::new());
        while index > own.rule.first(end * self.block_size, self.block_size) {
            index -= 1;
            match own.allocator.lookup(&sequence.table.hashes[index], self.tokens_of(sequence, index)) {
                Some(id) => passing.push(id),
                None => {
                    end = index;
                    passing.clear();
                }
            }
        }
        passing.reverse();
        cached.truncate(end);
        (cached, passing)
    }

    /// The published kept blocks of the longest prefix of the sequence.
    fn cached_kept(&self, sequence: &mut Sequence) -> Vec<BlockId> {
        let mut cached = Vec::new();
        for index in 0..self.shareable_blocks(sequence, sequence.tokens.len()) {
            self.hash_up_to(sequence, index + 1);
            match self.allocator.lookup(&sequence.table.hashes[index], self.tokens_of(sequence, index)) {
                Some(id) => cached.push(id),
                None => break,
            }
        }
        cached
    }

    /// Tokens of a full block.
    fn tokens_of<'a>(&self, sequence: &'a Sequence, index: usize) -> &'a [u32] {
        &sequence.tokens[index * self.block_size..(index + 1) * self.block_size]
    }

    /// Blocks that the sequence misses for its first `num_tokens` tokens; it has none beyond them.
    pub fn missing(&self, sequence: &Sequence, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size) - sequence.table.blocks.len()
    }

    /// Gives the sequence blocks for its first `num_tokens` tokens; false, and nothing given, if there are too few.
    pub fn grow(&mut self, sequence: &mut Sequence, num_tokens: usize) -> bool {
        let missing = self.missing(sequence, num_tokens);
        if self.allocator.available() < missing {
            return false;
        }
        self.give(sequence, missing);
        true
    }

    /// Gives the sequence blocks for drafts behind its known tokens, as far as there are any without touching the
    /// `spare` ones. Returns for how many of `drafts` it has room.
    pub fn grow_for_drafts(&mut self, sequence: &mut Sequence, drafts: usize, spare: usize) -> usize {
        let known = sequence.tokens.len();
        let missing = self.missing(sequence, known + drafts);
        self.give(sequence, missing.min(self.allocator.available().saturating_sub(spare)));
        drafts.min(sequence.table.blocks.len() * self.block_size - known)
    }

    fn give(&mut self, sequence: &mut Sequence, count: usize) {
        let new = (0..count).map(|_| self.allocator.allocate().expect("available blocks were counted"));
        sequence.table.blocks.extend(new);
    }

    /// Gives the sequence passing blocks for a step up to its first `num_tokens` tokens.
    pub fn give_passing(&mut self, sequence: &mut Sequence, num_tokens: usize) {
        let Some(own) = &mut self.passing else { return };
        let missing = num_tokens.div_ceil(self.block_size).saturating_sub(sequence.table.passing.len());
        let new = (0..missing).map(|_| own.allocator.allocate().expect("there are as many as sequences can have"));
        sequence.table.passing.extend(new);
    }

    /// Takes back the passing blocks that are of no use to what follows the computed tokens. Returns those that hold values for
    /// which nothing vouches, to be cleared before they are used.
    pub fn pass(&mut self, sequence: &mut Sequence) -> Blocks {
        let mut unproven = Blocks::default();
        let Some(own) = &mut self.passing else { return unproven };
        let table = &mut sequence.table;
        let proven = table.num_proven.div_ceil(self.block_size);
        let first = own.rule.first(sequence.num_computed, self.block_size).min(table.passing.len());
        for index in table.num_passed..first {
            let id = std::mem::replace(&mut table.passing[index], PASSED);
            // Nobody goes on from the midst of what was generated: it shall not displace the ends of others.
            if index * self.block_size >= sequence.prompt_len && own.allocator.is_held_once(id) {
                own.allocator.unpublish(id);
            }
            own.allocator.release(id);
            if index >= proven {
                unproven.passing.push(id);
            }
        }
        table.num_passed = table.num_passed.max(first);
        unproven
    }

    /// Takes back the blocks in which nothing but drafts lay that were not accepted.
    pub fn trim(&mut self, sequence: &mut Sequence) {
        let needed = sequence.tokens.len().div_ceil(self.block_size);
        if let Some(own) = &mut self.passing {
            let unneeded = sequence.table.passing.len().min(needed)..;
            sequence.table.passing.drain(unneeded).for_each(|id| own.allocator.release(id));
        }
        while sequence.table.blocks.len() > needed {
            self.allocator.release(sequence.table.blocks.pop().expect("it is not empty"));
        }
    }

    /// A token was sampled behind all computed ones. Publishes the full computed blocks, but for the background: it leaves
    /// nothing in the cache, so that of the foreground's prefixes it never displaces more than it holds at a time. Only for
    /// values known to be finite.
    pub fn publish(&mut self, sequence: &mut Sequence) {
        sequence.table.num_proven = sequence.num_computed;
        if self.hasher.is_none() || sequence.id.is_background() {
            return;
        }
        let full = sequence.num_computed / self.block_size;
        self.hash_up_to(sequence, full);
        let table = &mut sequence.table;
        for index in table.num_published..full {
            let tokens = &sequence.tokens[index * self.block_size..(index + 1) * self.block_size];
            let (tenant, hash) = (sequence.scope.tenant, table.hashes[index]);
            self.allocator.publish(table.blocks[index], tenant, hash, tokens);
            if let Some(own) = self.passing.as_mut().filter(|_| index >= table.num_passed) {
                own.allocator.publish(table.passing[index], tenant, hash, tokens);
            }
        }
        table.num_published = full;
    }

    /// Takes all blocks back. The last is given up first, since a block is of use only behind those
    /// before it.
    pub fn release(&mut self, sequence: &mut Sequence) {
        let table = &mut sequence.table;
        table.blocks.drain(..).rev().for_each(|id| self.allocator.release(id));
        if let Some(own) = &mut self.passing {
            table.held_passing().iter().rev().for_each(|&id| own.allocator.release(id));
            table.passing.clear();
            table.num_passed = 0;
        }
        (sequence.num_computed, sequence.num_begun) = (0, 0);
    }

    /// Takes the blocks that the step under way writes out of the table of a sequence; they stay held until
    /// [`release_detached`](Self::release_detached). Those behind them, in which nothing is, are given back.
    pub fn detach_begun(&mut self, sequence: &mut Sequence) -> Blocks {
        let (table, first) = (&mut sequence.table, sequence.num_computed / self.block_size);
        let mut kept = table.blocks.split_off(first);
        let behind = kept.split_off(sequence.num_begun.div_ceil(self.block_size) - first);
        behind.into_iter().rev().for_each(|id| self.allocator.release(id));
        // Of what passes there is none for tokens that no step was begun for.
        let passing = table.passing.drain(first.min(table.passing.len())..).collect();
        Blocks { kept, passing }
    }

    /// Takes blocks back that are in no table.
    pub fn release_detached(&mut self, blocks: &Blocks) {
        blocks.kept.iter().for_each(|&id| self.allocator.release(id));
        if let Some(own) = &mut self.passing {
            blocks.passing.iter().for_each(|&id| own.allocator.release(id));
        }
    }

    /// As `release`, for a sequence that ends or waits before its time. In the midst of a prompt nothing was
    /// sampled yet that would vouch for its values: returns the blocks that hold such, to be cleared
    /// before they are used.
    pub fn release_unfinished(&mut self, sequence: &mut Sequence) -> Blocks {
        let table = &sequence.table;
        let (proven, computed) = (table.num_proven, sequence.num_computed);
        let unproven = |blocks: &[BlockId], from: usize| {
            let (from, to) = (from.max(proven.div_ceil(self.block_size)), computed.div_ceil(self.block_size));
            // Without those that were detached.
            blocks.get(from..to.min(blocks.len())).unwrap_or_default().to_vec()
        };
        let unproven = Blocks { kept: unproven(&table.blocks, 0), passing: unproven(&table.passing, table.num_passed) };
        self.release(sequence);
        unproven
    }

    /// As `release`, for a sequence whose values are not to be trusted: none of its blocks is found
    /// again. Returns those that nobody holds any more, to be cleared before they are used.
    pub fn discard(&mut self, sequence: &mut Sequence) -> Blocks {
        let table = &sequence.table;
        let mut blocks = Blocks { kept: table.blocks.clone(), passing: table.held_passing().to_vec() };
        blocks.kept.iter().for_each(|&id| self.allocator.unpublish(id));
        if let Some(own) = &mut self.passing {
            blocks.passing.iter().for_each(|&id| own.allocator.unpublish(id));
        }
        self.release(sequence);
        blocks.kept.retain(|&id| self.allocator.is_unheld(id));
        if let Some(own) = &self.passing {
            blocks.passing.retain(|&id| own.allocator.is_unheld(id));
        }
        blocks
    }

    /// Forgets everything cached. Returns the blocks, which are free now.
    pub fn forget_cached(&mut self) -> Blocks {
        let passing = self.passing.as_mut().map(|own| own.allocator.forget_cached());
        Blocks { kept: self.allocator.forget_cached(), passing: passing.unwrap_or_default() }
    }

    /// Extends the names of the sequence's blocks to the first `num_blocks`.
    fn hash_up_to(&self, sequence: &mut Sequence, num_blocks: usize) {
        let hasher = self.hasher.as_ref().expect("only called if prefixes are cached");
        let hashes = &mut sequence.table.hashes;
        for index in hashes.len()..num_blocks {
            let previous = match index.checked_sub(1) {
                Some(previous) => hashes[previous],
                None => hasher.root(sequence.adapter.as_ref().map(Adapter::digest), &sequence.scope),
            };
            let tokens = &sequence.tokens[index * self.block_size..(index + 1) * self.block_size];
            hashes.push(hasher.block(&previous, tokens));
        }
    }
}

/// HMAC-SHA256 (RFC 2104) under the process's secret.
pub(crate) struct BlockHasher {
    /// SHA-256 after the key block of the inner and of the outer hash.
    inner: Sha256,
    outer: Sha256,
    /// Part of every name.
    namespace: Vec<u8>,
}

impl BlockHasher {
    pub fn new(secret: [u8; 32], namespace: &[u8]) -> Self {
        let keyed = |pad: u8| {
            let mut block = [pad; 64];
            block.iter_mut().zip(secret).for_each(|(byte, key)| *byte ^= key);
            Sha256::new_with_prefix(block)
        };
        Self { inner: keyed(0x36), outer: keyed(0x5c), namespace: namespace.to_vec() }
    }

    /// Stands for the block before the first. Scopes, with and without adapter, and blocks are told apart by the
    /// first byte, namespace, tenant and salt by the length of the first and the second.
    fn root(&self, adapter: Option<&[u8; 32]>, scope: &CacheScope) -> BlockHash {
        self.mac(|hash| {
            match adapter {
                None => hash.update([0]),
                Some(digest) => {
                    hash.update([2]);
                    hash.update(digest);
                }
            }
            hash.update((self.namespace.len() as u64).to_le_bytes());
            hash.update(&self.namespace);
            hash.update(scope.tenant.0);
            hash.update(&scope.salt);
        })
    }

    fn block(&self, previous: &BlockHash, tokens: &[u32]) -> BlockHash {
        self.mac(|hash| {
            hash.update([1]);
            hash.update(previous);
            tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        })
    }

    fn mac(&self, message: impl FnOnce(&mut Sha256)) -> BlockHash {
        let mut inner = self.inner.clone();
        message(&mut inner);
        self.outer.clone().chain_update(inner.finalize()).finalize().into()
    }
}

#[cfg(test)]
impl BlockManager {
    /// The allocators' own checks, against all that is held.
    pub fn check(&self, held: &Blocks) -> Result<(), String> {
        let counts = |held: &[BlockId]| {
            let mut counts = std::collections::BTreeMap::new();
            held.iter().filter(|&&id| id != PASSED).for_each(|id| *counts.entry(*id).or_default() += 1);
            counts
        };
        self.allocator.check(&counts(&held.kept))?;
        self.passing.as_ref().map_or(Ok(()), |own| own.allocator.check(&counts(&held.passing)))
    }

    /// Sabotage: a passing block that no table holds.
    pub fn leak_passing(&mut self) {
        self.passing.as_mut().expect("something passes").allocator.allocate();
    }

    /// Sabotage: a block that no table holds.
    pub fn leak(&mut self) {
        self.allocator.allocate();
    }
}

#[cfg(test)]
mod tests {
    use crate::Tenant;

    use super::*;

    #[test]
    fn the_mac_is_hmac_sha256() {
        // Expected: `hmac.new(bytes(range(32)), b"what do ya want", "sha256")` of Python.
        let key = std::array::from_fn(|i| i as u8);
        let mac = BlockHasher::new(key, b"").mac(|hash| hash.update(b"what do ya want"));
        let hex: String = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "6f21a7e969d25d6c8cec88e50cd5c6cd96e1ec8126ee3f43d6339895f7c25055");
    }

    #[test]
    fn names_depend_on_namespace_adapter_scope_position_and_all_tokens_before() {
        let hasher = BlockHasher::new([7; 32], b"");
        let salted = |salt: &[u8]| CacheScope { salt: salt.to_vec(), ..CacheScope::default() };
        let (a, b) = (hasher.root(None, &salted(b"a")), hasher.root(None, &salted(b"b")));
        // The adapter's digest as a salt or a tenant is another thing than the adapter.
        let digest = [9; 32];
        let named = |namespace, salt| {
            let hasher = BlockHasher::new([7; 32], namespace);
            hasher.block(&hasher.root(None, &salted(salt)), &[1, 2])
        };
        let of_tenant = |tenant, salt: &[u8]| {
            let scope = CacheScope { tenant: Tenant(tenant), ..salted(salt) };
            hasher.block(&hasher.root(None, &scope), &[1, 2])
        };
        let names = [
            hasher.block(&hasher.root(Some(&digest), &salted(b"a")), &[1, 2]),
            hasher.block(&hasher.root(Some(&[8; 32]), &salted(b"a")), &[1, 2]),
            hasher.block(&hasher.root(None, &salted(&[&digest[..], b"a"].concat())), &[1, 2]),
            of_tenant(digest, b"a"),
            of_tenant(digest, b""),
            of_tenant([8; 32], b"a"),
            hasher.block(&a, &[1, 2]),
            hasher.block(&b, &[1, 2]),
            hasher.block(&a, &[2, 1]),
            hasher.block(&hasher.block(&a, &[1, 2]), &[1, 2]),
            BlockHasher::new([8; 32], b"").block(&a, &[1, 2]),
            named(b"one", b"a"),
            named(b"two", b"a"),
            named(b"on", b"ea"),
        ];
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
    }
}
