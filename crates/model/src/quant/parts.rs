//! The stored tensors of one quantised matrix, by the last part of their names.

use std::collections::BTreeMap;

use baton_device::{Code, DType, HostTensor};

use crate::checkpoint::{CheckpointError, Part};
use crate::precision;

/// Types that scales may have.
pub(crate) const FLOATS: &[&str] = &["F32", "BF16", "F16"];
/// Types of scales that are exponents (e8m0): 2^(byte - 127), and 255 is NaN.
pub(crate) const EXPONENTS: &[&str] = &["U8", "F8_E8M0"];

/// A tensor that an encoding asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredTensor {
    /// Name after that of the module.
    pub(crate) suffix: &'static str,
    /// Any of these shapes.
    pub(crate) shapes: Vec<Vec<usize>>,
    /// Any of these types.
    pub(crate) types: &'static [&'static str],
    /// Whether it may be left out.
    pub(crate) optional: bool,
}

impl StoredTensor {
    pub(crate) fn new(suffix: &'static str, shape: Vec<usize>, types: &'static [&'static str]) -> Self {
        Self { suffix, shapes: vec![shape], types, optional: false }
    }

    /// Scales of a grid; where there is one scale per row or one in all, also the shorter shapes in use.
    pub(crate) fn scales(suffix: &'static str, grid: [usize; 2], types: &'static [&'static str]) -> Self {
        let mut shapes = vec![grid.to_vec()];
        if grid[1] == 1 {
            shapes.push(vec![grid[0]]);
        }
        if grid == [1, 1] {
            shapes.push(Vec::new());
        }
        Self { suffix, shapes, types, optional: false }
    }

    pub(crate) fn optional(self) -> Self {
        Self { optional: true, ..self }
    }
}

/// The mapped tensors of one matrix, of the shapes and types asked for.
pub(crate) struct Parts {
    /// Name of the module.
    pub(crate) module: String,
    /// Type and bytes by suffix.
    pub(crate) parts: BTreeMap<&'static str, (&'static str, Part)>,
}

impl Parts {
    pub(crate) fn has(&self, suffix: &str) -> bool {
        self.parts.contains_key(suffix)
    }

    /// Bytes of the tensors together.
    pub(crate) fn bytes(&self) -> u64 {
        self.parts.values().map(|(_, part)| part.len() as u64).sum()
    }

    /// Takes the bytes of a tensor.
    ///
    /// # Panics
    /// If it is not there: only optional ones may be missing.
    pub(crate) fn take(&mut self, suffix: &str) -> Part {
        self.parts.remove(suffix).unwrap_or_else(|| panic!("{}.{suffix} was verified", self.module)).1
    }

    /// The type of floats; of exponents that which has f32's.
    pub(crate) fn float(&self, suffix: &str) -> DType {
        match self.parts[suffix].0 {
            "F32" => DType::F32,
            "F16" => DType::F16,
            _ => DType::BF16,
        }
    }

    /// Copies finite floats, or what exponents mean.
    pub(crate) fn floats(&mut self, suffix: &str) -> Result<Vec<f32>, CheckpointError> {
        let dtype = self.float(suffix);
        let are_exponents = EXPONENTS.contains(&self.parts[suffix].0);
        let (name, part) = (self.name(suffix), self.take(suffix));
        if are_exponents {
            return match part.iter().position(|exponent| *exponent == u8::MAX) {
                None => Ok(part.iter().map(|exponent| power(*exponent)).collect()),
                Some(element) => Err(CheckpointError::NotFinite { tensor: name, element, value: f32::NAN }),
            };
        }
        let host = HostTensor::new(&name, dtype, vec![part.len() / dtype.bytes(1)], &part);
        match precision::first_non_finite(&host) {
            None => Ok(host.to_f32()),
            Some((element, value)) => Err(CheckpointError::NotFinite { tensor: name, element, value }),
        }
    }

    /// As above, of scales: with any of them, all finite codes mean finite numbers.
    pub(crate) fn scales(&mut self, suffix: &str, code: Code) -> Result<Vec<f32>, CheckpointError> {
        let scales = self.floats(suffix)?;
        let largest = code.numbers().iter().filter(|number| number.is_finite()).fold(0.0, |a: f32, b| a.max(*b));
        match scales.iter().position(|scale| !(scale * largest).is_finite()) {
            None => Ok(scales),
            Some(at) => Err(self.refuse(suffix, format!("scale {at} is {}, beyond f32 with {largest}", scales[at]))),
        }
    }

    /// Copies 32-bit words.
    pub(crate) fn words(&mut self, suffix: &str) -> Vec<u32> {
        self.take(suffix).as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
    }

    /// The groups of all columns, each below `groups`.
    pub(crate) fn group_indices(&mut self, suffix: &str, groups: usize) -> Result<Vec<u32>, CheckpointError> {
        let indices = self.words(suffix);
        match indices.iter().position(|g| *g as usize >= groups) {
            None => Ok(indices),
            Some(column) => Err(self.refuse(
                suffix,
                format!("column {column} belongs to group {}, there are {groups}", indices[column] as i32),
            )),
        }
    }

    pub(crate) fn refuse(&self, suffix: &str, reason: String) -> CheckpointError {
        CheckpointError::Quantized { tensor: self.name(suffix), reason }
    }

    fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.module)
    }
}

/// The number that an exponent below 255 means; the least is subnormal.
fn power(exponent: u8) -> f32 {
    f32::from_bits(if exponent == 0 { 1 << 22 } else { u32::from(exponent) << 23 })
}

/// Element `index` of a row of 32-bit words that hold `32 / bits` elements each, the first lowest.
pub(super) fn unpack(word: u32, index: usize, bits: usize) -> u32 {
    word >> (index * bits) & ((1 << bits) - 1)
}

/// Word `index` of stored bytes.
pub(super) fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(bytes.as_chunks().0[index])
}
