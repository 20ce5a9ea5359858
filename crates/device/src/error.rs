//! What can go wrong on a device. Expected failures only: a wrong shape passed by a model is a bug
//! of ours and panics with the shapes.

use crate::{DType, WeightFormat};

/// Result of a device operation.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// A failure that the caller must handle.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The device or its libraries are not there.
    #[error("device {device} is unavailable: {reason}")]
    Unavailable {
        /// Device as the operator named it.
        device: String,
        /// What is missing.
        reason: String,
    },
    /// A tensor of the checkpoint does not have the shape that the config implies.
    #[error("tensor {tensor} has shape {actual:?}; the config asks for {expected:?}")]
    Shape {
        /// Name in the checkpoint.
        tensor: String,
        /// Shape found.
        actual: Vec<usize>,
        /// Shape wanted.
        expected: Vec<usize>,
    },
    /// The device cannot keep a weight in the wanted format.
    #[error("tensor {tensor} ({dtype}) cannot be kept as {format}: {reason}")]
    Format {
        /// Name in the checkpoint.
        tensor: String,
        /// Element type in the checkpoint.
        dtype: DType,
        /// Format asked for.
        format: WeightFormat,
        /// Why not, and what would do.
        reason: String,
    },
    /// A weight could not be read while it was prepared.
    #[error(transparent)]
    Source(Box<dyn std::error::Error + Send + Sync>),
    /// Memory could not be had.
    #[error("device {device} has no room for {bytes} bytes of {what}")]
    OutOfMemory {
        /// Device name.
        device: String,
        /// Bytes asked for.
        bytes: usize,
        /// What they were for.
        what: &'static str,
    },
    /// The device is gone, or does not answer: what it holds is lost, and nothing more can be asked of it.
    #[error("device {device} is lost: {reason}")]
    Lost {
        /// Device name.
        device: String,
        /// The device's own words, or how long it was waited for.
        reason: String,
    },
    /// The device is there, but the context that holds everything made for it is broken: nothing more can be asked of
    /// this backend. Another one, loaded in its place, sets the device up anew.
    #[error("device {device} must be set up anew: {reason}")]
    Poisoned {
        /// Device name.
        device: String,
        /// The device's own words.
        reason: String,
    },
    /// The device reported an error while running.
    #[error("device {device} failed in {op}: {reason}")]
    Execution {
        /// Device name.
        device: String,
        /// Operation that failed.
        op: &'static str,
        /// The device's own words.
        reason: String,
    },
}
