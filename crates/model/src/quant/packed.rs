//! compressed-tensors' `pack-quantized`: unsigned integers of four or eight bits, the signed value plus
//! half the range, packed along the columns into 32-bit words, the first lowest; the last word of a row
//! is padded. Zero points are packed the same way, but along the rows.
//!
//! `value = (q - zero) * scale`, with one scale per row and group; `weight_g_idx` gives the group of
//! each column where they were quantised in order of their activations.

use std::fmt;
use std::ops::Range;

use baton_device::{Code, CodedRows, CodedSource, Coding, RowSource, widen};

use super::parts::{FLOATS, Parts, StoredTensor, unpack, word};
use crate::checkpoint::{CheckpointError, Part};

/// Integers packed along the columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packed {
    /// 4 or 8.
    pub(crate) bits: usize,
    /// Columns of a group; 0 for all.
    pub(crate) group: usize,
    /// One scale in all instead of one per row and group.
    pub(crate) per_tensor: bool,
    pub(crate) zero_points: bool,
    /// Groups are listed by column.
    pub(crate) ordered: bool,
}

impl Packed {
    fn per_word(&self) -> usize {
        32 / self.bits
    }

    pub(super) fn tensors(&self, [rows, cols]: [usize; 2]) -> Result<Vec<StoredTensor>, String> {
        let groups = super::groups(cols, self.group)?;
        let mut tensors = vec![
            StoredTensor::new("weight_packed", vec![rows, cols.div_ceil(self.per_word())], &["I32"]),
            StoredTensor::scales("weight_scale", if self.per_tensor { [1, 1] } else { [rows, groups] }, FLOATS),
            StoredTensor::new("weight_shape", vec![2], &["I64", "I32"]),
        ];
        if self.zero_points {
            let shape = vec![rows.div_ceil(self.per_word()), groups];
            tensors.push(StoredTensor::new("weight_zero_point", shape, &["I32"]));
        }
        if self.ordered {
            tensors.push(StoredTensor::new("weight_g_idx", vec![cols], &["I32"]));
        }
        Ok(tensors)
    }

    pub(super) fn open(
        &self,
        [rows, cols]: [usize; 2],
        mut parts: Parts,
    ) -> Result<Box<dyn RowSource>, CheckpointError> {
        let groups = super::groups(cols, self.group).expect("verified");
        let shape = parts.take("weight_shape");
        let stated: Vec<i64> = match shape.len() {
            16 => shape.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            _ => shape.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
        };
        if stated != [rows as i64, cols as i64] {
            return Err(
                parts.refuse("weight_shape", format!("it states {stated:?}, the config asks for [{rows}, {cols}]"))
            );
        }
        let dtype = parts.float("weight_scale");
        let mut scales = parts.floats("weight_scale")?;
        if self.per_tensor {
            scales = vec![scales[0]; rows];
        }
        let group_of = if self.ordered {
            parts.group_indices("weight_g_idx", groups)?
        } else {
            Coding::groups_of(cols, cols / groups)
        };
        Ok(Box::new(Rows {
            coding: Coding { code: self.code(), scales: dtype, zeros: self.zero_points, groups, group_of },
            scales,
            zeros: self.zero_points.then(|| parts.words("weight_zero_point")),
            words: parts.take("weight_packed"),
        }))
    }

    pub(super) fn code(&self) -> Code {
        super::integers(self.bits)
    }
}

impl fmt::Display for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = if self.per_tensor { "per tensor".into() } else { super::group_text(self.group) };
        write!(f, "packed int{}, {groups}", self.bits)?;
        f.write_str(if self.zero_points { ", zero points" } else { "" })?;
        f.write_str(if self.ordered { ", in order of activations" } else { "" })
    }
}

struct Rows {
    coding: Coding,
    /// `[out, words]`.
    words: Part,
    /// `[out, groups]`.
    scales: Vec<f32>,
    /// `[out / per word, groups]`.
    zeros: Option<Vec<u32>>,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "packed integers, {} columns", self.coding.group_of.len())
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
        let (bits, cols, per_word) = (code.bits(), group_of.len(), 32 / code.bits());
        let words = cols.div_ceil(per_word);
        let mut codes = Vec::with_capacity(rows.len() * cols);
        for row in rows.clone() {
            let word = |col: usize| word(&self.words, row * words + col / per_word);
            codes.extend((0..cols).map(|col| unpack(word(col), col % per_word, bits) as u8));
        }
        let zeros = self.zeros.iter().flat_map(|zeros| {
            let cells = rows.clone().flat_map(|row| (0..groups).map(move |group| (row, group)));
            cells.map(|(row, group)| unpack(zeros[row / per_word * groups + group], row % per_word, bits) as u8)
        });
        CodedRows {
            codes,
            zeros: zeros.collect(),
            scales: self.scales[rows.start * groups..rows.end * groups].to_vec(),
        }
    }
}
