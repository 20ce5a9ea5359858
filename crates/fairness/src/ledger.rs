//! What the tenants of a class were served, and so whose turn it is among those that wait: of them whoever was served least.
//!
//! Each has a counter of what was computed for it, divided by its weight: the virtual counters of "Fairness in Serving
//! Large Language Models" (arXiv 2401.00588). A counter never falls. Whoever begins to wait is lifted to the least of those
//! that wait already, or else to whoever waited last: nobody is owed anything for a time in which it asked for nothing.
//! So as long as two tenants wait, what they are served differs by no more than what was under way when they began to,
//! whatever they ask for and however many requests they have.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Share, Tenant};

/// A counter's value for what counts 1, of a tenant of weight 1.
const UNIT: u128 = 1 << 32;

/// A tenant's place: the smallest is next. Of those that were served alike, whoever was given its last beginning longest ago.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Turn {
    served: u128,
    last_start: u64,
    /// Whose it is.
    pub tenant: Tenant,
}

/// What everybody was served, and who waits.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Of all that had requests since nobody had any.
    turns: BTreeMap<Tenant, Turn>,
    /// Of those that wait.
    waiting: BTreeSet<Turn>,
    /// Who had something waiting last.
    last: Option<Tenant>,
    starts: u64,
    /// What is left out.
    #[cfg(feature = "faults")]
    pub fault: Option<Fault>,
}

/// What is left out, for the simulator to see that it would notice.
#[cfg(feature = "faults")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Whoever begins to wait stays where it was.
    Lift,
    /// Nothing is counted.
    Charge,
    /// All weigh the same.
    Weight,
}

impl Ledger {
    /// The tenant's place, whether it waits or not.
    pub fn turn(&self, tenant: Tenant) -> Turn {
        self.turns.get(&tenant).copied().unwrap_or(Turn { served: 0, last_start: 0, tenant })
    }

    /// Whose turn it is of those that wait.
    pub fn first(&self) -> Option<Turn> {
        self.waiting.first().copied()
    }

    /// The tenant has something that waits.
    pub fn waits(&mut self, tenant: Tenant) {
        let mut turn = self.turn(tenant);
        if self.waiting.contains(&turn) {
            return;
        }
        let level = self.first().or(self.last.map(|last| self.turn(last)));
        #[cfg(feature = "faults")]
        let level = level.filter(|_| self.fault != Some(Fault::Lift));
        turn.served = turn.served.max(level.map_or(0, |level| level.served));
        self.turns.insert(tenant, turn);
        self.waiting.insert(turn);
    }

    /// Nothing of the tenant waits any more.
    pub fn rests(&mut self, tenant: Tenant) {
        self.waiting.remove(&self.turn(tenant));
        self.last = Some(tenant);
    }

    /// A request of the tenant was started.
    pub fn starts(&mut self, tenant: Tenant) {
        self.starts += 1;
        let last_start = self.starts;
        self.change(tenant, |turn| turn.last_start = last_start);
    }

    /// Something is computed for the tenant that counts so much.
    pub fn charge(&mut self, share: Share, count: u64) {
        let weight = share.weight.max(1);
        #[cfg(feature = "faults")]
        let (weight, count) = match self.fault {
            Some(Fault::Charge) => (weight, 0),
            Some(Fault::Weight) => (1, count),
            _ => (weight, count),
        };
        self.change(share.tenant, |turn| turn.served += u128::from(count) * UNIT / u128::from(weight));
    }

    /// Nobody has a request any more: all are alike.
    pub fn forget(&mut self) {
        self.turns.clear();
        self.waiting.clear();
        self.last = None;
    }

    fn change(&mut self, tenant: Tenant, change: impl FnOnce(&mut Turn)) {
        let mut turn = self.turn(tenant);
        let waits = self.waiting.remove(&turn);
        change(&mut turn);
        self.turns.insert(tenant, turn);
        if waits {
            self.waiting.insert(turn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(number: u8, weight: u32) -> Share {
        Share { tenant: Tenant([number; 32]), weight }
    }

    fn first(ledger: &Ledger) -> u8 {
        ledger.first().unwrap().tenant.0[0]
    }

    #[test]
    fn whoever_was_served_least_for_its_weight_is_next_and_of_equals_whoever_started_longest_ago() {
        let mut ledger = Ledger::default();
        (1..=3).for_each(|number| ledger.waits(share(number, 1).tenant));
        ledger.starts(share(1, 1).tenant);
        assert_eq!(first(&ledger), 2);
        ledger.starts(share(2, 1).tenant);
        ledger.starts(share(3, 1).tenant);
        assert_eq!(first(&ledger), 1);
        ledger.charge(share(1, 4), 100);
        ledger.charge(share(2, 1), 26);
        ledger.charge(share(3, 2), 60);
        assert_eq!(first(&ledger), 1);
        ledger.charge(share(1, 4), 5);
        assert_eq!(first(&ledger), 2);
        ledger.rests(share(2, 1).tenant);
        assert_eq!(first(&ledger), 1);
    }

    #[test]
    fn whoever_begins_to_wait_is_owed_nothing_and_owes_what_it_owed() {
        let mut ledger = Ledger::default();
        let [a, b, c] = [1, 2, 3].map(|number| share(number, 1));
        ledger.waits(a.tenant);
        ledger.charge(a, 100);
        // To the one that waits.
        ledger.waits(b.tenant);
        assert_eq!(ledger.turn(b.tenant).served, 100 * UNIT);
        ledger.charge(b, 50);
        ledger.rests(b.tenant);
        ledger.waits(b.tenant);
        assert_eq!(ledger.turn(b.tenant).served, 150 * UNIT);
        // To the one that waited last, where it is by now.
        ledger.rests(b.tenant);
        ledger.rests(a.tenant);
        ledger.charge(a, 30);
        ledger.waits(c.tenant);
        assert_eq!(ledger.turn(c.tenant).served, 130 * UNIT);
        ledger.forget();
        ledger.waits(a.tenant);
        assert_eq!(ledger.turn(a.tenant).served, 0);
    }
}
