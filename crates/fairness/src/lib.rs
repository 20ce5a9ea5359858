//! Whose turn it is, between tenants that want more than there is: a [`Ledger`] of what each was served, by its [`Share`].
//!
//! Values only: no queue, no thread, no clock. Whoever has a queue tells the ledger who waits in it and what was computed for whom.

mod ledger;

#[cfg(feature = "faults")]
pub use ledger::Fault;
pub use ledger::{Ledger, Turn};

/// Somebody whose cached blocks, or whose requests, are counted together. The caller makes these distinct.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tenant(pub [u8; 32]);

/// Whose turn a request takes, and how much that tenant is given while others wait as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Whose.
    pub tenant: Tenant,
    /// How much, relative to others; 0 is as 1.
    pub weight: u32,
}

impl Default for Share {
    fn default() -> Self {
        Self { tenant: Tenant::default(), weight: 1 }
    }
}
