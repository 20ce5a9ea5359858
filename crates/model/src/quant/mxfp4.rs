//! MXFP4 (OCP Microscaling Formats v1.0) as compressed-tensors' `mxfp4-pack-quantized` and DeepSeek-V4's experts store it:
//! `weight_packed [out, in / 2]` (`weight` there) holds two e2m1 floats per byte, the first in the lower half;
//! `weight_scale [out, in / 32]` (`scale`) the exponents (e8m0) of blocks of 32 columns.

use std::fmt;
use std::ops::Range;

use baton_device::{Code, CodedRows, CodedSource, Coding, RowSource, widen};

use super::parts::{EXPONENTS, Parts, StoredTensor};
use crate::checkpoint::{CheckpointError, Part};

pub(super) const BLOCK: usize = 32;
/// Microscaling floats of four bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mxfp4 {
    /// Last part of the codes' name.
    codes: &'static str,
    /// Types that these bytes of two may have.
    pub(super) types: &'static [&'static str],
    /// Last part of the exponents' name.
    exponents: &'static str,
}

impl Mxfp4 {
    pub(crate) const COMPRESSED_TENSORS: Self =
        Self { codes: "weight_packed", types: &["U8"], exponents: "weight_scale" };
    pub(crate) const DEEPSEEK: Self = Self { codes: "weight", types: &["I8", "U8"], exponents: "scale" };

    pub(super) fn tensors(&self, [rows, cols]: [usize; 2]) -> Result<Vec<StoredTensor>, String> {
        let blocks = super::groups(cols, BLOCK)?;
        Ok(vec![
            StoredTensor::new(self.codes, vec![rows, cols / 2], self.types),
            StoredTensor::new(self.exponents, vec![rows, blocks], EXPONENTS),
        ])
    }

    pub(super) fn open(&self, [_, cols]: [usize; 2], mut parts: Parts) -> Result<Box<dyn RowSource>, CheckpointError> {
        let dtype = parts.float(self.exponents);
        let scales = parts.scales(self.exponents, Code::E2M1)?;
        let (groups, group_of) = (cols / BLOCK, Coding::groups_of(cols, BLOCK));
        let coding = Coding { code: Code::E2M1, scales: dtype, zeros: false, groups, group_of };
        Ok(Box::new(Rows { coding, codes: parts.take(self.codes), scales }))
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
    scales: Vec<f32>,
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
        CodedRows {
            codes: bytes.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect(),
            scales: self.scales[rows.start * groups..rows.end * groups].to_vec(),
            zeros: Vec::new(),
        }
    }
}
