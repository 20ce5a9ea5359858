//! Activations for weights of block formats: each row in blocks of 32 signed bytes, as [`baton_device::int8`] says.
//!
//! Blocks lie by column first, then by row, so that a kernel finds the block of the next row at a fixed distance.

use baton_device::int8;

use crate::isa::Dispatch;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};
use crate::tensor::View;

/// Of a value, in multiply-adds.
const WORK: usize = 2;

/// Quantised rows. Grows to the largest step and is then reused.
#[derive(Default)]
pub(crate) struct Quantized {
    rows: usize,
    bytes: Vec<[i8; int8::BLOCK]>,
    scales: Vec<f32>,
    sums: Vec<Sums>,
}

/// Sums of a block's bytes, which correct for offsets and carry minima: of the first half, of the second, and of all.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sums {
    pub(crate) negated: [i32; 3],
    pub(crate) scaled: [f32; 3],
}

/// One block of each of `R` rows.
pub(crate) struct Block<'a, const R: usize> {
    pub(crate) bytes: &'a [[i8; int8::BLOCK]; R],
    pub(crate) scales: &'a [f32; R],
    pub(crate) sums: &'a [Sums; R],
}

impl Quantized {
    /// Replaces the contents by all rows of `x`.
    pub(crate) fn fill(&mut self, pool: &Pool, isa: Dispatch, x: View<'_>) {
        let (rows, blocks) = (x.rows, x.width / int8::BLOCK);
        self.rows = rows;
        self.bytes.resize(rows * blocks, [0; _]);
        self.scales.resize(rows * blocks, 0.0);
        self.sums.resize(rows * blocks, Sums::default());
        if rows == 0 {
            return;
        }
        let work = WORK * rows * x.width;
        let share = pool.share(blocks, work);
        let parts = self.bytes.chunks_mut(share * rows).zip(self.scales.chunks_mut(share * rows));
        let parts = parts.zip(self.sums.chunks_mut(share * rows));
        pool.each(parts, work, |part, ((bytes, scales), sums)| {
            isa.run(Quantize { x, first: part * share, bytes, scales, sums });
        });
    }

    /// Block `block` of rows `first..first + R`.
    #[inline(always)]
    pub(crate) fn block<const R: usize>(&self, block: usize, first: usize) -> Block<'_, R> {
        let start = block * self.rows + first;
        Block {
            bytes: self.bytes[start..].first_chunk().expect("R rows"),
            scales: self.scales[start..].first_chunk().expect("R rows"),
            sums: self.sums[start..].first_chunk().expect("R rows"),
        }
    }
}

struct Quantize<'a> {
    x: View<'a>,
    /// Block of the first column that is filled.
    first: usize,
    bytes: &'a mut [[i8; int8::BLOCK]],
    scales: &'a mut [f32],
    sums: &'a mut [Sums],
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.x.rows;
        for i in 0..self.bytes.len() / rows {
            for r in 0..rows {
                let block: &[f32; int8::BLOCK] = &self.x.row(r).as_chunks().0[self.first + i];
                let halves = block.as_chunks().0;
                let (mut low, mut high) = (s.load(&halves[0]), s.load(&halves[1]));
                let max = s.max_abs(low, high);
                let mut scale = max / 127.0;
                if !max.is_finite() {
                    (low, high, scale) = (s.splat(0.0), s.splat(0.0), f32::NAN);
                }
                let inverse = s.splat(if scale > 0.0 { 1.0 / scale } else { 0.0 });
                let (low, first) = s.round_to_bytes(s.mul(low, inverse));
                let (high, second) = s.round_to_bytes(s.mul(high, inverse));
                let at = i * rows + r;
                self.bytes[at][..LANES].copy_from_slice(&low);
                self.bytes[at][LANES..].copy_from_slice(&high);
                self.scales[at] = scale;
                let sums = [first, second, first + second];
                self.sums[at] = Sums {
                    negated: [-sums[0], -sums[1], -sums[2]],
                    scaled: [scale * sums[0] as f32, scale * sums[1] as f32, scale * sums[2] as f32],
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use proptest::prelude::*;

    fn ours(isa: Isa, rows: &[f32], width: usize) -> Quantized {
        let mut quantized = Quantized::default();
        let x = View { data: rows, rows: rows.len() / width, stride: width, start: 0, width, index: None };
        quantized.fill(&Pool::new(2).unwrap(), isa.dispatch().unwrap(), x);
        quantized
    }

    proptest! {
        #[test]
        fn blocks_are_quantised_as_the_contract_says(
            values in prop::collection::vec(-3.0f32..3.0, 96), halves in prop::collection::vec(-254i32..=254, 32),
            power in -60..60i32,
        ) {
            // Multiples of half a step: where rounding has to choose.
            let mut values = values;
            values.extend(halves.iter().map(|&h| h as f32 * 0.5));
            values[96] = 127.0;
            values.iter_mut().for_each(|x| *x *= 2.0f32.powi(power));
            for isa in Isa::available() {
                let quantized = ours(isa, &values, 64);
                for (i, block) in values.as_chunks().0.iter().enumerate() {
                    let Block { bytes: [bytes], scales: [ours], sums: [Sums { negated, scaled }] } = quantized.block(i % 2, i / 2);
                    let (scale, expected) = int8::quantize(block);
                    prop_assert_eq!((*ours, bytes), (scale, &expected), "{}", isa);
                    let sum = |bytes: &[i8]| bytes.iter().map(|&q| i32::from(q)).sum::<i32>();
                    let sums = [sum(&expected[..16]), sum(&expected[16..]), sum(&expected)];
                    prop_assert_eq!(*negated, sums.map(|sum| -sum));
                    prop_assert_eq!(*scaled, sums.map(|sum| scale * sum as f32));
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_shows() {
        for isa in Isa::available() {
            let zeros = ours(isa, &[0.0; 32], 32);
            let block = zeros.block::<1>(0, 0);
            assert_eq!((block.bytes, block.scales), (&[[0; 32]], &[0.0]));
            for (at, bad) in [(0, f32::NAN), (31, f32::INFINITY), (16, f32::NEG_INFINITY), (5, f32::NAN)] {
                let mut row = [1.0; 32];
                row[at] = bad;
                assert!(ours(isa, &row, 32).block::<1>(0, 0).scales[0].is_nan(), "{isa}: {bad} at {at}");
            }
        }
    }
}
