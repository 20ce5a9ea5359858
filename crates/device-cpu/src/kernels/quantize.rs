//! Activations for Q8_0 weights: each row in blocks of 32 signed bytes, as [`baton_device::q8_0`] says.

use baton_device::q8_0;

use crate::isa::Dispatch;
use crate::simd::{Kernel, Simd};
use crate::tensor::View;

/// Quantised rows. Grows to the largest step and is then reused.
#[derive(Default)]
pub(crate) struct Quantized {
    /// Blocks per row.
    blocks: usize,
    quants: Vec<[i8; q8_0::BLOCK]>,
    scales: Vec<f32>,
    /// Sum of the quants of each block.
    sums: Vec<i32>,
}

impl Quantized {
    /// Replaces the contents by all rows of `x`.
    pub(crate) fn fill(&mut self, isa: Dispatch, x: View<'_>) {
        self.blocks = x.width / q8_0::BLOCK;
        let total = x.rows * self.blocks;
        self.quants.resize(total, [0; q8_0::BLOCK]);
        self.scales.resize(total, 0.0);
        self.sums.resize(total, 0);
        isa.run(Quantize { x, into: self });
    }

    /// Quants, scales and sums of row `r`.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> (&[[i8; q8_0::BLOCK]], &[f32], &[i32]) {
        let range = r * self.blocks..(r + 1) * self.blocks;
        (&self.quants[range.clone()], &self.scales[range.clone()], &self.sums[range])
    }
}

struct Quantize<'a> {
    x: View<'a>,
    into: &'a mut Quantized,
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Quantized { blocks, quants, scales, sums } = self.into;
        for r in 0..self.x.rows {
            for (b, block) in self.x.row(r).as_chunks().0.iter().enumerate() {
                let i = r * *blocks + b;
                (scales[i], quants[i]) = quantize_block(s, block);
                sums[i] = quants[i].iter().map(|&q| i32::from(q)).sum();
            }
        }
    }
}

/// What [`q8_0::quantize_activation_block`] computes, for finite numbers.
#[inline(always)]
fn quantize_block<S: Simd>(s: S, x: &[f32; q8_0::BLOCK]) -> (f32, [i8; q8_0::BLOCK]) {
    let zero = s.splat(0.0);
    let magnitude = x.as_chunks().0.iter().fold(zero, |max, x| {
        let v = s.load(x);
        s.at_least(s.at_least(s.sub(zero, v), v), max)
    });
    let scale = s.max(magnitude) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    // Half away from zero is towards zero after adding the largest number below a half.
    let round = |v: f32| (v * inverse + 0.499_999_97_f32.copysign(v)) as i32;
    let mut quants = [0; q8_0::BLOCK];
    for (quant, &x) in quants.iter_mut().zip(x) {
        *quant = round(x).clamp(-127, 127) as i8;
    }
    (scale, quants)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use proptest::prelude::*;

    fn ours(isa: Isa, row: &[f32]) -> Quantized {
        let mut quantized = Quantized::default();
        let x = View { data: row, rows: 1, stride: row.len(), start: 0, width: row.len(), index: None };
        quantized.fill(isa.dispatch().unwrap(), x);
        quantized
    }

    proptest! {
        #[test]
        fn blocks_are_quantised_as_the_format_says(
            row in prop::collection::vec(-3.0f32..3.0, 64), halves in prop::collection::vec(-254i32..=254, 32),
            power in -60..60i32,
        ) {
            // Multiples of half a step: where rounding has to choose.
            let mut row = row;
            row.extend(halves.iter().map(|&h| h as f32 * 0.5));
            row[64] = 127.0;
            row.iter_mut().for_each(|x| *x *= 2.0f32.powi(power));
            for isa in Isa::available() {
                let quantized = ours(isa, &row);
                let (quants, scales, sums) = quantized.row(0);
                for (b, block) in row.as_chunks().0.iter().enumerate() {
                    let (scale, expected) = q8_0::quantize_activation_block(block);
                    prop_assert_eq!((scales[b], quants[b]), (scale, expected), "{}", isa);
                    prop_assert_eq!(sums[b], expected.iter().map(|&q| i32::from(q)).sum::<i32>());
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for isa in Isa::available() {
            assert_eq!(ours(isa, &[0.0; 32]).row(0), (&[[0; 32]][..], &[0.0][..], &[0][..]));
        }
    }
}
