//! Weights that a checkpoint stores quantised: which tensors stand for one matrix, and the f32 values
//! that they mean.
//!
//! A matrix keeps its logical shape `[out, in]` everywhere; its [`Encoding`] says which tensors lie in
//! the file instead of it. All but blocks are codes under scales ([`CodedSource`](baton_device::CodedSource)). A device
//! that keeps those is given them; for others they are widened a few rows at a time while the device packs them, so that
//! loading never holds a whole widened matrix.
//!
//! Invariant: what can be wrong with stored values (scales that are not finite, indices out of range,
//! NaN codes) is refused by [`Encoding::open`]; reading rows afterwards cannot fail. To add a format:
//! a file here, a variant of [`Encoding`], a parser in `config/quantization.rs`.

mod awq;
mod blocks;
mod gptq;
mod mxfp4;
mod packed;
mod parts;
mod scaled;

use std::fmt;

use baton_device::{BlockFormat, Code, RowSource};

pub(crate) use awq::Awq;
pub(crate) use blocks::Blocks;
pub(crate) use gptq::Gptq;
pub(crate) use mxfp4::Mxfp4;
pub(crate) use packed::Packed;
pub(crate) use parts::{FLOATS, Parts, StoredTensor};
pub(crate) use scaled::{Codes, Scaled};

use crate::checkpoint::{CheckpointError, Part};
use crate::precision;

/// Columns that share a scale on a device, at least.
const RUN: usize = 32;

/// How a quantised matrix is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// One byte per element, scales over blocks.
    Scaled(Scaled),
    /// compressed-tensors integers, packed along the rows.
    Packed(Packed),
    /// GPTQ.
    Gptq(Gptq),
    /// AWQ.
    Awq(Awq),
    /// Microscaling floats of four bits.
    Mxfp4(Mxfp4),
    /// Blocks of a GGUF format.
    Blocks(Blocks),
}

/// What stored tensors mean.
pub(crate) enum Values {
    /// Rows to be widened.
    Computed(Box<dyn RowSource>),
    /// Blocks that a device may keep.
    Blocks(BlockFormat, Part),
}

impl Encoding {
    /// The tensors that stand for a matrix `[out, in]`, or why its sizes do not fit.
    pub(crate) fn tensors(&self, shape: [usize; 2]) -> Result<Vec<StoredTensor>, String> {
        match self {
            Encoding::Scaled(format) => format.tensors(shape),
            Encoding::Packed(format) => format.tensors(shape),
            Encoding::Gptq(format) => format.tensors(shape),
            Encoding::Awq(format) => format.tensors(shape),
            Encoding::Mxfp4(format) => format.tensors(shape),
            Encoding::Blocks(format) => format.tensors(shape),
        }
    }

    /// Whether its weights' codes are in tensors of that type; asked of those that share a name with others.
    pub(crate) fn stores_weights_as(&self, stored: &str) -> bool {
        match self {
            Encoding::Scaled(format) => format.codes.stored_types().contains(&stored),
            Encoding::Mxfp4(format) => format.types.contains(&stored),
            Encoding::Packed(_) | Encoding::Gptq(_) | Encoding::Awq(_) | Encoding::Blocks(_) => false,
        }
    }

    /// The codes under scales that it is, unless it is blocks.
    pub(crate) fn code(&self) -> Option<Code> {
        match self {
            Encoding::Scaled(format) => Some(format.codes.code()),
            Encoding::Packed(format) => Some(format.code()),
            Encoding::Gptq(format) => Some(format.code()),
            Encoding::Awq(_) => Some(Code::Int4),
            Encoding::Mxfp4(_) => Some(Code::E2M1),
            Encoding::Blocks(_) => None,
        }
    }

