//! What the tests share: simulated GPUs, and the cases they are judged by.

#![allow(dead_code)] // each test file uses its part

pub mod cases;
mod simulator;

use baton_device::DType;
use baton_device_cuda::{CudaBackend, CudaOptions};

pub use simulator::{Simulator, cache};

impl Simulator {
    /// Opens a simulated GPU with activations of a type.
    pub fn open(&self, activations: DType) -> CudaBackend {
        CudaBackend::new(&options(activations)).unwrap()
    }
}

/// For a simulated GPU.
pub fn options(activations: DType) -> CudaOptions {
    simulator::libraries();
    CudaOptions { activations, cache: Some(cache()), ..CudaOptions::default() }
}
