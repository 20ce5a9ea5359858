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
