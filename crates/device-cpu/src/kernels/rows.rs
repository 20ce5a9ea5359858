//! Operations on single rows: norms, additions, gated activation, soft-capping.
//!
//! Order: the squares of a norm are added lane by lane over vectors of 16, then the lanes.

use baton_device::Activation;

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

/// `x = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` over the whole row.
pub(crate) struct LayerNorm<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) bias: &'a [f32],
    pub(crate) eps: f32,
}

impl Kernel for LayerNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let len = self.x.len() as f32;
        let mut sum = s.splat(0.0);
        for part in self.x.chunks(LANES) {
            sum = s.add(sum, s.load_first(part));
        }
        let mean = s.sum(sum) / len;
        self.x.iter_mut().for_each(|x| *x -= mean);
        let mut squares = s.splat(0.0);
        for part in self.x.chunks(LANES) {
            let v = s.load_first(part);
            squares = s.mul_add(v, v, squares);
        }
        let inverse = s.splat(1.0 / (s.sum(squares) / len + self.eps).sqrt());
        let parameters = self.weight.chunks(LANES).zip(self.bias.chunks(LANES));
        for (part, (weight, bias)) in self.x.chunks_mut(LANES).zip(parameters) {
            let v = s.mul_add(s.mul(s.load_first(part), inverse), s.load_first(weight), s.load_first(bias));
            s.store_first(v, part);
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

/// `x *= factor`.
pub(crate) struct Scale<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) factor: f32,
}

impl Kernel for Scale<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for x in self.x {
            *x *= self.factor;
        }
    }
}

/// `x = min(max(x, low), high)`.
pub(crate) struct Clamp<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) low: f32,
    pub(crate) high: f32,
}

impl Kernel for Clamp<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (low, high) = (s.splat(self.low), s.splat(self.high));
        for x in self.x.chunks_mut(LANES) {
            s.store_first(s.at_most(s.at_least(s.load_first(x), low), high), x);
        }
    }
}

/// `x = cap * tanh(x / cap)`.
pub(crate) struct Softcap<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) cap: f32,
}

impl Kernel for Softcap<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.x.chunks_mut(LANES) {
            s.store_first(s.softcap(s.load_first(x), self.cap), x);
        }
    }
}

/// `gate = activation(gate) ⊙ up`.
pub(crate) struct Gated<'a> {
    pub(crate) activation: Activation,
    pub(crate) gate: &'a mut [f32],
    pub(crate) up: &'a [f32],
}

impl Kernel for Gated<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (gate, up) in self.gate.chunks_mut(LANES).zip(self.up.chunks(LANES)) {
            let x = s.load_first(gate);
            let v = match self.activation {
                Activation::Silu => s.silu(x),
                Activation::GeluTanh => s.gelu_tanh(x),
            };
            s.store_first(s.mul(v, s.load_first(up)), gate);
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
