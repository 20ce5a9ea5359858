//! Operations on single rows: norms, additions, gated activation.
//!
//! Order: the squares of a norm are added lane by lane over vectors of 16, then the lanes.

use crate::simd::{Kernel, LANES, Simd};

/// `x = x / sqrt(mean(x²) + eps) * weight` over each run of `weight.len()`.
pub(crate) struct RmsNorm<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for run in self.x.chunks_exact_mut(self.weight.len()) {
            let mut squares = s.splat(0.0);
            for part in run.chunks(LANES) {
                let v = s.load_first(part);
                squares = s.mul_add(v, v, squares);
            }
            let mean = s.sum(squares) / run.len() as f32;
            let inverse = s.splat(1.0 / (mean + self.eps).sqrt());
            for (part, weight) in run.chunks_mut(LANES).zip(self.weight.chunks(LANES)) {
                let v = s.mul(s.mul(s.load_first(part), inverse), s.load_first(weight));
                s.store_first(v, part);
            }
        }
    }
}

/// `x += y`.
pub(crate) struct Add<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) y: &'a [f32],
}

impl Kernel for Add<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (x, y) in self.x.iter_mut().zip(self.y) {
            *x += y;
        }
    }
}

/// `gate = silu(gate) ⊙ up`.
pub(crate) struct SiluMul<'a> {
    pub(crate) gate: &'a mut [f32],
    pub(crate) up: &'a [f32],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (gate, up) in self.gate.chunks_mut(LANES).zip(self.up.chunks(LANES)) {
            let v = s.mul(s.silu(s.load_first(gate)), s.load_first(up));
            s.store_first(v, gate);
        }
    }
}

/// `x += factor * y`.
pub(crate) struct AddScaled<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) y: &'a [f32],
    pub(crate) factor: f32,
}

impl Kernel for AddScaled<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let factor = s.splat(self.factor);
        for (x, y) in self.x.chunks_mut(LANES).zip(self.y.chunks(LANES)) {
            let v = s.mul_add(factor, s.load_first(y), s.load_first(x));
            s.store_first(v, x);
        }
    }
}
