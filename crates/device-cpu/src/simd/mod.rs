//! Vectors of 16 f32 lanes, whatever the registers are: one on AVX-512, two on AVX2, four on NEON.
//!
//! Kernels are written once against [`Simd`] and instantiated per instruction set by
//! [`crate::isa::Dispatch`]. A value of a `Simd` type is proof that the machine has its features, so
//! the operations are safe to call. Every method is inlined into a function that enables those
//! features; that is why all of them, and the kernels, are `#[inline(always)]`, and why they hold no closure with
//! an operation in it: closures are compiled without those features unless they happen to be inlined.
//!
//! Each operation has one fixed order of additions, so equal inputs give equal bits wherever a
//! kernel uses it.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;

use half::{bf16, f16};

/// The largest number below a half: added with the sign of a number before it is cut to an integer, it rounds halves
/// away from zero.
pub(crate) const ALMOST_HALF: f32 = 0.499_999_97;

/// Lanes of a vector, on every instruction set.
pub(crate) const LANES: usize = 16;

/// Code that is compiled once per instruction set. Implementations of `run` are `#[inline(always)]`.
pub(crate) trait Kernel {
    /// Runs with the instructions that `s` stands for.
    fn run<S: Simd>(self, s: S);
}

/// Code that multiplies pairs of bf16 by an instruction that not every machine with a [`Simd`] has.
pub(crate) trait PairKernel {
    /// Runs with the instructions that `s` and `pairs` stand for.
    fn run<S: Simd, D: PairDot<S>>(self, s: S, pairs: D);
}

/// The instructions for [`PairKernel`].
pub(crate) trait PairDot<S: Simd>: Copy {
    /// Adds to each lane the products of its pair of `w` with the pair `x`, the second first.
    fn dot(self, acc: S::F32, w: S::Bytes, x: &[bf16; 2]) -> S::F32;
    /// The nearest bf16, of two equally near the even one.
    fn round(self, x: S::F32) -> [bf16; LANES];
}

