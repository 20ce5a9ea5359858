//! What a device says of itself before anything is loaded onto it, for `baton doctor` and for reports.
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
    /// Libraries that were looked for, in that order.
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

/// A library that was opened or tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibraryFacts {
    /// What it is for: `runtime`, `operators`.
    pub role: String,
    /// The file, as it was looked for.
    pub file: String,
    /// Why it does not serve, in the loader's own words; `None` if it does.
    pub problem: Option<String>,
}
