//! The Huawei Ascend backend. CANN's libraries are opened at run time, so the same binary starts without them and says what
//! is missing; one thread owns each device and makes all calls; an operation of the seam is queued and returns at once.
//! Only what comes to the host is waited for, and so are tokens: greedy ones are found on the device, others drawn on the host.
//!
//! Nothing here was run on hardware: it was written against the published ABI and is tested through a simulator that
//! exports the same functions (`crates/ascend-sim`). What the published documents leave open is marked UNCONFIRMED.

mod abi;
mod backend;
mod cache;
mod chip;
mod device;
mod error;
mod forms;
mod graphs;
mod installation;
mod latent;
mod libraries;
mod linear;
mod memory;
mod moe;
mod object;
mod ops;
mod owner;
mod plan;
mod probe;
mod quant;
mod ranks;
#[cfg(test)]
#[path = "../tests/common/simulator.rs"]
mod simulator;
mod tensor;
#[cfg(test)]
mod tests;

pub use abi::codes::{Class, describe};
pub use abi::consts::constants;
pub use backend::{AscendBackend, AscendOptions, Chosen};
pub use chip::Chip;
pub use error::AscendError;
pub use libraries::{Attempt, Role, Search, Unavailable};
pub use memory::MemoryUse;
pub use probe::probe;
