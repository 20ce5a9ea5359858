//! What a checkpoint may need of a device.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A word of `requires`. Another one is refused by name, since nobody could say that the device has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    /// Attention over compressed keys and values.
    LatentAttention,
    /// Feed-forward layers of which a router picks some.
    MixtureOfExperts,
    /// Layers that see the last tokens only.
    SlidingWindow,
    /// Weights stored in bfloat16.
    Bfloat16,
    /// Weights stored in float16.
    Float16,
    /// Weights stored in 8-bit floats with scales.
    Fp8,
    /// Weights stored in 4-bit floats with a scale for each 32.
    Mxfp4,
    /// Weights stored in 8-bit integers.
    Int8,
    /// Weights stored in 4-bit integers.
    Int4,
}

impl Feature {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::LatentAttention,
        Self::MixtureOfExperts,
        Self::SlidingWindow,
        Self::Bfloat16,
        Self::Float16,
        Self::Fp8,
        Self::Mxfp4,
        Self::Int8,
        Self::Int4,
    ];

    /// As the manifest has it.
    pub fn word(self) -> &'static str {
        match self {
            Self::LatentAttention => "latent_attention",
            Self::MixtureOfExperts => "mixture_of_experts",
            Self::SlidingWindow => "sliding_window",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
            Self::Fp8 => "fp8",
            Self::Mxfp4 => "mxfp4",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_read_as_it_is_written_and_an_unknown_one_is_named_with_all_that_are_known() {
        for feature in Feature::ALL {
            assert_eq!(serde_json::to_value(feature).unwrap(), feature.word());
            assert_eq!(serde_json::from_value::<Feature>(feature.word().into()).unwrap(), feature);
        }
        let error = serde_json::from_value::<Feature>("telepathy".into()).unwrap_err().to_string();
        assert!(error.contains("`telepathy`"), "{error}");
        assert!(Feature::ALL.iter().all(|f| error.contains(f.word())), "{error}");
    }
}
