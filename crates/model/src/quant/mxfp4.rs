//! MXFP4 (OCP Microscaling Formats v1.0) as compressed-tensors' `mxfp4-pack-quantized` stores it:
//! `weight_packed [out, in / 2]` holds two e2m1 floats per byte, the first in the lower half;
//! `weight_scale [out, in / 32]` the exponents (e8m0: 2^(byte - 127), 255 is NaN) of blocks of 32 columns.

use std::fmt;
use std::ops::Range;

use baton_device::RowSource;

use super::parts::{Parts, StoredTensor};
use crate::checkpoint::{CheckpointError, Part};

const BLOCK: usize = 32;
/// Values of the eight codes without a sign; the fourth bit is the sign.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
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
        Ok(Box::new(Rows { codes: parts.take("weight_packed"), exponents, cols }))
    }
}

impl fmt::Display for Mxfp4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mxfp4, blocks of {BLOCK}")
    }
}

struct Rows {
    /// `[out, in / 2]`.
    codes: Part,
    /// `[out, in / 32]`.
    exponents: Part,
    cols: usize,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mxfp4, {} columns", self.cols)
    }
}

impl RowSource for Rows {
    fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        let blocks = rows.start * self.cols / BLOCK..rows.end * self.cols / BLOCK;
        let mut out = Vec::with_capacity(rows.len() * self.cols);
        for block in blocks {
            let scale = 2f32.powi(i32::from(self.exponents[block]) - 127);
            let value = |code: u8| {
                let magnitude = E2M1[usize::from(code & 7)] * scale;
                if code & 8 == 0 { magnitude } else { -magnitude }
            };
            let codes = &self.codes[block * BLOCK / 2..][..BLOCK / 2];
            out.extend(codes.iter().flat_map(|byte| [value(byte & 15), value(byte >> 4)]));
        }
        out
    }
}
