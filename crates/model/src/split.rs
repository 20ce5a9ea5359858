//! How ranks share out a model: which tensors are cut, along which side, and which numbers of ranks do.
//!
//! Each half of a layer is cut so that its parts meet in one sum. What leads into a half (queries, keys and values; gates
//! and ups) is cut along its outputs, what leads out of it (`o_proj`, `down_proj`) along the inputs that these are; of the
//! experts each rank has some. The rest every rank has whole: embedding, head, norms, routers, what leads to the latents.
//!
//! Invariant: a model without [`refusals`] is cut into parts of equal shape on every rank, but for the number of experts.

use std::ops::Range;

use baton_device::{CodedRows, CodedSource, Coding, HostTensor, RowSource, World};

use crate::checkpoint::TensorSpec;
use crate::config::{Family, ModelConfig};

/// Along which side a matrix `[out, in]` is cut, and into how many equal things that stay whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Split {
    /// Every rank has all of it.
    Whole,
    /// Each rank computes some of the outputs, bias included.
    Outputs(usize),
    /// Each rank takes some of the inputs; what it computes is a part of the sum over all ranks. The bias is the first rank's.
    Inputs(usize),
}

impl Split {
    /// The outputs, of `count`, that a rank computes.
    pub(crate) fn outputs(self, world: World, count: usize) -> Range<usize> {
        match self {
            Split::Outputs(units) => share(world, units, count),
            Split::Whole | Split::Inputs(_) => 0..count,
        }
    }

    /// The inputs, of `count`, that a rank takes.
    pub(crate) fn inputs(self, world: World, count: usize) -> Range<usize> {
        match self {
            Split::Inputs(units) => share(world, units, count),
            Split::Whole | Split::Outputs(_) => 0..count,
        }
    }
}

/// A rank's share of `count` things in `units` that stay whole.
fn share(world: World, units: usize, count: usize) -> Range<usize> {
    let (share, size) = (world.share(units), count / units);
    share.start * size..share.end * size
}

/// Every reason why a model cannot be shared out among so many ranks, and which numbers would do. `blocks` are the matrices
/// that are kept in blocks, with the columns of one.
pub(crate) fn refusals(config: &ModelConfig, blocks: &[(&TensorSpec, usize)], ranks: usize) -> Vec<String> {
    let mut reasons = objections(config, blocks, ranks);
    if !reasons.is_empty() {
        let fits = (1..=config.num_heads).filter(|ranks| objections(config, blocks, *ranks).is_empty());
        let fits: Vec<String> = fits.map(|ranks| ranks.to_string()).collect();
        reasons.push(format!("it can be shared out among ranks of {}", fits.join(", ")));
    }
    reasons
}

fn objections(config: &ModelConfig, blocks: &[(&TensorSpec, usize)], ranks: usize) -> Vec<String> {
    let mut reasons = Vec::new();
    if ranks == 1 {
        return reasons;
    }
    if let Family::DeepseekV4(_) = config.family {
        return vec![format!("{} is computed on one rank only", config.architecture.name())];
    }
    let mut divides = |count: usize, what: &str| {
        if !count.is_multiple_of(ranks) {
            reasons.push(format!("{ranks} ranks cannot have equally many of {count} {what}"));
        }
    };
    divides(config.num_heads, "attention heads");
    match &config.family {
        // Each is on as many ranks as need it.
        Family::Llama(own) if ranks.is_multiple_of(own.num_kv_heads) => {}
        Family::Llama(own) => divides(own.num_kv_heads, "key/value heads"),
        Family::Deepseek(_) | Family::DeepseekV4(_) => {}
    }
    let moe = config.moe.as_ref().filter(|moe| moe.layers.contains(&true));
    if moe.is_none_or(|moe| moe.layers.contains(&false)) {
        divides(config.intermediate_size, "columns of a feed-forward network");
    }
    if let Some(moe) = moe {
        divides(moe.num_shared_experts * moe.intermediate_size, "columns of the shared experts");
        if moe.num_experts < ranks {
            reasons.push(format!("{ranks} ranks are more than the {} experts", moe.num_experts));
        }
    }
    let cut = |(spec, columns): &&(&TensorSpec, usize)| {
        matches!(spec.split, Split::Inputs(_)) && !spec.matrix()[1].is_multiple_of(ranks * columns)
    };
    if let Some((spec, columns)) = blocks.iter().find(cut) {
        let (name, [_, inputs]) = (&spec.name, spec.matrix());
        reasons.push(format!("{ranks} ranks would cut blocks of {columns} columns: {name} has {inputs} columns"));
    }
    reasons
}

