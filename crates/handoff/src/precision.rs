//! Classes of precision: what is rounded beyond what the trainer's golden values were.

use std::fmt;

use serde::{Deserialize, Serialize};

/// From exact to coarse: what holds of a class is expected of all before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionClass {
    /// Nothing: weights as stored, arithmetic in float32.
    Float32,
    /// Activations, weights or cache in bf16 or f16.
    Half,
    /// Weights, activations or cache in 8 bits.
    Int8,
    /// Weights in 4 to 6 bits.
    Int4,
}

impl fmt::Display for PrecisionClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float32 => "float32",
            Self::Half => "half",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}
