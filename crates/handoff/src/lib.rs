//! The hand-off: what a training site hands over with a checkpoint, and the proof that this device still computes what
//! the trainer computed.
//!
//! A bundle is a checkpoint with `handoff.json` beside its weights ([`Manifest`]): a digest of every file, and golden
//! cases with the trainer's own log-probabilities. The cases are replayed through [`Replay`], which whoever has an
//! engine implements, and compared with the tolerances of the precision that is served. Invariant: a manifest is data
//! from outside; nothing of it is believed before it is checked, and no check of one bundle touches another.

mod digest;
mod manifest;
mod precision;
mod replay;

pub use digest::Digest;
pub use manifest::{Case, Chat, Computed, FileEntry, Manifest, ModelFacts, TensorEntry, Tolerances, Trained};
pub use precision::PrecisionClass;
pub use replay::{Replay, ReplayError, Replayed, Score, Task, Way};

/// Name of the manifest in a bundle.
pub const MANIFEST: &str = "handoff.json";

/// Name of its signature.
pub const SIGNATURE: &str = "handoff.json.minisig";
