//! AWQ (arXiv 2306.00978) in AutoAWQ's `gemm` layout: `qweight [in, out / 8]` and `qzeros [groups, out / 8]`
//! pack eight outputs of four bits per word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits;
//! `scales [groups, out]`. `value = (q - zero) * scale`.

use std::fmt;
use std::ops::Range;

use baton_device::{Code, CodedRows, CodedSource, Coding, RowSource, widen};

use super::parts::{FLOATS, Parts, StoredTensor, unpack, word};
use crate::checkpoint::{CheckpointError, Part};

const BITS: usize = 4;
const PER_WORD: usize = 32 / BITS;
/// Where in its word each of eight outputs lies.
const PLACE: [usize; PER_WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

/// AWQ's layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Awq {
    /// Inputs of a group; 0 for all.
    pub(crate) group: usize,
}

impl Awq {
    pub(super) fn tensors(&self, [outputs, inputs]: [usize; 2]) -> Result<Vec<StoredTensor>, String> {
        let words = super::whole_words(outputs, PER_WORD, "rows")?;
        let groups = super::groups(inputs, self.group)?;
        Ok(vec![
            StoredTensor::new("qweight", vec![inputs, words], &["I32"]),
            StoredTensor::new("qzeros", vec![groups, words], &["I32"]),
            StoredTensor::new("scales", vec![groups, outputs], FLOATS),
        ])
    }

    pub(super) fn open(
        &self,
        [outputs, inputs]: [usize; 2],
        mut parts: Parts,
    ) -> Result<Box<dyn RowSource>, CheckpointError> {
        let groups = super::groups(inputs, self.group).expect("verified");
        let group_of = Coding::groups_of(inputs, inputs / groups);
        let scales = parts.float("scales");
        Ok(Box::new(Rows {
            coding: Coding { code: Code::Int4, scales, zeros: true, groups, group_of },
            scales: parts.floats("scales")?,
            zeros: parts.words("qzeros"),
            words: parts.take("qweight"),
            outputs,
        }))
    }
}

impl fmt::Display for Awq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "awq int{BITS}, {}", super::group_text(self.group))
    }
}

struct Rows {
    coding: Coding,
    /// `[in, out / 8]`.
    words: Part,
    /// `[groups, out]`.
    scales: Vec<f32>,
    /// `[groups, out / 8]`.
    zeros: Vec<u32>,
    outputs: usize,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "awq, {} columns", self.coding.group_of.len())
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
        let (inputs, groups, words) = (self.coding.group_of.len(), self.coding.groups, self.outputs / PER_WORD);
        let element = |word: u32, row: usize| unpack(word, PLACE[row % PER_WORD], BITS) as u8;
        let mut codes = vec![0; rows.len() * inputs];
        for input in 0..inputs {
            for (row, codes) in rows.clone().zip(codes.chunks_exact_mut(inputs)) {
                codes[input] = element(word(&self.words, input * words + row / PER_WORD), row);
            }
        }
        let cells = || rows.clone().flat_map(|row| (0..groups).map(move |group| (row, group)));
        CodedRows {
            codes,
            scales: cells().map(|(row, group)| self.scales[group * self.outputs + row]).collect(),
            zeros: cells().map(|(row, group)| element(self.zeros[group * words + row / PER_WORD], row)).collect(),
        }
    }
}
