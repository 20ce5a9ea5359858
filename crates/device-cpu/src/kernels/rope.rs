//! Rotary position embedding by tables (arXiv 2104.09864).

use baton_device::{HostRope, RopeLayout};

use crate::simd::{Kernel, Simd};

/// Cosines and sines, `[positions, pairs]`.
pub struct Rope {
    pub(crate) pairs: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    pub(crate) fn new(src: &HostRope) -> Self {
        let (cos, sin) = src.tables();
        Self { pairs: src.inv_freq.len(), cos, sin }
    }
}

/// Rotates one row by the angles of its position.
pub(crate) struct Rotate<'a> {
    pub(crate) row: &'a mut [f32],
    pub(crate) layout: RopeLayout,
    pub(crate) table: &'a Rope,
    pub(crate) position: usize,
}

impl Kernel for Rotate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let RopeLayout { head_dim, offset, dim, interleaved, .. } = self.layout;
        let pairs = self.table.pairs;
        let cos = &self.table.cos[self.position * pairs..][..pairs];
        let sin = &self.table.sin[self.position * pairs..][..pairs];
        for head in self.row.chunks_exact_mut(head_dim) {
            let part = &mut head[offset..][..dim];
            if interleaved {
                for ((pair, cos), sin) in part.as_chunks_mut().0.iter_mut().zip(cos).zip(sin) {
                    let [a, b] = *pair;
                    *pair = [a * cos - b * sin, b * cos + a * sin];
                }
            } else {
                let (first, second) = part.split_at_mut(pairs);
                for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}
