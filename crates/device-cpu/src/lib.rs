//! The CPU backend: SIMD kernels chosen at run time and a worker pool.
//!
//! Weights are packed at load into panels of 16 output rows, one lane each, so that an output is the
//! sum over K in the order of K, in one accumulator: the same operations whether its row is computed
//! alone or in a batch. Attention walks its context in pieces of one length from position 0 on.
//! Hence no bit of a row depends on the other rows, on how a sequence is cut into steps, or on the
//! number of threads; only the instruction set ([`Isa`]) may change bits.

// Pairs of bf16 are multiplied on x86-64 alone.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

mod affinity;
mod backend;
mod blocks;
mod cache;
mod facts;
mod isa;
mod kernels;
mod memory;
mod pool;
mod probe;
mod simd;
mod tensor;
mod topology;
mod weight;

pub use backend::{CpuBackend, CpuOptions};
pub use cache::{AttentionPlan, KvCache};
pub use facts::probe;
pub use isa::Isa;
pub use kernels::latent::Latent;
pub use kernels::moe::Experts;
pub use kernels::rope::Rope;
pub use tensor::Tensor;
pub use weight::Linear;