/// An instruction set.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// 16 floats.
    type F32: Copy;
    /// 16 integers.
    type I32: Copy;
    /// 16 groups of 4 bytes.
    type Bytes: Copy;

    /// How many `F32` accumulators leave room in the registers for operands.
    const ACCUMULATORS: usize;
    /// Where a chain of [`Simd::dot_signed`] starts; 32 for at nothing.
    const SIGNED_SHIFT: u32;

    fn splat(self, x: f32) -> Self::F32;
    fn load(self, x: &[f32; LANES]) -> Self::F32;
    fn load_f16(self, x: &[f16; LANES]) -> Self::F32;
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::F32;
    /// The first bf16 of each pair, widened.
    fn first_bf16(self, pairs: Self::Bytes) -> Self::F32;
    /// The second bf16 of each pair, widened.
    fn second_bf16(self, pairs: Self::Bytes) -> Self::F32;
    fn store(self, v: Self::F32, out: &mut [f32; LANES]);
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once where the instruction set can.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The larger of two, `x` if it is not a number.
    fn at_least(self, x: Self::F32, low: Self::F32) -> Self::F32;
    /// The smaller of two, `x` if it is not a number.
    fn at_most(self, x: Self::F32, high: Self::F32) -> Self::F32;
    /// Adds the integer in the low bits of each `n` to the exponent of `v`: `v * 2^n`.
    fn add_exponent(self, v: Self::F32, n: Self::F32) -> Self::F32;
    /// Sums the lanes of each of four vectors.
    fn sums(self, v: [Self::F32; 4]) -> [f32; 4];

    /// Brings what will be loaded soon into the second level of cache, where the instruction set can. Any address
    /// will do: one that cannot be read is passed over.
    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}

    /// Small integers, widened.
    fn load_i8(self, x: &[i8; LANES]) -> Self::F32;

    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::Bytes;
    /// Each byte moved `shift` bits to the right (left if negative), then masked: `mask` holds no bit that a
    /// neighbour's could reach.
    fn field(self, v: Self::Bytes, shift: i32, mask: u8) -> Self::Bytes;
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// `value` in byte i where bit i is set, else 0.
    fn plane(self, bits: u64, value: u8) -> Self::Bytes;
    /// `table[i]` for every byte i, which is below 16.
    fn lookup(self, table: &[i8; LANES], indices: Self::Bytes) -> Self::Bytes;
    /// Signed bytes, none of them -128, in the form that [`Simd::dot_signed`] takes.
    fn signed(self, v: Self::Bytes) -> Self::Bytes;
    /// All lanes `x << shift`; 0 for a shift of 32.
    fn shifted(self, x: &i32, shift: u32) -> Self::I32;
    /// Adds to each lane the dot product of its group of `w`, bytes below 128, with the four signed bytes
    /// of `x`, none of them -128. Exact.
    fn dot(self, acc: Self::I32, w: Self::Bytes, x: &[i8; 4]) -> Self::I32;
    /// The same for signed bytes made by [`Simd::signed`], where the chain started at the negated sum of
    /// all bytes of `x` that it will see, shifted by [`Simd::SIGNED_SHIFT`].
    fn dot_signed(self, acc: Self::I32, w: Self::Bytes, x: &[i8; 4]) -> Self::I32;
    fn to_f32(self, v: Self::I32) -> Self::F32;

    /// The largest magnitude of both, at least infinite if one is not finite.
    fn max_abs(self, a: Self::F32, b: Self::F32) -> f32;
    /// The nearest integers, halves away from zero, of numbers within ±127.4, and their sum.
    fn round_to_bytes(self, v: Self::F32) -> ([i8; LANES], i32);

    /// Lane j of vector i becomes lane i of vector j.
    #[inline(always)]
    fn transpose(self, v: [Self::F32; LANES]) -> [Self::F32; LANES] {
        let (mut rows, mut columns) = ([[0.0; LANES]; LANES], [[0.0; LANES]; LANES]);
        for i in 0..LANES {
            self.store(v[i], &mut rows[i]);
        }
        for i in 0..LANES {
            for j in 0..LANES {
                columns[j][i] = rows[i][j];
            }
        }
        let mut out = v;
        for j in 0..LANES {
            out[j] = self.load(&columns[j]);
        }
        out
    }

    /// Sum of the lanes.
    #[inline(always)]
    fn sum(self, v: Self::F32) -> f32 {
        let zero = self.splat(0.0);
        self.sums([v, zero, zero, zero])[0]
    }

    /// Largest of the lanes, unspecified if one is not a number.
    #[inline(always)]
    fn max(self, v: Self::F32) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
            }
        }
        lanes[0]
    }

    /// Up to 16 floats, zeros behind them.
    #[inline(always)]
    fn load_first(self, x: &[f32]) -> Self::F32 {
        if let Some(x) = x.first_chunk() {
            return self.load(x);
        }
        let mut lanes = [0.0; LANES];
        lanes[..x.len()].copy_from_slice(x);
        self.load(&lanes)
    }

    /// The first lanes, as many as `out` has and at most 16.
    #[inline(always)]
    fn store_first(self, v: Self::F32, out: &mut [f32]) {
        if let Some(out) = out.first_chunk_mut() {
            return self.store(v, out);
        }
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        let len = out.len();
        out.copy_from_slice(&lanes[..len]);
    }

    /// `e^x` to about 1e-7 relative for x in [-87, 88]; outside, the value at the border.
    ///
    /// `x = n ln 2 + r` with |r| ≤ ln 2 / 2, and a polynomial in r (coefficients of Cephes' `expf`).
    /// Adding 1.5·2²³ rounds to the nearest integer and leaves it in the low bits.
    #[inline(always)]
    fn exp(self, x: Self::F32) -> Self::F32 {
        let x = self.at_most(self.at_least(x, self.splat(-87.0)), self.splat(88.0));
        let magic = self.splat(12_582_912.0);
        let shifted = self.mul_add(x, self.splat(std::f32::consts::LOG2_E), magic);
        let n = self.sub(shifted, magic);
        let r = self.mul_add(n, self.splat(-0.693_359_4), x);
        let r = self.mul_add(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = self.mul_add(p, r, self.splat(c));
        }
        let p = self.add(self.mul_add(p, self.mul(r, r), r), self.splat(1.0));
        self.add_exponent(p, shifted)
    }

    /// `x / (1 + e^-x)`.
    #[inline(always)]
    fn silu(self, x: Self::F32) -> Self::F32 {
        let e = self.exp(self.sub(self.splat(0.0), x));
        self.div(x, self.add(self.splat(1.0), e))
    }

    /// `1 - 2 / (1 + e^2x)`: tanh to about 1e-7 absolute.
    #[inline(always)]
    fn tanh(self, x: Self::F32) -> Self::F32 {
        let e = self.exp(self.add(x, x));
        self.sub(self.splat(1.0), self.div(self.splat(2.0), self.add(self.splat(1.0), e)))
    }

    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`, as `x / (1 + e^-2(…))`, which is the same.
    #[inline(always)]
    fn gelu_tanh(self, x: Self::F32) -> Self::F32 {
        let cubic = self.mul_add(self.mul(x, x), self.splat(0.044715), self.splat(1.0));
        let e = self.exp(self.mul(self.mul(x, cubic), self.splat(-2.0 * (2.0 / std::f32::consts::PI).sqrt())));
        self.div(x, self.add(self.splat(1.0), e))
    }

    /// `cap · tanh(x / cap)`.
    #[inline(always)]
    fn softcap(self, x: Self::F32, cap: f32) -> Self::F32 {
        self.mul(self.tanh(self.div(x, self.splat(cap))), self.splat(cap))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    /// Applies a function of a vector to all of `x`, on one instruction set.
    struct Map<'a, F> {
        x: &'a mut [f32],
        f: F,
    }

    trait VectorFn {
        fn apply<S: Simd>(&self, s: S, v: S::F32) -> S::F32;
    }

    impl<F: VectorFn> Kernel for Map<'_, F> {
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for x in self.x.as_chunks_mut().0 {
                s.store(self.f.apply(s, s.load(x)), x);
            }
        }
    }

    struct Exp;

    impl VectorFn for Exp {
        #[inline(always)]
        fn apply<S: Simd>(&self, s: S, v: S::F32) -> S::F32 {
            s.exp(v)
        }
    }

    struct Tanh;

    impl VectorFn for Tanh {
        #[inline(always)]
        fn apply<S: Simd>(&self, s: S, v: S::F32) -> S::F32 {
            s.tanh(v)
        }
    }

    #[test]
    fn tanh_is_right_to_2e_7_keeps_its_limits_and_nan() {
        for isa in Isa::available() {
            let exact: Vec<f32> = (0..16 * 4096).map(|i| -20.0 + 40.0 * i as f32 / 65_536.0).collect();
            let mut ours = exact.clone();
            isa.dispatch().unwrap().run(Map { x: &mut ours, f: Tanh });
            for (x, y) in exact.iter().zip(&ours) {
                let error = (f64::from(*y) - f64::from(*x).tanh()).abs();
                assert!(error < 2e-7, "{isa}: tanh({x}) = {y}, off by {error:e}");
            }
            let mut odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0].repeat(4);
            isa.dispatch().unwrap().run(Map { x: &mut odd, f: Tanh });
            assert!(odd[0].is_nan() && odd[1..4] == [1.0, -1.0, 0.0], "{isa}: {odd:?}");
        }
    }

    struct Reduce;

    impl VectorFn for Reduce {
        #[inline(always)]
        fn apply<S: Simd>(&self, s: S, v: S::F32) -> S::F32 {
            let [a, b, c, d] = s.sums([v, s.splat(1.0), s.add(v, v), s.splat(0.0)]);
            s.load_first(&[a, b, c, d, s.sum(v), s.max(v)])
        }
    }

    #[test]
    fn exp_is_right_to_1e_6_over_its_whole_range_and_keeps_nan() {
        for isa in Isa::available() {
            let exact: Vec<f32> = (0..16 * 4096).map(|i| -87.0 + 175.0 * i as f32 / 65_536.0).collect();
            let mut ours = exact.clone();
            isa.dispatch().unwrap().run(Map { x: &mut ours, f: Exp });
            for (x, y) in exact.iter().zip(&ours) {
                let error = (f64::from(*y) / f64::from(*x).exp() - 1.0).abs();
                assert!(error < 1e-6, "{isa}: exp({x}) = {y}, off by {error:e}");
            }
            let mut odd = [f32::NAN, 1000.0, -1000.0, f32::NEG_INFINITY, 0.0, -0.0].repeat(8);
            isa.dispatch().unwrap().run(Map { x: &mut odd, f: Exp });
            assert!(odd[0].is_nan() && odd[1] > 1e38 && odd[2] < 1e-37 && odd[3] < 1e-37, "{isa}: {odd:?}");
            assert_eq!(odd[4..6], [1.0, 1.0], "{isa}");
        }
    }

    #[test]
    fn reductions_see_every_lane_once() {
        for isa in Isa::available() {
            for lane in 0..LANES {
                let mut x = [-1.0; LANES];
                x[lane] = 100.0;
                isa.dispatch().unwrap().run(Map { x: &mut x, f: Reduce });
                assert_eq!(x[..6], [85.0, 16.0, 170.0, 0.0, 85.0, 100.0], "{isa}, lane {lane}");
            }
        }
    }

    struct Transpose<'a>(&'a mut [[f32; LANES]; LANES]);

    impl Kernel for Transpose<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let mut v = [s.splat(0.0); LANES];
            for (v, row) in v.iter_mut().zip(&*self.0) {
                *v = s.load(row);
            }
            for (v, row) in s.transpose(v).into_iter().zip(self.0) {
                s.store(v, row);
            }
        }
    }

    #[test]
    fn a_transposed_square_has_its_lanes_where_its_vectors_were() {
        for isa in Isa::available() {
            let mut square = std::array::from_fn(|i| std::array::from_fn(|j| (LANES * i + j) as f32));
            isa.dispatch().unwrap().run(Transpose(&mut square));
            for (j, row) in square.iter().enumerate() {
                assert_eq!(*row, std::array::from_fn(|i| (LANES * i + j) as f32), "{isa}");
            }
        }
    }
}
