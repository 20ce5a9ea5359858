//! Those that wait, and in which order all go: by class, then between the tenants of a class by what they were served, then
//! within a tenant by priority and arrival.
//!
//! Invariant: of each class the ledger has those waiting of whom something waits here.

use std::collections::BTreeMap;

use baton_fairness::{Ledger, Turn};

use crate::sequence::{Class, Rank, Sequence};
use crate::{RequestId, Tenant};

#[derive(Default)]
pub(super) struct Queue {
    /// Those of a tenant stand together.
    waiting: BTreeMap<Rank, Sequence>,
    ledgers: [Ledger; 3],
}

/// Who goes first: the smaller one. It changes as tenants are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Urgency {
    class: Class,
    turn: Turn,
    rank: Rank,
}

impl Urgency {
    pub fn rank(&self) -> &Rank {
        &self.rank
    }

    pub fn id(&self) -> RequestId {
        self.rank.id
    }

    pub fn tenant(&self) -> Tenant {
        self.turn.tenant
    }
}

impl Queue {
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn values(&self) -> impl Iterator<Item = &Sequence> + Clone {
        self.waiting.values()
    }

    /// Whether anything of the background waits, or of the foreground.
    pub fn has(&self, background: bool) -> bool {
        let rank = if background { self.waiting.keys().next_back() } else { self.waiting.keys().next() };
        rank.is_some_and(|rank| rank.id.is_background() == background)
    }

    /// The first of all.
    pub fn first(&self) -> Option<Urgency> {
        let class = self.waiting.first_key_value()?.0.class;
        let turn = self.ledger(class).first().expect("something of the class waits");
        let from = Rank { class, tenant: turn.tenant, priority: i32::MIN, id: RequestId(0) };
        let (&rank, _) = self.waiting.range(from..).next().expect("something of the tenant waits");
        debug_assert_eq!((rank.class, rank.tenant), (class, turn.tenant));
        Some(Urgency { class, turn, rank })
    }

    /// The place of a sequence, whether it waits or runs.
    pub fn urgency(&self, sequence: &Sequence) -> Urgency {
        let rank = sequence.rank();
        Urgency { class: rank.class, turn: self.ledger(rank.class).turn(rank.tenant), rank }
    }

    pub fn get(&self, rank: &Rank) -> Option<&Sequence> {
        self.waiting.get(rank)
    }

    pub fn get_mut(&mut self, rank: &Rank) -> Option<&mut Sequence> {
        self.waiting.get_mut(rank)
    }

    /// Adds a sequence that holds nothing.
    pub fn insert(&mut self, sequence: Sequence) {
        let rank = sequence.rank();
        self.waiting.insert(rank, sequence);
        self.ledger_mut(rank.class).waits(rank.tenant);
    }

    /// Takes a sequence that is to run.
    pub fn start(&mut self, rank: &Rank) -> Option<Sequence> {
        self.ledger_mut(rank.class).starts(rank.tenant);
        self.remove(rank)
    }

    /// Takes a sequence that ends.
    pub fn remove(&mut self, rank: &Rank) -> Option<Sequence> {
        let sequence = self.waiting.remove(rank)?;
        self.look_after(rank);
        Some(sequence)
    }

    /// Takes the sequence of this id.
    pub fn remove_id(&mut self, id: RequestId) -> Option<Sequence> {
        let rank = *self.waiting.keys().find(|rank| rank.id == id)?;
        self.remove(&rank)
    }

    /// Takes those that end, for a reason of which they may be told.
    pub fn extract(&mut self, ends: impl Fn(&mut Sequence) -> bool) -> Vec<Sequence> {
        let taken: Vec<(Rank, Sequence)> = self.waiting.extract_if(.., |_, sequence| ends(sequence)).collect();
        taken.iter().for_each(|(rank, _)| self.look_after(rank));
        taken.into_iter().map(|(_, sequence)| sequence).collect()
    }

    /// A step computes something for the sequence that counts so much.
    pub fn charge(&mut self, sequence: &Sequence, count: u64) {
        self.ledger_mut(sequence.class).charge(sequence.share, count);
    }

    /// Nothing of the background waits or runs, or of the foreground: nobody was served anything.
    pub fn forget(&mut self, background: bool) {
        debug_assert!(!self.has(background));
        let classes: &[Class] = if background { &[Class::Background] } else { &[Class::Foreground, Class::Batch] };
        classes.iter().for_each(|&class| self.ledger_mut(class).forget());
    }

    /// A sequence of this rank has left.
    fn look_after(&mut self, rank: &Rank) {
        let from = Rank { priority: i32::MIN, id: RequestId(0), ..*rank };
        let to = Rank { priority: i32::MAX, id: RequestId(u64::MAX), ..*rank };
        if self.waiting.range(from..=to).next().is_none() {
            self.ledger_mut(rank.class).rests(rank.tenant);
        }
    }

    fn ledger(&self, class: Class) -> &Ledger {
        &self.ledgers[class as usize]
    }

    fn ledger_mut(&mut self, class: Class) -> &mut Ledger {
        &mut self.ledgers[class as usize]
    }

    /// Breaks the order between tenants.
    #[cfg(test)]
    pub fn plant(&mut self, fault: baton_fairness::Fault) {
        self.ledgers.iter_mut().for_each(|ledger| ledger.fault = Some(fault));
    }
}
