//! AWQ (arXiv 2306.00978) in AutoAWQ's `gemm` layout: `qweight [in, out / 8]` and `qzeros [groups, out / 8]`
//! pack eight outputs of four bits per word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits;
//! `scales [groups, out]`. `value = (q - zero) * scale`.

use std::fmt;
use std::ops::Range;

use baton_device::RowSource;

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
        Ok(Box::new(Rows {
            scales: parts.floats("scales")?,
            zeros: parts.words("qzeros"),
            words: parts.take("qweight"),
            group: if self.group == 0 { inputs } else { self.group },
            inputs,
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
    /// `[in, out / 8]`.
    words: Part,
    /// `[groups, out]`.
    scales: Vec<f32>,
    /// `[groups, out / 8]`.
    zeros: Vec<u32>,
    group: usize,
    inputs: usize,
    outputs: usize,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "awq, {} columns", self.inputs)
    }
}

impl RowSource for Rows {
    fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        let words = self.outputs / PER_WORD;
        let mut out = Vec::with_capacity(rows.len() * self.inputs);
        for row in rows {
            let (column, place) = (row / PER_WORD, PLACE[row % PER_WORD]);
            out.extend((0..self.inputs).map(|input| {
                let group = input / self.group;
                let q = unpack(word(&self.words, input * words + column), place, BITS);
                let zero = unpack(self.zeros[group * words + column], place, BITS);
                (q as f32 - zero as f32) * self.scales[group * self.outputs + row]
            }));
        }
        out
    }
}
