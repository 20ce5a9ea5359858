//! What the seam's activations and parameter vectors are here: device memory with a shape.
//!
//! Invariant: shapes and addresses are plain data on the host; contents change only in the queue, in order.

use std::sync::Arc;

use baton_device::{DType, HostTensor, Result, Rows};

use crate::gpu::Gpu;
use crate::memory::Buffer;

/// Element type of an activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DataType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    BF16,
}

impl DataType {
    /// All of them.
    pub const ALL: [DataType; 3] = [DataType::F32, DataType::F16, DataType::BF16];

    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            DataType::F32 => 4,
            DataType::F16 | DataType::BF16 => 2,
        }
    }

    /// The type's name in kernels.
    pub const fn name(self) -> &'static str {
        match self {
            DataType::F32 => "float",
            DataType::F16 => "f16",
            DataType::BF16 => "bf16",
        }
    }

    /// That of a checkpoint's floats; `None` of blocks.
    pub const fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(DataType::F32),
            DType::F16 => Some(DataType::F16),
            DType::BF16 => Some(DataType::BF16),
            DType::Ggml(_) => None,
        }
    }

    /// The bytes of `values`, rounded to nearest even.
    pub(crate) fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            DataType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DataType::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
            DataType::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        }
    }

    /// The elements in `bytes`, widened.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut Vec<f32>) {
        match self {
            DataType::F32 => out.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
            DataType::F16 => out.extend(bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32())),
            DataType::BF16 => {
                out.extend(bytes.as_chunks().0.iter().map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)));
            }
        }
    }
}

/// An activation `[rows, cols]`, row-major. The operation that writes it says in which type: that of the activations, or f32
/// where the seam wants an exact sum (a weight in f32).
pub struct Tensor {
    buffer: Buffer,
    capacity: usize,
    cols: usize,
    rows: usize,
    dtype: DataType,
}

impl Tensor {
    /// With room for `capacity` rows of either type.
    pub(crate) fn new(gpu: &Arc<Gpu>, capacity: usize, cols: usize, dtype: DataType) -> Result<Self> {
        let buffer = gpu.alloc(capacity * cols * DataType::F32.bytes(), "activations")?;
        Ok(Self { buffer, capacity, cols, rows: 0, dtype })
    }

    /// Makes it the output of an operation, and gives the address to write to.
    pub(crate) fn output(&mut self, rows: usize, dtype: DataType) -> u64 {
        assert!(rows <= self.capacity, "{rows} rows in a tensor of {}", self.capacity);
        (self.rows, self.dtype) = (rows, dtype);
        self.address()
    }

    /// Where the first row is.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// In which type it was last written.
    pub(crate) fn dtype(&self) -> DataType {
        self.dtype
    }

    /// Bytes of the rows in use.
    pub(crate) fn bytes(&self) -> usize {
        self.rows * self.cols * self.dtype.bytes()
    }
}

impl Rows for Tensor {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }
}

/// A vector of parameters in f32.
pub struct Vector {
    buffer: Buffer,
    len: usize,
}

impl Vector {
    pub(crate) fn new(gpu: &Arc<Gpu>, src: &HostTensor<'_>) -> Result<Self> {
        let values = src.to_f32();
        let buffer = gpu.load(&DataType::F32.encode(&values), "parameters")?;
        Ok(Self { buffer, len: values.len() })
    }

    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}
