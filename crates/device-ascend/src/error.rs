//! What went wrong on the device, with everything that a report needs: the call, its code and name, and the library's own
//! words, which are read once, at once, on the thread that failed.

use std::fmt;

use baton_device::DeviceError;

use crate::abi::codes::{Class, describe, describe_collective};

/// A failed call.
#[derive(Debug, Clone, PartialEq)]
pub enum AscendError {
    /// A function of the libraries said so.
    Call {
        /// Its name.
        call: &'static str,
        /// What it returned.
        code: i32,
        /// The library's words.
        message: String,
        /// Whether the cause may be an earlier call: streams tell late.
        late: bool,
    },
    /// The device has no room, also when all that was free is given back.
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// The library's words.
        message: String,
    },
    /// A collective function said so; its numbers are others than those of [`AscendError::Call`].
    Collective {
        /// Its name.
        call: &'static str,
        /// What it returned.
        code: i32,
        /// What the library calls it.
        message: String,
    },
    /// The libraries lack an operator that is needed.
    Missing {
        /// Its name.
        operator: &'static str,
    },
    /// An object could not be made: the library gave null.
    Null {
        /// The call.
        call: &'static str,
    },
    /// A call failed that had been made by an operation before the one that met the failure.
    Collected {
        /// The operation of the seam that had made it.
        op: &'static str,
        /// How it failed.
        error: Box<AscendError>,
    },
    /// The owner thread has ended or panicked.
    Gone {
        /// How.
        reason: String,
    },
}

impl AscendError {
    /// What it calls for.
    pub fn class(&self) -> Class {
        match self {
            Self::Call { code, .. } => describe(*code).1,
            Self::OutOfMemory { .. } => Class::Memory,
            Self::Collective { code, .. } => describe_collective(*code).1,
            Self::Missing { .. } => Class::Unsupported,
            Self::Null { .. } => Class::Bug,
            Self::Collected { error, .. } => error.class(),
            Self::Gone { .. } => Class::Lost,
        }
    }

    /// As the seam tells it, of the device `device` during `op`.
    pub(crate) fn into_device_error(self, device: &str, op: &'static str) -> DeviceError {
        if let Self::Collected { op, error } = self {
            return error.into_device_error(device, op);
        }
        let device = device.to_owned();
        match (&self, self.class()) {
            (Self::OutOfMemory { bytes, .. }, _) => DeviceError::OutOfMemory { device, bytes: *bytes, what: op },
            (_, Class::Lost) => DeviceError::Lost { device, reason: format!("{op}: {self}") },
            (_, Class::Poisoned) => DeviceError::Poisoned { device, reason: format!("{op}: {self}") },
            _ => DeviceError::Execution { device, op, reason: self.to_string() },
        }
    }
}

impl fmt::Display for AscendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call { call, code, message, late } => {
                write!(f, "{call} gave {code} ({})", describe(*code).0)?;
                if !message.is_empty() {
                    write!(f, ": {}", message.trim_end())?;
                }
                if *late {
                    f.write_str("; the cause may be an earlier call")?;
                }
                Ok(())
            }
            Self::OutOfMemory { bytes, message } => {
                write!(f, "no room for {bytes} bytes: {}", message.trim_end())
            }
            Self::Collective { call, code, message } => {
                write!(f, "{call} gave {code} ({}): {}", describe_collective(*code).0, message.trim_end())
            }
            Self::Missing { operator } => write!(f, "CANN's libraries have no {operator}"),
            Self::Null { call } => write!(f, "{call} gave null"),
            Self::Collected { op, error } => write!(f, "{op}: {error}"),
            Self::Gone { reason } => write!(f, "the device's thread is gone: {reason}"),
        }
    }
}

impl std::error::Error for AscendError {}
