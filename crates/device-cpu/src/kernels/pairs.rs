//! Products with bf16 weights in bf16: activations are rounded, once per row, and two products at a time are added in
//! f32 by one instruction.
//!
//! Order: an output is one lane of one accumulator that starts at 0 and takes its pairs of columns by ascending
//! number, of each pair the second column first.

use std::ops::Range;

use half::bf16;

use crate::isa::Dispatch;
use crate::kernels::linear::{PartOut, RowNumbers, Tiles, walk};
use crate::pool::Pool;
use crate::simd::{LANES, PairDot, PairKernel, Simd};
use crate::tensor::View;
use crate::weight::{Pair, Panels};

/// Pairs of a vector.
const STEP: usize = LANES / 2;

/// Rounded rows. Grows to the largest step and is then reused.
#[derive(Default)]
pub(crate) struct Rounded {
    /// Each row's pairs, filled up with zeros.
    pairs: Vec<Pair>,
    stride: usize,
}

impl Rounded {
    /// Replaces the contents by all rows of `x`.
    ///
    /// # Panics
    /// If the instruction set has no pairs.
    pub(crate) fn fill(&mut self, pool: &Pool, isa: Dispatch, x: View<'_>) {
        // An odd number of cache lines, so that equal columns of some rows do not meet in one set of a cache.
        self.stride = (x.width.div_ceil(2).div_ceil(LANES) | 1) * LANES;
        self.pairs.resize(x.rows * self.stride, [bf16::ZERO; 2]);
        let work = x.rows * x.width;
        let share = pool.share(x.rows, work);
        pool.each(self.pairs.chunks_mut(share * self.stride), work, |part, pairs| {
            isa.run_pairs(Round { x, first: part * share, stride: self.stride, pairs });
        });
    }

    #[inline(always)]
    fn row(&self, r: usize) -> &[Pair] {
        &self.pairs[r * self.stride..][..self.stride]
    }
}

struct Round<'a> {
    x: View<'a>,
    /// Row that is filled first.
    first: usize,
    stride: usize,
    pairs: &'a mut [Pair],
}

impl PairKernel for Round<'_> {
    #[inline(always)]
    fn run<S: Simd, D: PairDot<S>>(self, s: S, d: D) {
        for (r, pairs) in self.pairs.chunks_exact_mut(self.stride).enumerate() {
            let x = self.x.row(self.first + r);
            let used = x.len().div_ceil(LANES);
            for (x, pairs) in x.chunks(LANES).zip(pairs.chunks_exact_mut(STEP)) {
                pairs.as_flattened_mut().copy_from_slice(&d.round(s.load_first(x)));
            }
            pairs[used * STEP..].fill([bf16::ZERO; 2]);
        }
    }
}

/// A part of a product: some rows times some panels.
pub(crate) struct PairPart<'a> {
    pub(crate) x: &'a Rounded,
    pub(crate) at: RowNumbers<'a>,
    pub(crate) w: &'a Panels<Pair>,
    pub(crate) rows: Range<usize>,
    pub(crate) panels: Range<usize>,
    pub(crate) out: PartOut<'a>,
}

impl PairKernel for PairPart<'_> {
    #[inline(always)]
    fn run<S: Simd, D: PairDot<S>>(self, s: S, d: D) {
        walk(s, &WithDot(&self, d), self.rows.clone(), self.panels.clone());
    }
}

struct WithDot<'a, D>(&'a PairPart<'a>, D);

impl<S: Simd, D: PairDot<S>> Tiles<S> for WithDot<'_, D> {
    const COST: usize = 1;

    #[inline(always)]
    fn tile<const R: usize, const P: usize>(&self, s: S, row: usize, panel: usize) {
        let &WithDot(part, d) = self;
        let depth = part.w.panel(panel).len();
        let mut x: [&[Pair]; R] = [&[]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &part.x.row(part.at.get(row + r))[..depth];
        }
        let mut w: [&[[Pair; LANES]]; P] = [&[]; P];
        for (p, w) in w.iter_mut().enumerate() {
            *w = &part.w.panel(panel + p)[..depth];
        }
        let mut acc = [[s.splat(0.0); P]; R];
        for k in 0..depth {
            let mut columns = [s.load_bytes(bytemuck::cast_ref(&w[0][k])); P];
            for p in 1..P {
                // SAFETY: every slice was cut to `depth`.
                columns[p] = s.load_bytes(bytemuck::cast_ref(unsafe { w[p].get_unchecked(k) }));
            }
            for r in 0..R {
                // SAFETY: as above.
                let x = unsafe { x[r].get_unchecked(k) };
                for p in 0..P {
                    acc[r][p] = d.dot(acc[r][p], columns[p], x);
                }
            }
        }
        part.out.put(s, row, panel, acc);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn rows_are_rounded_to_the_nearest_bf16_of_two_the_even_one() {
        let Some(isa) = Isa::available().into_iter().filter_map(Isa::dispatch).find(|isa| isa.has_pairs()) else {
            return;
        };
        // All upper halves with lower halves below, at and above the middle, but for subnormal numbers.
        let bits = |high: u32| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(high << 16 | low));
        let values: Vec<f32> = (0..1 << 16).flat_map(bits).filter(|x| !x.is_subnormal()).collect();
        for width in [values.len(), 37, 1] {
            let rows = values.len() / width;
            let x = View { data: &values, rows, stride: width, start: 0, width, index: None };
            let mut rounded = Rounded::default();
            rounded.fill(&Pool::new(2).unwrap(), isa, x);
            for r in 0..rows {
                let ours = rounded.row(r).as_flattened();
                for (ours, &x) in ours.iter().zip(x.row(r)) {
                    let expected = bf16::from_f32(x);
                    assert!(*ours == expected || ours.is_nan() && x.is_nan(), "{x:e}: {ours}, not {expected}");
                }
                assert!(ours[width..].iter().all(|x| x.to_bits() == 0));
            }
        }
    }
}
