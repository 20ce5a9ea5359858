//! Products with weights of block formats, in bytes.
//!
//! Order: an output is one lane of one accumulator that starts at 0. By ascending group of columns it
//! takes the exact sum of the group's products, times the product of both scales, and then, where the format has
//! minima, the minimum times the scaled sum of the activations.

use std::ops::Range;

use crate::blocks::{Blocks, ForFormat, Format, QUADS, with_format};
use crate::kernels::linear::PartOut;
use crate::kernels::quantize::Quantized;
use crate::simd::{Kernel, Simd};

/// A part of a product: some rows times some panels.
pub(crate) struct BlockPart<'a> {
    pub(crate) x: &'a Quantized,
    /// Row of `x` that is row 0 here.
    pub(crate) first: usize,
    pub(crate) w: &'a Blocks,
    pub(crate) rows: Range<usize>,
    pub(crate) panels: Range<usize>,
    pub(crate) out: PartOut<'a>,
}

impl Kernel for BlockPart<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        with_format(self.w.format, Run(s, self));
    }
}

struct Run<'a, S>(S, BlockPart<'a>);

impl<S: Simd> ForFormat for Run<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run<F: Format>(self, _: F) {
        let Run(s, part) = self;
        for panel in part.panels.clone() {
            let mut row = part.rows.start;
            while row < part.rows.end {
                let left = part.rows.end - row;
                row += if left >= 8 && S::ACCUMULATORS >= 8 {
                    part.tile::<S, F, 8>(s, row, panel)
                } else if left >= 4 {
                    part.tile::<S, F, 4>(s, row, panel)
                } else if left >= 2 {
                    part.tile::<S, F, 2>(s, row, panel)
                } else {
                    part.tile::<S, F, 1>(s, row, panel)
                };
            }
        }
    }
}

impl BlockPart<'_> {
    /// Rows `row..row + R` of one panel; returns `R`.
    #[inline(always)]
    fn tile<S: Simd, F: Format, const R: usize>(&self, s: S, row: usize, panel: usize) -> usize {
        let w = self.w.panel::<F>(panel);
        // One row waits for memory anyhow; later rows find the panel in cache.
        let first = R > 1 && row == self.rows.start;
        let mut acc = [s.splat(0.0); R];
        for chunk in 0..self.w.chunks() {
            let x = self.x.block::<R>(chunk, self.first + row);
            if first {
                w.prefetch(s, chunk);
            }
            let quads = w.quads(s, chunk);
            for group in 0..F::GROUPS {
                let (scale, min) = w.group(s, chunk, group);
                // Which sum of the activations: of a half, or of all.
                let sum = if F::GROUPS == 2 { group } else { 2 };
                for (r, acc) in acc.iter_mut().enumerate() {
                    let start = if F::SIGNED { S::SIGNED_SHIFT } else { F::OFFSET_SHIFT };
                    let mut dot = s.shifted(&x.sums[r].negated[sum], start);
                    let x_quads = x.bytes[r].as_chunks().0;
                    for j in group * QUADS / F::GROUPS..(group + 1) * QUADS / F::GROUPS {
                        dot = match F::SIGNED {
                            true => s.dot_signed(dot, quads[j], &x_quads[j]),
                            false => s.dot(dot, quads[j], &x_quads[j]),
                        };
                    }
                    let scale = s.mul(scale, s.splat(x.scales[r]));
                    *acc = s.mul_add(s.to_f32(dot), scale, *acc);
                    if F::BLOCK.has_min() {
                        *acc = s.mul_add(min, s.splat(x.sums[r].scaled[sum]), *acc);
                    }
                }
            }
        }
        self.out.put(s, row, panel, acc.map(|acc| [acc]));
        R
    }
}
