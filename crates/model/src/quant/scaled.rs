//! One byte per element and a scale per block: DeepSeek's FP8 (`weight_scale_inv` over 128×128, edge
//! blocks partial), and compressed-tensors' `int-quantized`, `float-quantized` and `naive-quantized`
//! (a scale per tensor, per row, per group or per block).
//!
//! `value = (code - zero) * scale`. FP8 codes are those of arXiv 2209.05433: e4m3 has no infinity and
//! one NaN per sign, e5m2 is the upper half of an f16.

use std::fmt;
use std::ops::Range;

use baton_device::RowSource;
use half::f16;

use super::parts::{FLOATS, Parts, StoredTensor};
use crate::checkpoint::{CheckpointError, Part};
use crate::precision;

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
    fn stored_types(self) -> &'static [&'static str] {
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

    /// The values of all codes.
    fn table(self) -> [f32; 256] {
        std::array::from_fn(|code| match self {
            Codes::E4M3 => e4m3(code as u8),
            Codes::E5M2 => f16::from_bits((code as u16) << 8).to_f32(),
            Codes::I8 => f32::from(code as u8 as i8),
        })
    }
}

fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
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
            StoredTensor::scales(self.scales, grid, FLOATS),
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
        let scales = parts.floats(self.scales)?;
        let zeros =
            self.zero_points.then(|| parts.take("weight_zero_point").iter().map(|z| f32::from(*z as i8)).collect());
        let table = self.codes.table();
        let codes = parts.take("weight");
        if let Some(at) = precision::first_where(&codes, |[code]| !self.codes.is_finite(code)) {
            let value = table[usize::from(codes[at])];
            return Err(CheckpointError::NotFinite { tensor: format!("{}.weight", parts.module), element: at, value });
        }
        let cells = self.grid(shape);
        let block = [0, 1].map(|i| if self.block[i] == 0 { shape[i] } else { self.block[i] });
        Ok(Box::new(Rows { codes, table, scales, zeros, cols: shape[1], block, grid_cols: cells[1] }))
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
    /// `[out, in]`.
    codes: Part,
    table: [f32; 256],
    /// One per block, row-major.
    scales: Vec<f32>,
    zeros: Option<Vec<f32>>,
    cols: usize,
    block: [usize; 2],
    grid_cols: usize,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "scaled bytes, {} columns", self.cols)
    }
}

impl RowSource for Rows {
    fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        let mut out = Vec::with_capacity(rows.len() * self.cols);
        for row in rows {
            let codes = &self.codes[row * self.cols..][..self.cols];
            let cells = row / self.block[0] * self.grid_cols;
            for (cell, codes) in (cells..).zip(codes.chunks(self.block[1])) {
                let (scale, zero) = (self.scales[cell], self.zeros.as_ref().map_or(0.0, |z| z[cell]));
                out.extend(codes.iter().map(|code| (self.table[usize::from(*code)] - zero) * scale));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_mean_what_their_formats_say() {
        let e4m3 = Codes::E4M3.table();
        assert_eq!(
            [e4m3[0x7e], e4m3[0xfe], e4m3[0x08], e4m3[0x01], e4m3[0x38]],
            [448.0, -448.0, 0.015625, 0.001953125, 1.0]
        );
        assert_eq!(e4m3.iter().filter(|v| !v.is_finite()).count(), 2);
        assert!(e4m3[0x7f].is_nan() && e4m3[0xff].is_nan());
        let e5m2 = Codes::E5M2.table();
        assert_eq!([e5m2[0x7b], e5m2[0x01], e5m2[0x3c]], [57344.0, 2f32.powi(-16), 1.0]);
        assert_eq!(e5m2.iter().filter(|v| !v.is_finite()).count(), 8);
        for (codes, table) in [(Codes::E4M3, e4m3), (Codes::E5M2, e5m2), (Codes::I8, Codes::I8.table())] {
            assert!((0..=255).all(|code| codes.is_finite(code) == table[usize::from(code)].is_finite()));
        }
        assert_eq!([Codes::I8.table()[0x80], Codes::I8.table()[0x7f]], [-128.0, 127.0]);
    }
}
