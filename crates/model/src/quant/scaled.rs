//! One byte per element and a scale per block: DeepSeek's FP8 (`weight_scale_inv`, in V4 `scale`, over 128×128, edge
//! blocks partial), and compressed-tensors' `int-quantized`, `float-quantized` and `naive-quantized`
//! (a scale per tensor, per row, per group or per block).
//!
//! `value = (code - zero) * scale`. FP8 codes are those of arXiv 2209.05433: e4m3 has no infinity and
//! one NaN per sign, e5m2 is the upper half of an f16.

use std::fmt;
use std::ops::Range;

use baton_device::{Code, CodedRows, CodedSource, Coding, RowSource, widen};

use super::parts::{FLOATS, Parts, StoredTensor};
use crate::checkpoint::{CheckpointError, Part};
use crate::precision;

/// Types that scales may have; the last is exponents.
const SCALES: &[&str] = &["F32", "BF16", "F16", "F8_E8M0"];

/// What a byte means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codes {
    /// Four bits of exponent, three of mantissa, finite but for one code.
    E4M3,
    /// Five bits of exponent, two of mantissa, as IEEE 754 would have it.
    E5M2,
    /// Two's complement.
    I8,
}

impl Codes {
    pub(super) fn stored_types(self) -> &'static [&'static str] {
        match self {
            Codes::E4M3 => &["F8_E4M3"],
            Codes::E5M2 => &["F8_E5M2"],
            Codes::I8 => &["I8"],
        }
    }

    fn is_finite(self, code: u8) -> bool {
        match self {
            Codes::E4M3 => code & 0x7f != 0x7f,
            Codes::E5M2 => code & 0x7c != 0x7c,
            Codes::I8 => true,
        }
    }

    pub(super) fn code(self) -> Code {
        match self {
            Codes::E4M3 => Code::E4M3,
            Codes::E5M2 => Code::E5M2,
            Codes::I8 => Code::Int8,
        }
    }
}

/// One byte per element, a scale per block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scaled {
    pub(crate) codes: Codes,
    /// Rows and columns of a block; 0 for all.
    pub(crate) block: [usize; 2],
    /// Last part of the scales' name.
    pub(crate) scales: &'static str,
    /// Zero points beside the scales.
    pub(crate) zero_points: bool,
    /// Whether a fixed scale of the inputs may lie there, which is not used: inputs are not quantised.
    pub(crate) input_scale: bool,
    /// Whether edge blocks may be partial.
    pub(crate) partial: bool,
}

impl Scaled {
    /// Blocks along rows and columns.
    fn grid(&self, shape: [usize; 2]) -> [usize; 2] {
        [0, 1].map(|i| if self.block[i] == 0 { 1 } else { shape[i].div_ceil(self.block[i]) })
    }

    pub(super) fn tensors(&self, shape: [usize; 2]) -> Result<Vec<StoredTensor>, String> {
        if !self.partial {
            super::groups(shape[1], self.block[1])?;
        }
        let grid = self.grid(shape);
        let mut tensors = vec![
            StoredTensor::new("weight", shape.to_vec(), self.codes.stored_types()),
            StoredTensor::scales(self.scales, grid, SCALES),
        ];
        if self.zero_points {
            tensors.push(StoredTensor::scales("weight_zero_point", grid, &["I8"]));
        }
        if self.input_scale {
            tensors.push(StoredTensor::scales("input_scale", [1, 1], FLOATS).optional());
            tensors.push(StoredTensor::scales("input_zero_point", [1, 1], &["I8"]).optional());
        }
        Ok(tensors)
    }

    pub(super) fn open(&self, shape: [usize; 2], mut parts: Parts) -> Result<Box<dyn RowSource>, CheckpointError> {
        let dtype = parts.float(self.scales);
        let scales = parts.scales(self.scales, self.codes.code())?;
        let bytes = parts.take("weight");
        if let Some(at) = precision::first_where(&bytes, |[code]| !self.codes.is_finite(code)) {
            let value = self.codes.code().numbers()[usize::from(bytes[at])];
            return Err(CheckpointError::NotFinite { tensor: format!("{}.weight", parts.module), element: at, value });
        }
        let [_, groups] = self.grid(shape);
        let block = [0, 1].map(|i| if self.block[i] == 0 { shape[i] } else { self.block[i] });
        let (code, zeros, group_of) = (self.codes.code(), self.zero_points, Coding::groups_of(shape[1], block[1]));
        Ok(Box::new(Rows {
            coding: Coding { code, scales: dtype, zeros, groups, group_of },
            bytes,
            scales,
            zeros: self.zero_points.then(|| parts.take("weight_zero_point")),
            block: block[0],
        }))
    }
}

impl fmt::Display for Scaled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.codes {
            Codes::E4M3 => "fp8 e4m3",
            Codes::E5M2 => "fp8 e5m2",
            Codes::I8 => "int8",
        })?;
        match self.block {
            [0, 0] => f.write_str(", per tensor"),
            [1, 0] => f.write_str(", per channel"),
            [1, cols] => write!(f, ", groups of {cols}"),
            [rows, cols] => write!(f, ", blocks of {rows}x{cols}"),
        }?;
        if self.zero_points { f.write_str(", zero points") } else { Ok(()) }
    }
}

struct Rows {
    coding: Coding,
    /// `[out, in]`, as stored.
    bytes: Part,
    /// One per block, row-major.
    scales: Vec<f32>,
    zeros: Option<Part>,
    /// Rows of a block.
    block: usize,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "scaled bytes, {} columns", self.coding.group_of.len())
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
        let Coding { code, groups, ref group_of, .. } = self.coding;
        let codes = |bytes: &[u8]| match code {
            // Two's complement, counted from the lowest.
            Code::Int8 => bytes.iter().map(|byte| byte ^ 0x80).collect(),
            _ => bytes.to_vec(),
        };
        let cells = || rows.clone().map(|row| row / self.block * groups..(row / self.block + 1) * groups);
        CodedRows {
            codes: codes(&self.bytes[rows.start * group_of.len()..rows.end * group_of.len()]),
            scales: cells().flat_map(|cells| &self.scales[cells]).copied().collect(),
            zeros: self.zeros.iter().flat_map(|zeros| cells().flat_map(|cells| codes(&zeros[cells]))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_that_are_refused_are_those_without_a_finite_number() {
        for codes in [Codes::E4M3, Codes::E5M2, Codes::I8] {
            let numbers = codes.code().numbers();
            assert!((0..=255).all(|code| codes.is_finite(code) == numbers[usize::from(code)].is_finite()));
        }
    }
}
