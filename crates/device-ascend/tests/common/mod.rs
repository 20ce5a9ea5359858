//! What the tests share: simulated devices.

#![allow(dead_code)] // each test file uses its part

pub mod layer;
pub mod simulator;

use std::time::Duration;

use baton_device::DType;
use baton_device_ascend::{AscendBackend, AscendOptions, Search};

pub use simulator::{Simulator, libraries};

/// A chip of each family, as the runtime calls it.
pub const A2: &str = "Ascend910B3";
pub const A3: &str = "Ascend910_9391";
pub const P310: &str = "Ascend310P3";

impl Simulator {
    /// Opens a simulated chip with activations of a type.
    pub fn open(&self, chip: &str, activations: DType) -> AscendBackend {
        self.control(&format!("soc={chip}"));
        AscendBackend::new(&options(activations)).unwrap()
    }

    /// As above, with fused operators where chip and shape allow.
    pub fn open_fused(&self, chip: &str, activations: DType) -> AscendBackend {
        self.control(&format!("soc={chip}"));
        AscendBackend::new(&AscendOptions { fused: true, ..options(activations) }).unwrap()
    }
}

/// The line about the form of a family of operations.
pub fn line(backend: &AscendBackend, start: &str) -> String {
    let lines = backend.forms();
    lines.iter().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start}: {lines:?}")).clone()
}

/// For a simulated device.
pub fn options(activations: DType) -> AscendOptions {
    AscendOptions {
        device: 0,
        search: Search { folder: Some(libraries()) },
        activations,
        timeout: Duration::from_secs(60),
        blocking: false,
        fused: false,
    }
}
