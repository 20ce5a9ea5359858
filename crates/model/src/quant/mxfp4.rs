//! MXFP4 (OCP Microscaling Formats v1.0) as compressed-tensors' `mxfp4-pack-quantized` stores it:
//! `weight_packed [out, in / 2]` holds two e2m1 floats per byte, the first in the lower half;
//! `weight_scale [out, in / 32]` the exponents (e8m0: 2^(byte - 127), 255 is NaN) of blocks of 32 columns.

use std::fmt;
use std::ops::Range;

use baton_device::{Code, CodedRows, CodedSource, Coding, DType, RowSource, widen};

use super::parts::{Parts, StoredTensor};
use crate::checkpoint::{CheckpointError, Part};

pub(super) const BLOCK: usize = 32;
/// The exponents' NaN.
const NAN: u8 = 255;
/// The largest exponent with which six, the largest code, is below 2^128.
const LARGEST: u8 = 127 + 125;

/// Microscaling floats of four bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mxfp4;

impl Mxfp4 {
    pub(super) fn tensors(&self, [rows, cols]: [usize; 2]) -> Result<Vec<StoredTensor>, String> {
        let blocks = super::groups(cols, BLOCK)?;
        Ok(vec![
            StoredTensor::new("weight_packed", vec![rows, cols / 2], &["U8"]),
            StoredTensor::new("weight_scale", vec![rows, blocks], &["U8", "F8_E8M0"]),
        ])
    }

    pub(super) fn open(&self, [_, cols]: [usize; 2], mut parts: Parts) -> Result<Box<dyn RowSource>, CheckpointError> {
        let exponents = parts.take("weight_scale");
        if let Some(at) = exponents.iter().position(|e| *e == NAN) {
            let tensor = format!("{}.weight_scale", parts.module);
            return Err(CheckpointError::NotFinite { tensor, element: at, value: f32::NAN });
        }
        if let Some(at) = exponents.iter().position(|e| *e > LARGEST) {
            return Err(parts.refuse("weight_scale", format!("exponent {at} is {}, beyond f32", exponents[at])));
        }
        let (groups, group_of) = (cols / BLOCK, Coding::groups_of(cols, BLOCK));
        // It has f32's exponents.
        let coding = Coding { code: Code::E2M1, scales: DType::BF16, zeros: false, groups, group_of };
        Ok(Box::new(Rows { coding, codes: parts.take("weight_packed"), exponents }))
    }
}

impl fmt::Display for Mxfp4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mxfp4, blocks of {BLOCK}")
    }
}

struct Rows {
    coding: Coding,
    /// `[out, in / 2]`.
    codes: Part,
    /// `[out, in / 32]`.
    exponents: Part,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mxfp4, {} columns", self.coding.group_of.len())
    }
}

impl RowSource for Rows {
    fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        widen(self, rows)
    }

    fn as_coded(&self) -> Option<&dyn CodedSource> {
        Some(self)
    }
}

impl CodedSource for Rows {
    fn coding(&self) -> &Coding {
        &self.coding
    }

    fn codes(&self, rows: Range<usize>) -> CodedRows {
        let (cols, groups) = (self.coding.group_of.len(), self.coding.groups);
        let bytes = &self.codes[rows.start * cols / 2..rows.end * cols / 2];
        let exponents = &self.exponents[rows.start * groups..rows.end * groups];
        CodedRows {
            codes: bytes.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect(),
            scales: exponents.iter().map(|exponent| 2f32.powi(i32::from(*exponent) - 127)).collect(),
            zeros: Vec::new(),
        }
    }
}
