//! Activations for weights of block formats: each row in blocks of 32 signed bytes, as [`baton_device::int8`] says.
//!
//! Blocks lie by column first, then by row, so that a kernel finds the block of the next row at a fixed distance.

use baton_device::int8;

use crate::isa::Dispatch;
use crate::pool::Pool;
use crate::simd::{Kernel, Simd};
use crate::tensor::View;

/// Of a value, in multiply-adds.
const WORK: usize = 2;

/// Quantised rows. Grows to the largest step and is then reused.
#[derive(Default)]
pub(crate) struct Quantized {
    rows: usize,
    bytes: Vec<[i8; int8::BLOCK]>,
    factors: Vec<Factors>,
}

/// What a block's bytes are to be multiplied by and corrected with. Sums are of the first half, of the
/// second, and of all its bytes.
#[derive(Clone, Copy, Default)]
#[repr(C, align(32))]
pub(crate) struct Factors {
    pub(crate) scale: f32,
    pub(crate) negated_sums: [i32; 3],
    pub(crate) scaled_sums: [f32; 3],
}

impl Quantized {
    /// Replaces the contents by all rows of `x`.
    pub(crate) fn fill(&mut self, pool: &Pool, isa: Dispatch, x: View<'_>) {
        let (rows, blocks) = (x.rows, x.width / int8::BLOCK);
        self.rows = rows;
        self.bytes.resize(rows * blocks, [0; _]);
        self.factors.resize(rows * blocks, Factors::default());
        if rows == 0 {
            return;
        }
        let work = WORK * rows * x.width;
        let share = pool.share(blocks, work);
        let parts = self.bytes.chunks_mut(share * rows).zip(self.factors.chunks_mut(share * rows));
        pool.each(parts, work, |part, (bytes, factors)| {
            isa.run(Quantize { x, first: part * share, bytes, factors });
        });
    }

    /// Block `block` of rows `first..first + R`.
    #[inline(always)]
    pub(crate) fn block<const R: usize>(&self, block: usize, first: usize) -> (&[[i8; int8::BLOCK]; R], &[Factors; R]) {
        let start = block * self.rows + first;
        let bytes = self.bytes[start..].first_chunk().expect("R rows");
        (bytes, self.factors[start..].first_chunk().expect("R rows"))
    }
}

struct Quantize<'a> {
    x: View<'a>,
    /// Block of the first column that is filled.
    first: usize,
    bytes: &'a mut [[i8; int8::BLOCK]],
    factors: &'a mut [Factors],
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let columns = self.bytes.chunks_exact_mut(self.x.rows).zip(self.factors.chunks_exact_mut(self.x.rows));
        for (i, (bytes, factors)) in columns.enumerate() {
            for (r, (bytes, factors)) in bytes.iter_mut().zip(factors).enumerate() {
                let block = self.x.row(r).as_chunks().0;
                (factors.scale, *bytes) = quantize_block(s, &block[self.first + i]);
                let halves = bytes.as_chunks::<{ int8::BLOCK / 2 }>().0;
                let [low, high] = [0, 1].map(|half| halves[half].iter().map(|&q| i32::from(q)).sum::<i32>());
                let sums = [low, high, low + high];
                factors.negated_sums = sums.map(|sum| -sum);
                factors.scaled_sums = sums.map(|sum| factors.scale * sum as f32);
            }
        }
    }
}

/// What [`int8::quantize`] computes.
#[inline(always)]
fn quantize_block<S: Simd>(s: S, x: &[f32; int8::BLOCK]) -> (f32, [i8; int8::BLOCK]) {
    let zero = s.splat(0.0);
    let (mut magnitude, mut nothing) = (zero, zero);
    for x in x.as_chunks().0 {
        let v = s.load(x);
        magnitude = s.at_least(s.at_least(s.sub(zero, v), v), magnitude);
        // Not a number as soon as a value is not finite.
        nothing = s.mul_add(v, zero, nothing);
    }
    let scale = s.max(magnitude) / 127.0 + s.sum(nothing);
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    // Half away from zero is towards zero after adding the largest number below a half.
    let round = |v: f32| (v * inverse + 0.499_999_97_f32.copysign(v)) as i32;
    let mut bytes = [0; int8::BLOCK];
    for (byte, &x) in bytes.iter_mut().zip(x) {
        *byte = round(x).clamp(-127, 127) as i8;
    }
    (scale, bytes)
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
                    let ([bytes], [factors]) = quantized.block::<1>(i % 2, i / 2);
                    let (scale, expected) = int8::quantize(block);
                    prop_assert_eq!((factors.scale, bytes), (scale, &expected), "{}", isa);
                    let sum = |bytes: &[i8]| bytes.iter().map(|&q| i32::from(q)).sum::<i32>();
                    let sums = [sum(&expected[..16]), sum(&expected[16..]), sum(&expected)];
                    prop_assert_eq!(factors.negated_sums, sums.map(|sum| -sum));
                    prop_assert_eq!(factors.scaled_sums, sums.map(|sum| scale * sum as f32));
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_shows() {
        for isa in Isa::available() {
            let zeros = ours(isa, &[0.0; 32], 32);
            let ([bytes], [factors]) = zeros.block::<1>(0, 0);
            assert_eq!((bytes, factors.scale), (&[0; 32], 0.0));
            for (at, bad) in [(0, f32::NAN), (31, f32::INFINITY), (16, f32::NEG_INFINITY), (5, f32::NAN)] {
                let mut row = [1.0; 32];
                row[at] = bad;
                assert!(ours(isa, &row, 32).block::<1>(0, 0).1[0].scale.is_nan(), "{isa}: {bad} at {at}");
            }
        }
    }
}
