//! The cached blocks: nobody holds them, and their content may be of use again. Counted by whose they are.
//!
//! Room is made at the expense of whoever keeps most, of whose blocks the one goes that was released longest ago.
//! Invariant: nobody loses a block while somebody else keeps more. So of `n` tenants none is driven below an `n`-th of
//! what is cached, however much the others compute.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::Tenant;
use crate::block::BlockId;

/// Blocks by the time of their release, which is the order in which a tenant gives them up.
type ByRelease = BTreeMap<u64, BlockId>;

/// How many blocks a tenant keeps, and the time of the oldest release.
type Place = (usize, Reverse<u64>, Tenant);

#[derive(Default)]
pub(crate) struct CachedBlocks {
    tenants: BTreeMap<Tenant, ByRelease>,
    /// Who gives up a block next is the last.
    order: BTreeSet<Place>,
    len: usize,
}

impl CachedBlocks {
    pub fn len(&self) -> usize {
        self.len
    }

    /// Adds a block of the tenant, released at this time, at which no other was.
    pub fn insert(&mut self, tenant: Tenant, released_at: u64, id: BlockId) {
        self.change(tenant, |blocks| _ = blocks.insert(released_at, id));
        self.len += 1;
    }

    /// Takes the block of the tenant that was released at this time.
    pub fn remove(&mut self, tenant: Tenant, released_at: u64) {
        self.change(tenant, |blocks| _ = blocks.remove(&released_at).expect("a cached block is where it was put"));
        self.len -= 1;
    }

    /// Takes the block that is given up next.
    pub fn pop(&mut self) -> Option<BlockId> {
        let &(_, Reverse(released_at), tenant) = self.order.last()?;
        let id = self.tenants[&tenant][&released_at];
        self.remove(tenant, released_at);
        Some(id)
    }

    /// All of them, with owner and time of release.
    pub fn iter(&self) -> impl Iterator<Item = (Tenant, u64, BlockId)> {
        self.tenants.iter().flat_map(|(&tenant, blocks)| blocks.iter().map(move |(&at, &id)| (tenant, at, id)))
    }

    fn change(&mut self, tenant: Tenant, change: impl FnOnce(&mut ByRelease)) {
        let place = |blocks: &ByRelease| Some((blocks.len(), Reverse(*blocks.first_key_value()?.0), tenant));
        let blocks = self.tenants.entry(tenant).or_default();
        if let Some(place) = place(blocks) {
            self.order.remove(&place);
        }
        change(blocks);
        match place(blocks) {
            Some(place) => _ = self.order.insert(place),
            None => _ = self.tenants.remove(&tenant),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(number: u8) -> Tenant {
        Tenant([number; 32])
    }

    #[test]
    fn whoever_keeps_most_gives_up_the_oldest_and_of_equals_whose_oldest_is_older() {
        let mut cached = CachedBlocks::default();
        for (time, (owner, id)) in (0..).zip([(1, 10), (2, 20), (2, 21), (1, 11), (2, 22)]) {
            cached.insert(tenant(owner), time, id);
        }
        let given_up: Vec<_> = std::iter::from_fn(|| cached.pop()).collect();
        assert_eq!(given_up, [20, 10, 21, 11, 22]);
        assert!(cached.len() == 0 && cached.tenants.is_empty() && cached.order.is_empty());
    }
}