/// Some columns of a matrix; whole blocks of them, if it is kept in blocks.
#[derive(Debug)]
pub(crate) enum Columns<'a> {
    All(HostTensor<'a>),
    /// Copied out of what is stored.
    Stored(HostTensor<'a>, Vec<u8>, usize),
    Computed(HostTensor<'a>, Range<usize>, Option<Coding>),
}

impl<'a> Columns<'a> {
    pub(crate) fn new(matrix: HostTensor<'a>, columns: Range<usize>) -> Self {
        let cols = matrix.shape()[1];
        match matrix.stored() {
            _ if columns.len() == cols => Columns::All(matrix),
            None => {
                let part =
                    |coding: &Coding| Coding { group_of: coding.group_of[columns.clone()].to_vec(), ..coding.clone() };
                let coding = matrix.coding().map(part);
                Columns::Computed(matrix, columns, coding)
            }
            Some(bytes) => {
                let part = cut(bytes, matrix.shape()[0], cols, &columns);
                Columns::Stored(matrix, part, columns.len())
            }
        }
    }

    pub(crate) fn host(&self) -> HostTensor<'_> {
        match self {
            Columns::All(matrix) => matrix.clone(),
            Columns::Stored(matrix, part, cols) => {
                HostTensor::new(matrix.name(), matrix.dtype(), vec![matrix.shape()[0], *cols], part)
            }
            Columns::Computed(matrix, columns, _) => {
                HostTensor::computed(matrix.name(), [matrix.shape()[0], columns.len()], self)
            }
        }
    }
}

/// Some columns of rows of `cols` elements, whatever an element or a block of them takes.
fn cut(bytes: &[u8], rows: usize, cols: usize, columns: &Range<usize>) -> Vec<u8> {
    let row = bytes.len() / rows;
    let [start, end] = [columns.start, columns.end].map(|column| column * row / cols);
    bytes.chunks_exact(row).flat_map(|row| &row[start..end]).copied().collect()
}

/// Of whole rows, so that every element is what it would be on one rank, whatever a form has per row.
impl RowSource for Columns<'_> {
    fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        let Columns::Computed(matrix, columns, _) = self else { unreachable!("the others are tensors") };
        let whole = matrix.rows(rows.start, rows.len()).to_f32();
        whole.chunks_exact(matrix.shape()[1]).flat_map(|row| &row[columns.clone()]).copied().collect()
    }

    fn blocks(&self, rows: Range<usize>, quantize: &dyn Fn(&[f32]) -> Vec<u8>) -> Vec<u8> {
        let Columns::Computed(matrix, columns, _) = self else { unreachable!("the others are tensors") };
        let whole = matrix.rows(rows.start, rows.len()).to_blocks(quantize);
        cut(&whole, rows.len(), matrix.shape()[1], columns)
    }

    fn as_coded(&self) -> Option<&dyn CodedSource> {
        matches!(self, Columns::Computed(_, _, Some(_))).then_some(self as _)
    }
}

impl CodedSource for Columns<'_> {
    fn coding(&self) -> &Coding {
        let Columns::Computed(_, _, Some(coding)) = self else { unreachable!("the others are no codes") };
        coding
    }

    fn codes(&self, rows: Range<usize>) -> CodedRows {
        let Columns::Computed(matrix, columns, _) = self else { unreachable!("the others are tensors") };
        let whole = matrix.rows(rows.start, rows.len()).to_codes();
        CodedRows { codes: cut(&whole.codes, rows.len(), matrix.shape()[1], columns), ..whole }
    }
}

#[cfg(test)]
mod tests {
    use baton_device::{BlockFormat, DType};

    use super::*;

    #[derive(Debug)]
    struct Rows(Vec<f32>, usize);

    impl RowSource for Rows {
        fn rows(&self, rows: Range<usize>) -> Vec<f32> {
            self.0[rows.start * self.1..rows.end * self.1].to_vec()
        }
    }

    #[test]
    fn columns_are_those_of_the_whole_matrix_stored_computed_or_in_blocks() {
        let (rows, cols) = (3, 128);
        let values: Vec<f32> = (0..rows * cols).map(|i| (i % 113) as f32 - 50.0).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let quantize = |values: &[f32]| BlockFormat::Q8_0.quantize(values);
        let blocks = quantize(&values);
        let source = Rows(values.clone(), cols);
        let stored = HostTensor::new("m", DType::F32, vec![rows, cols], &bytes);
        let computed = HostTensor::computed("m", [rows, cols], &source);
        let packed = HostTensor::new("m", DType::Ggml(BlockFormat::Q8_0), vec![rows, cols], &blocks);
        for columns in [0..32, 32..96, 96..128, 0..128] {
            let expected = |of: &HostTensor<'_>| -> Vec<f32> {
                of.to_f32().chunks_exact(cols).flat_map(|row| row[columns.clone()].to_vec()).collect()
            };
            for matrix in [&stored, &computed, &packed] {
                let part = Columns::new(matrix.clone(), columns.clone());
                assert_eq!(part.host().shape(), [rows, columns.len()]);
                assert_eq!(part.host().to_f32(), expected(matrix));
                assert_eq!(part.host().rows(1, 2).to_f32(), expected(matrix)[columns.len()..]);
            }
            let part = Columns::new(computed.clone(), columns.clone());
            assert_eq!(part.host().to_blocks(&quantize), quantize(&expected(&stored)));
        }
    }
}
