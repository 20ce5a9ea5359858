//! The blocks of a GGUF format, a row's after another in a tensor of bytes: how [`crate::quantize`] saves a
//! matrix. They are kept as they are, not widened.

use std::fmt;

use baton_device::{BlockFormat, DType, HostTensor};

use super::parts::{Parts, StoredTensor};
use super::{Values, precision};
use crate::checkpoint::CheckpointError;

/// A block format, and the one of rows that are not whole blocks of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub(crate) format: BlockFormat,
    pub(crate) fallback: BlockFormat,
}

impl Blocks {
    /// The format of a matrix `[_, cols]`.
    pub(crate) fn of(&self, cols: usize) -> BlockFormat {
        if cols.is_multiple_of(self.format.elements()) { self.format } else { self.fallback }
    }

    pub(super) fn tensors(&self, [rows, cols]: [usize; 2]) -> Result<Vec<StoredTensor>, String> {
        let format = self.of(cols);
        if !cols.is_multiple_of(format.elements()) {
            return Err(format!("its {cols} columns are not whole blocks of {format}"));
        }
        let row_bytes = DType::Ggml(format).bytes(cols);
        Ok(vec![StoredTensor::new("weight", vec![rows, row_bytes], &["U8"])])
    }

    pub(super) fn open(&self, shape: [usize; 2], mut parts: Parts) -> Result<Values, CheckpointError> {
        let format = self.of(shape[1]);
        let blocks = parts.take("weight");
        let name = format!("{}.weight", parts.module);
        match precision::first_non_finite(&HostTensor::new(&name, DType::Ggml(format), shape.to_vec(), &blocks)) {
            None => Ok(Values::Blocks(format, blocks)),
            Some((element, value)) => Err(CheckpointError::NotFinite { tensor: name.clone(), element, value }),
        }
    }
}

impl fmt::Display for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blocks of {}", self.format)
    }
}
