//! What the simulator is told to be and to do wrong, by environment at the start and by `ascend_sim_control` later.
//!
//! Invariant: both have the same grammar, `key=value`; `ASCEND_SIM_KEY=value` is what `ascend_sim_control("key=value")` is.

use std::{ffi::CString, time::Duration};

use crate::array::{Chip, Refusal};

/// What can be set.
pub struct Settings {
    /// As `aclrtGetSocName` gives it.
    pub soc: CString,
    pub devices: u32,
    /// Bytes of memory that each device has.
    pub memory: u64,
    pub perturb: bool,
    pub version: CString,
    /// Whether the library is one of those that are made for linking only.
    pub stub: bool,
    /// What each queued copy takes.
    pub copy_delay: Duration,
}

impl Settings {
    pub fn from_environment() -> Self {
        Self {
            soc: c"Ascend910B3".to_owned(),
            devices: 1,
            memory: 1 << 31,
            perturb: false,
            version: c"8.5.0".to_owned(),
            stub: false,
            copy_delay: Duration::ZERO,
        }
    }

    pub fn chip(&self) -> Chip {
        match self.soc.to_bytes() {
            s if s.starts_with(b"Ascend310P") => Chip::P310,
            s if s.starts_with(b"Ascend910_93") => Chip::A3,
            _ => Chip::A2,
        }
    }

    /// What phase 1 of an operator is to refuse.
    pub fn admit_operator(&mut self, _name: &str) -> Result<(), Refusal> {
        Ok(())
    }

    /// What was injected into a call of the symbol.
    pub fn admit(&mut self, _symbol: &str) -> Result<(), Refusal> {
        Ok(())
    }
}
