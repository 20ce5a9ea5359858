//! What cases compute with: the same numbers on every machine.

use std::ops::Range;

use super::codes::{Codes, Layout};
use crate::{Backend, BlockFormat, DType, HostTensor, KvDtype, Result, WeightFormat, int8};

/// `n` numbers in (-scale, scale) from a hash of `seed` and their index (splitmix64).
pub fn uniform(seed: u64, n: usize, scale: f32) -> Vec<f32> {
    let value = |i: usize| {
        let mut z = (seed << 32 | i as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|i| value(i) * scale).collect()
}

/// A tensor of a checkpoint.
pub(super) struct Source {
    pub(super) shape: Vec<usize>,
    data: Data,
}

enum Data {
    Stored(DType, Vec<u8>),
    Coded(Codes),
}

impl Source {
    /// Random values in the element type from which `format` is usually made.
    pub(super) fn new(format: WeightFormat, shape: Vec<usize>, seed: u64, scale: f32) -> Self {
        let values = uniform(seed, shape.iter().product(), scale);
        let (dtype, data) = match format {
            WeightFormat::F32 => (DType::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
            WeightFormat::F16 => {
                (DType::F16, values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect())
            }
            WeightFormat::Ggml(block) => (DType::Ggml(block), random_blocks(block, seed, values.len(), scale)),
            WeightFormat::BF16 => {
                (DType::BF16, values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect())
            }
            WeightFormat::Coded(code) => {
                let &[rows, columns] = shape.as_slice() else { unreachable!("a matrix") };
                return Self::coded(Layout::usual(code), [rows, columns], seed, scale);
            }
        };
        Self { shape, data: Data::Stored(dtype, data) }
    }

    /// A matrix of random codes.
    pub(super) fn coded(layout: Layout, shape: [usize; 2], seed: u64, scale: f32) -> Self {
        Self { shape: shape.to_vec(), data: Data::Coded(Codes::new(layout, shape, seed, scale)) }
    }

    /// Some columns of a matrix of floats.
    pub(super) fn columns(&self, columns: Range<usize>) -> Self {
        let Data::Stored(dtype, data) = &self.data else { unreachable!("floats") };
        let size = dtype.bytes(1);
        let row = self.shape[1] * size;
        let part = |row: &[u8]| row[columns.start * size..columns.end * size].to_vec();
        let data = data.chunks_exact(row).flat_map(part).collect();
        Self { shape: vec![self.shape[0], columns.len()], data: Data::Stored(*dtype, data) }
    }

    pub(super) fn tensor(&self) -> HostTensor<'_> {
        match &self.data {
            Data::Stored(dtype, data) => HostTensor::new("case", *dtype, self.shape.clone(), data),
            Data::Coded(codes) => codes.tensor(),
        }
    }
}

/// Whole blocks of random bytes with scales that keep the values of order `scale`.
pub fn random_blocks(block: BlockFormat, seed: u64, elements: usize, scale: f32) -> Vec<u8> {
    let count = elements / block.elements();
    let random = uniform(seed, count * block.bytes(), 128.0);
    let mut bytes: Vec<u8> = random.iter().map(|v| v.floor() as i8 as u8).collect();
    // The largest value of a block of scale 1.
    let range = match block {
        BlockFormat::Q4_0 | BlockFormat::Q4_1 => 16.0,
        BlockFormat::Q5_0 | BlockFormat::Q5_1 => 32.0,
        BlockFormat::Q8_0 | BlockFormat::IQ4_NL => 128.0,
        BlockFormat::Q2_K => 16.0 * 4.0,
        BlockFormat::Q3_K => 32.0 * 4.0,
        BlockFormat::Q4_K => 64.0 * 16.0,
        BlockFormat::Q5_K => 64.0 * 32.0,
        BlockFormat::Q6_K => 128.0 * 32.0,
        BlockFormat::IQ4_XS => 32.0 * 128.0,
    };
    for (i, bytes) in bytes.chunks_exact_mut(block.bytes()).enumerate() {
        for (j, &offset) in block.scale_offsets().iter().enumerate() {
            // Not all equal, so that a scale taken from another block shows.
            let factor = 1.0 - (i % 7 + j) as f32 / 16.0;
            let value = half::f16::from_f32(scale * factor / range);
            bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

/// Numbers of order one that `inputs` holds.
pub(super) fn activation<B: Backend>(b: &B, inputs: DType, rows: usize, cols: usize, seed: u64) -> Result<B::Tensor> {
    let mut values = uniform(seed, rows * cols, 1.0);
    round(&mut values, inputs);
    let mut t = b.tensor(rows, cols)?;
    b.write(&values, &mut t)?;
    Ok(t)
}

/// Makes them numbers that `inputs` holds.
pub(super) fn round(values: &mut [f32], inputs: DType) {
    match inputs {
        DType::F32 | DType::Ggml(_) => {}
        DType::F16 => KvDtype::F16.round(values),
        DType::BF16 => KvDtype::BF16.round(values),
    }
}

/// Router logits that choose the same experts whatever rounds them: random ones, or in a row of narrow numbers, of which some
/// could be equal, a random order of steps that every type holds.
pub(super) fn router_logits<B: Backend>(b: &B, inputs: DType, rows: usize, experts: usize) -> Result<B::Tensor> {
    let mut values = uniform(2, rows * experts, 1.0);
    if inputs != DType::F32 {
        for row in values.chunks_exact_mut(experts) {
            let random = row.to_vec();
            for (logit, own) in row.iter_mut().zip(&random) {
                *logit = random.iter().filter(|other| *other < own).count() as f32 / 16.0 - 0.5;
            }
        }
    }
    let mut t = b.tensor(rows, experts)?;
    b.write(&values, &mut t)?;
    Ok(t)
}

/// Values that [`int8`] and bf16 give back as they are, so that what a kernel does with them is judged to the last digits.
pub(super) fn on_grid<B: Backend>(b: &B, rows: usize, cols: usize, seed: u64) -> Result<B::Tensor> {
    let mut values = uniform(seed, rows * cols, 127.0);
    for (i, block) in values.chunks_mut(int8::BLOCK).enumerate() {
        let step = [1.0 / 64.0, 1.0 / 128.0, 1.0 / 512.0][i % 3];
        block.iter_mut().for_each(|v| *v = v.round() * step);
        block[i % block.len()] = 127.0 * step;
    }
    let mut t = b.tensor(rows, cols)?;
    b.write(&values, &mut t)?;
    Ok(t)
}
