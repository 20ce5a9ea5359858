//! The seam between models and devices.
//!
//! A model is written once against [`Backend`] (and [`LatentOps`], [`MoeOps`] where its family needs
//! them); a device implements those traits with about a dozen layer-level operations. Vendors cut
//! their own libraries at this level, so a backend may fuse, pack and reorder freely below it.
//! Tensor-level code is private to a backend; the alternative, a general tensor API, was refused
//! because it fixes layouts that devices must be free to choose.
//!
//! [`Reference`] is a real backend in naive f32: it runs every model, judges every kernel through
//! [`conformance`], and is the first code to read.

mod attention;
mod backend;
mod caps;
mod coded;
mod compressed;
pub mod conformance;
mod draw;
mod dtype;
mod error;
mod facts;
mod ggml;
mod host;
pub mod int8;
mod largest;
mod ranks;
mod reference;
mod routing;

pub use attention::{
    AttentionBatch, AttentionParams, KvBlocks, KvDtype, KvSpec, LayerKv, PASSED, RopeLayout, SequenceSpan, saturate_f16,
};
pub use backend::{Activation, Backend, Indexer, LatentOps, MoeOps, Rotary, Rows, TokenId, TokenIds};
pub use caps::{Caps, Op, Requirements};
pub use coded::{Code, CodedRows, CodedSource, Coding, widen};
pub use compressed::{CompressedOps, Entries, Mixing, PoolKv, Pooling, Reads, WindowedParams};
pub use draw::{Candidate, Draw, Drawer};
pub use dtype::{DType, WeightFormat};
pub use error::{DeviceError, Result};
pub use facts::{DeviceFacts, DeviceMemory, LibraryFacts, Limits, StepMemory};
pub use ggml::{BlockFormat, Unpacked};
pub use host::{ExpertSource, HostExperts, HostLatent, HostLinear, HostRope, HostTensor, Purpose, RowSource};
pub use largest::first_largest;
pub use ranks::{Communicator, World};
pub use reference::Reference;
pub use routing::{GroupScore, Groups, Routing, Scoring, select_experts, weigh_experts};
