//! Residual streams that are joined before a layer and mixed behind it (arXiv 2512.24880).
//!
//! Order: a column of a row takes the streams one after the other, what the layer gave last.

use crate::simd::{Kernel, LANES, Simd};

/// Streams at most.
pub(crate) const MOST: usize = 16;

/// Weights from what a projection gave: see [`baton_device::CompressedOps::stream_weights`]. So few numbers of a row that vectors
/// would not pay.
pub(crate) fn weigh(row: &mut [f32], n: usize, (base, scale): (&[f32], &[f32]), iterations: usize, eps: f32) {
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    for (part, scale) in scale.iter().enumerate() {
        let columns = part * n..if part == 2 { row.len() } else { (part + 1) * n };
        for (x, base) in row[columns.clone()].iter_mut().zip(&base[columns]) {
            *x = x.mul_add(*scale, *base);
        }
    }
    row[..n].iter_mut().for_each(|x| *x = sigmoid(*x) + eps);
    let Some(rest) = row.get_mut(n..).filter(|rest| !rest.is_empty()) else { return };
    let (post, matrix) = rest.split_at_mut(n);
    post.iter_mut().for_each(|x| *x = 2.0 * sigmoid(*x));
    for row in matrix.chunks_exact_mut(n) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|x| *x = (*x - max).exp());
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|x| *x = *x / sum + eps);
    }
    for iteration in 0..iterations {
        if iteration > 0 {
            for row in matrix.chunks_exact_mut(n) {
                let sum = row.iter().sum::<f32>() + eps;
                row.iter_mut().for_each(|x| *x /= sum);
            }
        }
        let mut sums = [eps; MOST];
        for row in matrix.chunks_exact(n) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        for row in matrix.chunks_exact_mut(n) {
            row.iter_mut().zip(&sums).for_each(|(x, sum)| *x /= sum);
        }
    }
}

/// `out = Σ_i weights_i S_i`.
pub(crate) struct Join<'a> {
    pub(crate) streams: &'a [f32],
    pub(crate) weights: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Join<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let hidden = self.out.len();
        for (first, out) in (0..).step_by(LANES).zip(self.out.chunks_mut(LANES)) {
            let mut sum = s.splat(0.0);
            for (stream, weight) in self.streams.chunks_exact(hidden).zip(self.weights) {
                sum = s.mul_add(s.load_first(&stream[first..]), s.splat(*weight), sum);
            }
            s.store_first(sum, out);
        }
    }
}

/// `S_j = post_j x + Σ_i matrix[i, j] S_i`, at most [`MOST`] streams.
pub(crate) struct Mix<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) post: &'a [f32],
    pub(crate) matrix: &'a [f32],
    pub(crate) streams: &'a mut [f32],
}

impl Kernel for Mix<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (hidden, n) = (self.x.len(), self.post.len());
        let mut before = [s.splat(0.0); MOST];
        for (first, x) in (0..).step_by(LANES).zip(self.x.chunks(LANES)) {
            let (len, x) = (x.len(), s.load_first(x));
            for (before, stream) in before.iter_mut().zip(self.streams.chunks_exact(hidden)) {
                *before = s.load_first(&stream[first..][..len]);
            }
            for (j, stream) in self.streams.chunks_exact_mut(hidden).enumerate() {
                let mut sum = s.splat(0.0);
                for (before, row) in before.iter().zip(self.matrix.chunks_exact(n)) {
                    sum = s.mul_add(*before, s.splat(row[j]), sum);
                }
                s.store_first(s.mul_add(x, s.splat(self.post[j]), sum), &mut stream[first..][..len]);
            }
        }
    }
}
