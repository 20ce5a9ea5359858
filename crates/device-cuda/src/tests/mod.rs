//! Tests of what is not visible from outside, on a simulated GPU.

mod memory;
mod queue;

use std::sync::Arc;

use crate::gpu::{Gpu, GpuOptions};
use crate::simulator::Simulator;

/// An open GPU of the simulator.
fn gpu(_: &Simulator) -> Arc<Gpu> {
    crate::libraries::ready("cuda:0").unwrap();
    Gpu::open(&GpuOptions { device: 0, cache: None, graphs: true, isolated: false }).unwrap()
}

/// Queues a copy on the device; the ranges do not overlap.
fn copy(gpu: &Gpu, from: u64, to: u64, bytes: usize) {
    gpu.call("copy", &[from, to, bytes as u64], move |context, stream| {
        // SAFETY: both ranges are the test's until the stream has passed.
        context.check("copy", unsafe { cudarc::driver::sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream) })
    })
    .unwrap();
}
