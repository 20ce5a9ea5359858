//! The exported functions, one file for each kind of object.
//!
//! Invariant: pointers that the C ABI says are for results or texts are null or valid: callers promise that, and nobody can check it.

#![allow(non_snake_case)]

mod blas;
mod context;
mod copy;
mod event;
mod graph;
mod memory;
mod module;
mod nccl;
mod nvrtc;
mod stream;

pub use nvrtc::live as live_programs;

/// All of them, for tests.
#[cfg(test)]
pub mod exports {
    pub use super::{
        blas::*, context::*, copy::*, event::*, graph::*, memory::*, module::*, nccl::*, nvrtc::*, stream::*,
    };
}