    /// Whether it is worth keeping as codes in a matrix of `cols` columns, where a device has a scale for every [`RUN`]: smaller
    /// groups would be padded. Each of a layer's experts would need rows in an order of its own, so theirs have whole runs.
    pub(crate) fn lies_in_runs(&self, cols: usize, is_expert: bool) -> bool {
        let columns = match self {
            Encoding::Scaled(format) => format.block[1],
            Encoding::Packed(format) => format.group,
            Encoding::Gptq(format) => format.group,
            Encoding::Awq(format) => format.group,
            Encoding::Mxfp4(_) => mxfp4::BLOCK,
            Encoding::Blocks(_) => return false,
        };
        let is_row = columns == 0 || columns >= cols;
        if is_expert { !self.is_ordered() && (is_row || columns.is_multiple_of(RUN)) } else { is_row || columns >= RUN }
    }

    /// Whether the columns of a group may lie apart.
    fn is_ordered(&self) -> bool {
        match self {
            Encoding::Packed(format) => format.ordered,
            Encoding::Gptq(format) => format.desc_act,
            Encoding::Scaled(_) | Encoding::Awq(_) | Encoding::Mxfp4(_) | Encoding::Blocks(_) => false,
        }
    }

    /// The matrix that tensors of those shapes and types mean.
    pub(crate) fn open(&self, shape: [usize; 2], parts: Parts) -> Result<Values, CheckpointError> {
        let rows = match self {
            Encoding::Scaled(format) => format.open(shape, parts),
            Encoding::Packed(format) => format.open(shape, parts),
            Encoding::Gptq(format) => format.open(shape, parts),
            Encoding::Awq(format) => format.open(shape, parts),
            Encoding::Mxfp4(format) => format.open(shape, parts),
            Encoding::Blocks(format) => return format.open(shape, parts),
        };
        Ok(Values::Computed(rows?))
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Encoding::Scaled(format) => format.fmt(f),
            Encoding::Packed(format) => format.fmt(f),
            Encoding::Gptq(format) => format.fmt(f),
            Encoding::Awq(format) => format.fmt(f),
            Encoding::Mxfp4(format) => format.fmt(f),
            Encoding::Blocks(format) => format.fmt(f),
        }
    }
}

/// The integers of four or eight bits.
fn integers(bits: usize) -> Code {
    if bits == 4 { Code::Int4 } else { Code::Int8 }
}

/// Groups of `size` columns (0 for one group of all), or why there are none.
fn groups(cols: usize, size: usize) -> Result<usize, String> {
    match size {
        0 => Ok(1),
        size if cols.is_multiple_of(size) => Ok(cols / size),
        size => Err(format!("its {cols} columns are not whole groups of {size}")),
    }
}

/// `Ok` if `len` is whole words of `per_word` elements.
fn whole_words(len: usize, per_word: usize, what: &str) -> Result<usize, String> {
    if len.is_multiple_of(per_word) {
        return Ok(len / per_word);
    }
    Err(format!("its {len} {what} do not fill words of {per_word} elements"))
}

/// How a group size is shown.
fn group_text(size: usize) -> String {
    if size == 0 { "per channel".into() } else { format!("groups of {size}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_lie_in_runs_where_groups_are_large_enough_and_those_of_experts_in_whole_ones() {
        let gptq = |group, desc_act| Encoding::Gptq(Gptq { bits: 4, group, desc_act, zeros_less_one: true });
        let cases = [
            (gptq(0, false), [true, true]),
            (gptq(8, false), [false, false]),
            (gptq(16, true), [false, false]),
            (gptq(32, false), [true, true]),
            (gptq(32, true), [true, false]),
            (gptq(48, false), [true, false]),
            (gptq(96, false), [true, true]),
            (gptq(192, false), [true, true]),
            (Encoding::Mxfp4(Mxfp4::DEEPSEEK), [true, true]),
        ];
        for (encoding, expected) in cases {
            assert_eq!([false, true].map(|is_expert| encoding.lies_in_runs(192, is_expert)), expected, "{encoding}");
        }
        assert!(gptq(8, false).lies_in_runs(8, true));
    }
}
