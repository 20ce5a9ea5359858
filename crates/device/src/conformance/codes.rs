//! Matrices of codes under scales, of any shape of groups.

use std::ops::Range;

use super::inputs::{Source, on_grid, uniform};
use super::{Case, linear, outputs};
use crate::{
    Backend, Code, CodedRows, CodedSource, Coding, DType, HostLinear, HostTensor, KvDtype, Purpose, Result, RowSource,
    WeightFormat, widen,
};

/// How codes lie under scales in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// What a code means.
    pub code: Code,
    /// Rows and columns that share a scale; 0 for all.
    pub block: [usize; 2],
    /// Type of the scales.
    pub scales: DType,
    /// Whether groups have zeros of their own.
    pub zeros: bool,
    /// Whether the columns of a group lie apart.
    pub shuffled: bool,
}

impl Layout {
    /// As checkpoints of a code usually are.
    pub(super) fn usual(code: Code) -> Self {
        let (block, scales, zeros) = match code {
            Code::Int4 => ([1, 64], DType::F16, true),
            Code::Int8 => ([1, 0], DType::BF16, false),
            Code::E2M1 => ([1, 32], DType::BF16, false),
            Code::E4M3 => ([128, 128], DType::F32, false),
            Code::E5M2 => ([0, 0], DType::F32, false),
        };
        Self { code, block, scales, zeros, shuffled: false }
    }
}

/// The cases of this file: tails of spans and rows, groups of every size, blocks that end mid-matrix, all types of scales.
pub(super) fn cases() -> Vec<Case> {
    use Code::{E2M1, E4M3, E5M2, Int4, Int8};
    use DType::{BF16, F16, F32};
    let layout = |code, block, scales, zeros, shuffled| Layout { code, block, scales, zeros, shuffled };
    let cases = [
        (1, 7, 5, layout(E4M3, [128, 128], F32, false, false)),
        (3, 300, 150, layout(E4M3, [128, 128], BF16, false, false)),
        (37, 264, 33, layout(E4M3, [16, 96], F32, false, false)),
        (2, 136, 17, layout(E5M2, [0, 0], F32, false, false)),
        (5, 192, 33, layout(E2M1, [1, 32], BF16, false, false)),
        (1, 512, 40, layout(Int4, [1, 128], F16, true, false)),
        (3, 160, 17, layout(Int4, [1, 32], BF16, false, false)),
        (17, 256, 65, layout(Int4, [1, 64], F16, true, true)),
        (2, 100, 9, layout(Int4, [1, 20], F32, true, false)),
        (7, 384, 33, layout(Int8, [1, 128], F16, true, true)),
        (19, 200, 40, layout(Int8, [1, 0], BF16, true, false)),
    ];
    // Devices take few rows, and more, in tiles of other sizes.
    let tiles = Code::ALL.into_iter().flat_map(|code| [12, 27, 40].map(|rows| (rows, 192, 24, Layout::usual(code))));
    let cases = tiles.chain(cases).map(|(rows, in_features, out_features, layout)| Case::Coded {
        rows,
        in_features,
        out_features,
        layout,
        bias: rows % 2 == 1,
    });
    cases.collect()
}

/// Runs a [`Case::Coded`].
pub(super) fn coded<B: Backend>(case: &Case, b: &B, inputs: DType) -> Result<Vec<f32>> {
    let &Case::Coded { rows, in_features, out_features, layout, bias } = case else { unreachable!("{case:?}") };
    let weight = Source::coded(layout, [out_features, in_features], 1, (in_features as f32).sqrt().recip());
    let bias = bias.then(|| Source::new(WeightFormat::F32, vec![out_features], 2, 1.0));
    let format = WeightFormat::Coded(layout.code);
    let apart = layout.shuffled || layout.block[1] % 32 > 0 && layout.block[1] < in_features;
    if !apart {
        // No model looks rows up in codes. Here they are the way to judge how codes are widened, which products of few rows are not.
        return linear(b, (&weight, bias.as_ref(), format), rows, inputs);
    }
    // Nothing is looked up in these.
    let (bias, purpose) = (bias.as_ref().map(Source::tensor), Purpose::Product);
    let weight = b.linear_weight(&HostLinear { weight: weight.tensor(), bias, format, purpose })?;
    let (x, mut out) = (on_grid(b, rows, in_features, 3)?, b.tensor(rows, out_features)?);
    b.linear(&x, &weight, &mut out)?;
    outputs(b, &[&out])
}

