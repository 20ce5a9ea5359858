//! The hand-off: what a training site hands over with a checkpoint, and the proof that this device still computes what
//! the trainer computed.
//!
//! A bundle is a checkpoint with `handoff.json` beside its weights ([`Manifest`]): a digest of every file, and golden
//! cases with the trainer's own log-probabilities. The cases are replayed through [`Replay`], which whoever has an
//! engine implements, and compared with the tolerances of the precision that is served. Invariant: a manifest is data
//! from outside; nothing of it is believed before it is checked, and no check of one bundle touches another.

mod bundle;
mod digest;
mod feature;
mod manifest;
mod names;
mod place;
mod precision;
mod replay;
mod rules;
mod signature;
mod strict;
mod tensors;

pub use bundle::{Bundle, BundleError, FileProblem, Integrity, Snapshot};
pub use digest::Digest;
pub use feature::Feature;
pub use manifest::{
    Case, Chat, Computed, FORMAT, FileEntry, MAX_MANIFEST, Manifest, ManifestError, ModelFacts, TensorEntry,
    Tolerances, Trained, VERSION,
};
pub use precision::PrecisionClass;
pub use replay::{Replay, ReplayError, Replayed, Score, Task, Way};
pub use signature::{KeyError, KeyId, SignatureStatus, TrustedKeys};
pub use tensors::TensorProblem;

/// Name of the manifest in a bundle.
pub const MANIFEST: &str = "handoff.json";

/// Name of its signature.
pub const SIGNATURE: &str = "handoff.json.minisig";
