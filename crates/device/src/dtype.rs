//! Element types of stored tensors, and the formats a device can keep a weight in.

use std::fmt;

use crate::{BlockFormat, Code};

/// Element type of a tensor in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of an f32.
    BF16,
    /// Blocks along the last dimension, as GGUF files have them.
    Ggml(BlockFormat),
}

impl DType {
    /// Elements that are stored together; a row is a whole number of such blocks.
    pub const fn block(self) -> usize {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 1,
            DType::Ggml(format) => format.elements(),
        }
    }

    /// Bytes of `elements` elements, which are whole blocks.
    pub const fn bytes(self, elements: usize) -> usize {
        match self {
            DType::F32 => elements * 4,
            DType::F16 | DType::BF16 => elements * 2,
            DType::Ggml(format) => elements / format.elements() * format.bytes(),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::Ggml(format) => format.name(),
        })
    }
}

/// How a backend keeps a linear weight in its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WeightFormat {
    /// f32 weights, f32 activations.
    F32,
    /// f16 weights widened on use, f32 activations.
    F16,
    /// bf16 weights widened on use, f32 activations.
    BF16,
    /// Blocks as a GGUF file has them. A device may quantise the activations that meet them, as
    /// [`crate::int8`] says.
    Ggml(BlockFormat),
    /// Codes under scales as a checkpoint has them ([`crate::CodedSource`]).
    Coded(Code),
}

impl WeightFormat {
    /// Bytes that `elements` weights take in this format; of codes without their scales, which are as many as the checkpoint has.
    pub const fn bytes(self, elements: usize) -> usize {
        match self {
            WeightFormat::F32 => elements * 4,
            WeightFormat::F16 | WeightFormat::BF16 => elements * 2,
            WeightFormat::Ggml(format) => elements / format.elements() * format.bytes(),
            WeightFormat::Coded(code) => elements * code.bits() / 8,
        }
    }
}

impl From<DType> for WeightFormat {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => WeightFormat::F32,
            DType::F16 => WeightFormat::F16,
            DType::BF16 => WeightFormat::BF16,
            DType::Ggml(format) => WeightFormat::Ggml(format),
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WeightFormat::F32 => "f32",
            WeightFormat::F16 => "f16",
            WeightFormat::BF16 => "bf16",
            WeightFormat::Ggml(format) => format.name(),
            WeightFormat::Coded(code) => code.name(),
        })
    }
}