/// A matrix of random codes.
#[derive(Debug)]
pub(super) struct Codes {
    coding: Coding,
    /// Rows that share scales.
    block: usize,
    codes: Vec<u8>,
    /// `[blocks of rows, groups]`.
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

impl Codes {
    /// Values of order `scale`.
    pub(super) fn new(layout: Layout, [rows, columns]: [usize; 2], seed: u64, scale: f32) -> Self {
        let Layout { code, block, scales: dtype, zeros, shuffled } = layout;
        let block = [(block[0], rows), (block[1], columns)].map(|(size, all)| if size == 0 { all } else { size });
        let groups = columns.div_ceil(block[1]);
        let mut group_of = Coding::groups_of(columns, block[1]);
        if shuffled {
            let order = uniform(seed + 7, columns, 1.0);
            let mut columns: Vec<_> = order.iter().zip(&group_of).map(|(at, group)| (*at, *group)).collect();
            columns.sort_by(|a, b| a.0.total_cmp(&b.0));
            group_of = columns.into_iter().map(|(_, group)| group).collect();
        }
        let numbers = code.numbers();
        let random = |seed: u64, n: usize| uniform(seed, n, 128.0).into_iter().map(|v| v.floor() as i8 as u8);
        let mask = if code.bits() == 4 { 15 } else { 255 };
        let finite = |code: u8| if numbers[usize::from(code)].is_finite() { code } else { code ^ 0x48 };
        let codes = random(seed, rows * columns).map(|code| finite(code & mask)).collect();
        let cells = rows.div_ceil(block[0]) * groups;
        let largest = numbers.iter().copied().filter(|number| number.is_finite()).fold(0.0, f32::max);
        let mut scales: Vec<f32> = (0..cells).map(|i| scale * (1.0 - (i % 7) as f32 / 16.0) / largest * 2.0).collect();
        match dtype {
            DType::F16 => KvDtype::F16.round(&mut scales),
            DType::BF16 => KvDtype::BF16.round(&mut scales),
            DType::F32 | DType::Ggml(_) => {}
        }
        let zeros: Vec<u8> = if zeros { random(seed + 1, cells).map(|zero| zero & mask).collect() } else { Vec::new() };
        let coding = Coding { code, scales: dtype, zeros: !zeros.is_empty(), groups, group_of };
        Self { coding, block: block[0], codes, scales, zeros }
    }

    /// As a tensor.
    pub(super) fn tensor(&self) -> HostTensor<'_> {
        let columns = self.coding.group_of.len();
        HostTensor::computed("case", [self.codes.len() / columns, columns], self)
    }
}

impl RowSource for Codes {
    fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        widen(self, rows)
    }

    fn as_coded(&self) -> Option<&dyn CodedSource> {
        Some(self)
    }
}

impl CodedSource for Codes {
    fn coding(&self) -> &Coding {
        &self.coding
    }

    fn codes(&self, rows: Range<usize>) -> CodedRows {
        let (columns, groups) = (self.coding.group_of.len(), self.coding.groups);
        let cells = |row: usize| row / self.block * groups..(row / self.block + 1) * groups;
        CodedRows {
            scales: rows.clone().flat_map(|row| &self.scales[cells(row)]).copied().collect(),
            zeros: match self.coding.zeros {
                true => rows.clone().flat_map(|row| &self.zeros[cells(row)]).copied().collect(),
                false => Vec::new(),
            },
            codes: self.codes[rows.start * columns..rows.end * columns].to_vec(),
        }
    }
}
