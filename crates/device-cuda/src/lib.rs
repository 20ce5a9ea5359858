//! The NVIDIA backend: CUDA's libraries opened at run time, so that the same binary starts without them and says what is
//! missing; kernels compiled for the GPU that is found; a step's launches collected and replayed as a graph.
//!
//! Nothing here was run on hardware: it was written against the published API, kernels are compiled by the real
//! compiler, and it is tested through a simulator that exports the same functions (`crates/cuda-sim`).

mod attention;
mod backend;
mod blas;
mod blocks;
mod cache;
mod choose;
mod coded;
mod compiler;
mod context;
mod error;
mod gpu;
mod heads;
mod latent;
mod libraries;
mod limits;
mod linear;
mod memory;
mod moe;
mod nccl;
mod order;
mod plan;
mod probe;
mod program;
mod queue;
mod ranks;
mod rows;
#[cfg(test)]
#[path = "../tests/common/simulator.rs"]
mod simulator;
mod staging;
mod statistics;
mod tensor;
#[cfg(test)]
mod tests;
mod weights;

pub use backend::{CudaBackend, CudaOptions};
pub use compiler::compile;
pub use probe::probe;
pub use program::Source;
pub use statistics::Statistics;
pub use tensor::DataType;
