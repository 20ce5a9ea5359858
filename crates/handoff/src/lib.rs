//! The hand-off: what a training site hands over with a checkpoint, and the proof that this device still computes what
//! the trainer computed.
//!
//! A bundle is a checkpoint with `handoff.json` beside its weights ([`Manifest`]): a digest of every file, and golden
//! cases with the trainer's own log-probabilities. The cases are replayed through [`Replay`], which whoever has an
//! engine implements, and compared with the tolerances of the precision that is served. Invariant: a manifest is data
//! from outside; nothing of it is believed before it is checked, and no check of one bundle touches another.

mod bundle;
mod determinism;
mod digest;
mod feature;
mod html;
mod judge;
mod manifest;
mod names;
mod numerics;
mod parity;
mod place;
mod plots;
mod precision;
mod replay;
mod report;
mod rules;
mod signature;
mod strict;
mod table;
mod tensors;
mod text;
mod tolerances;
mod words;

pub use bundle::{Bundle, BundleError, FileProblem, Integrity, Snapshot};
pub use determinism::{Determinism, Found, Unequal, WayFinding, determinism};
pub use digest::Digest;
pub use feature::Feature;
pub use html::html;
pub use judge::{Finding, Measure, Verdict, judge};
pub use manifest::{
    Case, Chat, Computed, FORMAT, FileEntry, MAX_MANIFEST, Manifest, ManifestError, ModelFacts, TensorEntry,
    Tolerances, Trained, VERSION,
};
pub use numerics::{
    Bucket, ByPosition, CaseNote, Disagreement, Greedy, Largest, Likely, Numerics, Outcome, Parity, Perplexity, Top1,
    check_vocabulary, replay_case, replay_cases,
};
pub use parity::{CaseFault, CaseParity, PositionParity, Value, compare_case, task};
pub use precision::PrecisionClass;
pub use replay::{Replay, ReplayError, Replayed, Score, Task, Way};
pub use report::{BundleFacts, Check, CheckName, Column, Comparison, DeviceFacts, Report};
pub use signature::{KeyError, KeyId, SignatureStatus, TrustedKeys};
pub use tensors::TensorProblem;
pub use text::{Mismatch, TextDifference, TextParity, text_parity};
pub use tolerances::tolerances_for;

/// Name of the manifest in a bundle.
pub const MANIFEST: &str = "handoff.json";

/// Name of its signature.
pub const SIGNATURE: &str = "handoff.json.minisig";
