//! compressed-tensors' `pack-quantized`: unsigned integers of four or eight bits, the signed value plus
//! half the range, packed along the columns into 32-bit words, the first lowest; the last word of a row
//! is padded. Zero points are packed the same way, but along the rows.
//!
//! `value = (q - zero) * scale`, with one scale per row and group; `weight_g_idx` gives the group of
//! each column where they were quantised in order of their activations.

use std::fmt;
use std::ops::Range;

use baton_device::RowSource;

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
        let mut scales = parts.floats("weight_scale")?;
        if self.per_tensor {
            scales = vec![scales[0]; rows];
        }
        Ok(Box::new(Rows {
            scales,
            zeros: self.zero_points.then(|| parts.words("weight_zero_point")),
            group_of: if self.ordered {
                parts.group_indices("weight_g_idx", groups)?
            } else {
                (0..cols).map(|c| (c * groups / cols) as u32).collect()
            },
            words: parts.take("weight_packed"),
            bits: self.bits,
            groups,
        }))
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
    /// `[out, words]`.
    words: Part,
    /// `[out, groups]`.
    scales: Vec<f32>,
    /// `[out / per word, groups]`.
    zeros: Option<Vec<u32>>,
    /// `[in]`.
    group_of: Vec<u32>,
    bits: usize,
    groups: usize,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "packed integers, {} columns", self.group_of.len())
    }
}

impl RowSource for Rows {
    fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        let (cols, per_word) = (self.group_of.len(), 32 / self.bits);
        let words = cols.div_ceil(per_word);
        let mut out = Vec::with_capacity(rows.len() * cols);
        for row in rows {
            let zero = |group: usize| match &self.zeros {
                None => 1 << (self.bits - 1),
                Some(zeros) => unpack(zeros[row / per_word * self.groups + group], row % per_word, self.bits),
            };
            out.extend(self.group_of.iter().enumerate().map(|(col, &group)| {
                let q = unpack(word(&self.words, row * words + col / per_word), col % per_word, self.bits);
                let group = group as usize;
                (q as f32 - zero(group) as f32) * self.scales[row * self.groups + group]
            }));
        }
        out
    }
}
