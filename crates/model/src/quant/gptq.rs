//! GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel write it: `qweight [in / n, out]` packs n = 32 / bits
//! rows of the transposed matrix per word, the first lowest; `qzeros [groups, out / n]` packs along the
//! outputs; `scales [groups, out]`; `g_idx [in]` gives the group of each input, in any order with
//! `desc_act`.
//!
//! `value = (q - zero) * scale`. The first version of the format stores zero - 1, wrapped to the bits;
//! `gptq_v2` stores zero.

use std::fmt;
use std::ops::Range;

use baton_device::{Code, CodedRows, CodedSource, Coding, RowSource, widen};

use super::parts::{FLOATS, Parts, StoredTensor, unpack, word};
use crate::checkpoint::{CheckpointError, Part};

/// GPTQ's layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gptq {
    /// 4 or 8.
    pub(crate) bits: usize,
    /// Inputs of a group; 0 for all.
    pub(crate) group: usize,
    /// Groups follow the activations' order: `g_idx` must be there.
    pub(crate) desc_act: bool,
    /// Stored zero points are one less than meant.
    pub(crate) zeros_less_one: bool,
}

impl Gptq {
    pub(super) fn tensors(&self, [outputs, inputs]: [usize; 2]) -> Result<Vec<StoredTensor>, String> {
        let per_word = 32 / self.bits;
        let groups = super::groups(inputs, self.group)?;
        let g_idx = StoredTensor::new("g_idx", vec![inputs], &["I32"]);
        Ok(vec![
            StoredTensor::new("qweight", vec![super::whole_words(inputs, per_word, "columns")?, outputs], &["I32"]),
            StoredTensor::new("qzeros", vec![groups, super::whole_words(outputs, per_word, "rows")?], &["I32"]),
            StoredTensor::new("scales", vec![groups, outputs], FLOATS),
            if self.desc_act { g_idx } else { g_idx.optional() },
        ])
    }

    pub(super) fn open(
        &self,
        [outputs, inputs]: [usize; 2],
        mut parts: Parts,
    ) -> Result<Box<dyn RowSource>, CheckpointError> {
        let groups = super::groups(inputs, self.group).expect("verified");
        let group_of = if parts.has("g_idx") {
            parts.group_indices("g_idx", groups)?
        } else {
            Coding::groups_of(inputs, inputs / groups)
        };
        let scales = parts.float("scales");
        Ok(Box::new(Rows {
            coding: Coding { code: self.code(), scales, zeros: true, groups, group_of },
            scales: parts.floats("scales")?,
            zeros: parts.words("qzeros"),
            words: parts.take("qweight"),
            outputs,
            zeros_less_one: self.zeros_less_one,
        }))
    }

    pub(super) fn code(&self) -> Code {
        super::integers(self.bits)
    }
}

impl fmt::Display for Gptq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gptq int{}, {}", self.bits, super::group_text(self.group))?;
        f.write_str(if self.desc_act { ", in order of activations" } else { "" })
    }
}

struct Rows {
    coding: Coding,
    /// `[in / per word, out]`.
    words: Part,
    /// `[groups, out]`.
    scales: Vec<f32>,
    /// `[groups, out / per word]`.
    zeros: Vec<u32>,
    outputs: usize,
    zeros_less_one: bool,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gptq, {} columns", self.coding.group_of.len())
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
        let mut codes = vec![0; rows.len() * cols];
        for words in 0..cols / per_word {
            for (row, codes) in rows.clone().zip(codes.chunks_exact_mut(cols)) {
                let word = word(&self.words, words * self.outputs + row);
                let codes = codes[words * per_word..][..per_word].iter_mut().enumerate();
                codes.for_each(|(i, code)| *code = unpack(word, i, bits) as u8);
            }
        }
        let zero = |row: usize, group: usize| {
            let stored = unpack(self.zeros[group * (self.outputs / per_word) + row / per_word], row % per_word, bits);
            (if self.zeros_less_one { (stored + 1) & ((1 << bits) - 1) } else { stored }) as u8
        };
        let cells = || rows.clone().flat_map(|row| (0..groups).map(move |group| (row, group)));
        CodedRows {
            codes,
            scales: cells().map(|(row, group)| self.scales[group * self.outputs + row]).collect(),
            zeros: cells().map(|(row, group)| zero(row, group)).collect(),
        }
    }
}
