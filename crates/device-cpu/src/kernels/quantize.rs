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
    fn run<S: Simd>(self, _: S) {
        let Quantized { blocks, quants, scales, sums } = self.into;
        for r in 0..self.x.rows {
            for (b, block) in self.x.row(r).as_chunks().0.iter().enumerate() {
                let i = r * *blocks + b;
                (scales[i], quants[i]) = q8_0::quantize_activation_block(block);
                sums[i] = quants[i].iter().map(|&q| i32::from(q)).sum();
            }
        }
    }
}
