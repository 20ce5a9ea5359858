//! What a device says of itself before anything is loaded onto it, for `baton doctor` and for reports, and what it does at most.
//!
//! Each device crate has a function that finds this out and does not fail: what is not there is written down in
//! [`DeviceFacts::missing`], with the reason.

use std::collections::BTreeMap;

/// A device as it was found, or not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceFacts {
    /// As an operator names it: `cpu`, `ascend:0`.
    pub device: String,
    /// The chip's or processor's own name, where it tells one.
    pub chip: Option<String>,
    /// Devices of this kind that were found.
    pub count: usize,
    /// Its memory.
    pub memory: Option<DeviceMemory>,
    /// Versions by what has them: `driver`, `toolkit`.
    pub versions: BTreeMap<String, String>,
    /// Libraries that were looked for.
    pub libraries: Vec<LibraryFacts>,
    /// Functions that were looked up in these, and whether they are there.
    pub symbols: BTreeMap<String, bool>,
    /// What else is worth knowing: `cores`, `instruction sets`.
    pub details: BTreeMap<String, String>,
    /// Every reason why it cannot serve; empty if it can.
    pub missing: Vec<String>,
}

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All of it.
    pub total: u64,
    /// What nobody uses.
    pub free: u64,
}

/// Memory of a device that steps take beside weights, activations and cache, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepMemory {
    /// What operations compute in, which is kept for them.
    pub scratch: u64,
    /// What a device will ask for that replays steps. It is not taken yet.
    pub graphs: u64,
}

/// A library by the role that it has for a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LibraryFacts {
    /// `runtime`, `operators`.
    pub role: String,
    /// Files that were opened, as they were found.
    pub opened: Vec<String>,
    /// Files that could not be, each with the loader's own words.
    pub tried: Vec<(String, String)>,
}

/// What a device does at most, measured; per second.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Bytes of its memory.
    pub bytes: f64,
    /// What was done with these: `read`, or `copy`, which counts those read and those written.
    pub access: &'static str,
    /// Multiply-adds by the type of what is multiplied: `f32`, `bf16`, `int8`.
    pub mul_adds: BTreeMap<String, f64>,
}
