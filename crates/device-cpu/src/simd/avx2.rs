//! AVX2 with FMA and F16C: two registers per vector.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, LANES, Simd};

/// AVX2, FMA and F16C: Haswell, Zen and later.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// `Some` if this machine has it.
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        (found && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }

    /// Runs a kernel compiled for these features.
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn enter<K: Kernel>(s: Avx2, kernel: K) {
            kernel.run(s);
        }
        // SAFETY: a value of this type exists only if `detect` found the features.
        unsafe { enter(self, kernel) }
    }
}

/// An intrinsic on values, or on memory that a reference of its exact size vouches for.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: `self` proves that the features are there (see `Avx2::detect`); addresses stay
        // within the two halves of an array of 16.
        unsafe { $e }
    };
}

impl Simd for Avx2 {
    type F32 = [__m256; 2];
    type I32 = [__m256i; 2];
    type Bytes = [__m256i; 2];

    const ACCUMULATORS: usize = 6;
    const SIGNED_SHIFT: u32 = 32;

    #[inline(always)]
    fn splat(self, x: f32) -> [__m256; 2] {
        [intrinsic!(_mm256_set1_ps(x)); 2]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> [__m256; 2] {
        intrinsic!([_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))])
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> [__m256; 2] {
        let x = x.as_ptr().cast::<__m128i>();
        intrinsic!([_mm256_cvtph_ps(_mm_loadu_si128(x)), _mm256_cvtph_ps(_mm_loadu_si128(x.add(1)))])
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> [__m256; 2] {
        let x = x.as_ptr().cast::<__m128i>();
        intrinsic!([
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(x)))),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(x.add(1))))),
        ])
    }

    #[inline(always)]
    fn first_bf16(self, [a, b]: [__m256i; 2]) -> [__m256; 2] {
        intrinsic!([_mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),])
    }

    #[inline(always)]
    fn second_bf16(self, [a, b]: [__m256i; 2]) -> [__m256; 2] {
        intrinsic!({
            let high = _mm256_set1_epi32(-1 << 16);
            [_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))]
        })
    }

    #[inline(always)]
    fn store(self, v: [__m256; 2], out: &mut [f32; LANES]) {
        intrinsic!({
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        })
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        intrinsic!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sub(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        intrinsic!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        intrinsic!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn div(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        intrinsic!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        intrinsic!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }

    #[inline(always)]
    fn at_least(self, x: [__m256; 2], low: [__m256; 2]) -> [__m256; 2] {
        // The instruction yields its second operand if either is not a number.
        intrinsic!([_mm256_max_ps(low[0], x[0]), _mm256_max_ps(low[1], x[1])])
    }

    #[inline(always)]
    fn at_most(self, x: [__m256; 2], high: [__m256; 2]) -> [__m256; 2] {
        intrinsic!([_mm256_min_ps(high[0], x[0]), _mm256_min_ps(high[1], x[1])])
    }

    #[inline(always)]
    fn add_exponent(self, v: [__m256; 2], n: [__m256; 2]) -> [__m256; 2] {
        let mut out = v;
        for i in 0..2 {
            out[i] = intrinsic!({
                let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(n[i]));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v[i]), n))
            });
        }
        out
    }

    #[inline(always)]
    fn sums(self, [a, b, c, d]: [[__m256; 2]; 4]) -> [f32; 4] {
        intrinsic!({
            let (a, b) = (_mm256_add_ps(a[0], a[1]), _mm256_add_ps(b[0], b[1]));
            let (c, d) = (_mm256_add_ps(c[0], c[1]), _mm256_add_ps(d[0], d[1]));
            // Within each half: [a, b, a, b], then [a, b, c, d].
            let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
            let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
            let halves = _mm256_add_ps(low, _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
            let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        })
    }

    #[inline(always)]
    fn prefetch<T>(self, x: *const T) {
        intrinsic!(_mm_prefetch::<_MM_HINT_T1>(x.cast()))
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> [__m256; 2] {
        intrinsic!({
            let x = _mm_loadu_si128(x.as_ptr().cast());
            let high = _mm_unpackhi_epi64(x, x);
            [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))]
        })
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> [__m256i; 2] {
        let x = x.as_ptr().cast::<__m256i>();
        intrinsic!([_mm256_loadu_si256(x), _mm256_loadu_si256(x.add(1))])
    }

    #[inline(always)]
    fn field(self, v: [__m256i; 2], shift: i32, mask: u8) -> [__m256i; 2] {
        let mut out = v;
        for v in &mut out {
            *v = intrinsic!({
                let count = _mm_cvtsi32_si128(shift.abs());
                let moved = if shift < 0 { _mm256_sll_epi16(*v, count) } else { _mm256_srl_epi16(*v, count) };
                _mm256_and_si256(moved, _mm256_set1_epi8(mask as i8))
            });
        }
        out
    }

    #[inline(always)]
    fn or(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        intrinsic!([_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])])
    }

    #[inline(always)]
    fn plane(self, bits: u64, value: u8) -> [__m256i; 2] {
        let mut out = [intrinsic!(_mm256_setzero_si256()); 2];
        for (out, bits) in out.iter_mut().zip([bits as i32, (bits >> 32) as i32]) {
            *out = intrinsic!({
                // Each byte gets the byte that holds its bit, then keeps that bit alone.
                let home = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
                let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
                let spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), home), bit);
                _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(value as i8))
            });
        }
        out
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; LANES], indices: [__m256i; 2]) -> [__m256i; 2] {
        intrinsic!({
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            [_mm256_shuffle_epi8(table, indices[0]), _mm256_shuffle_epi8(table, indices[1])]
        })
    }

    #[inline(always)]
    fn signed(self, v: [__m256i; 2]) -> [__m256i; 2] {
        v
    }

    #[inline(always)]
    fn shifted(self, x: &i32, shift: u32) -> [__m256i; 2] {
        [intrinsic!(_mm256_sll_epi32(_mm256_set1_epi32(*x), _mm_cvtsi32_si128(shift as i32))); 2]
    }

    #[inline(always)]
    fn dot(self, acc: [__m256i; 2], w: [__m256i; 2], x: &[i8; 4]) -> [__m256i; 2] {
        let x = i32::from_le_bytes([x[0] as u8, x[1] as u8, x[2] as u8, x[3] as u8]);
        let mut out = acc;
        for (out, w) in out.iter_mut().zip(w) {
            // Two products of at most 127² fit 16 bits.
            *out = intrinsic!({
                let pairs = _mm256_maddubs_epi16(w, _mm256_set1_epi32(x));
                _mm256_add_epi32(*out, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            });
        }
        out
    }

    #[inline(always)]
    fn dot_signed(self, acc: [__m256i; 2], w: [__m256i; 2], x: &[i8; 4]) -> [__m256i; 2] {
        let x = i32::from_le_bytes([x[0] as u8, x[1] as u8, x[2] as u8, x[3] as u8]);
        let mut out = acc;
        for (out, w) in out.iter_mut().zip(w) {
            // |w| · (x with the sign of w): two products of at most 128 · 127 fit 16 bits.
            *out = intrinsic!({
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(_mm256_set1_epi32(x), w));
                _mm256_add_epi32(*out, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            });
        }
        out
    }

    #[inline(always)]
    fn max_abs(self, a: [__m256; 2], b: [__m256; 2]) -> f32 {
        // Magnitudes are ordered as the integers that have their bits, infinities and NaN above all numbers.
        intrinsic!({
            let magnitude = _mm256_set1_epi32(0x7fff_ffff);
            let mut max = _mm256_setzero_si256();
            for v in [a[0], a[1], b[0], b[1]] {
                max = _mm256_max_epi32(max, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
            }
            let max = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
            let max = _mm_max_epi32(max, _mm_unpackhi_epi64(max, max));
            let max = _mm_max_epi32(max, _mm_srli_epi64::<32>(max));
            f32::from_bits(_mm_cvtsi128_si32(max) as u32)
        })
    }

    #[inline(always)]
    fn round_to_bytes(self, v: [__m256; 2]) -> ([i8; LANES], i32) {
        intrinsic!({
            let mut integers = [_mm256_setzero_si256(); 2];
            for i in 0..2 {
                let sign = _mm256_and_ps(v[i], _mm256_set1_ps(-0.0));
                let half = _mm256_or_ps(sign, _mm256_set1_ps(super::ALMOST_HALF));
                integers[i] = _mm256_cvttps_epi32(_mm256_add_ps(v[i], half));
            }
            // Packing works within halves of a register: their order is restored before it.
            let low = _mm256_permute2x128_si256::<0x20>(integers[0], integers[1]);
            let high = _mm256_permute2x128_si256::<0x31>(integers[0], integers[1]);
            let words = _mm256_packs_epi32(low, high);
            let words = [_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words)];
            let mut bytes = [0; LANES];
            _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm_packs_epi16(words[0], words[1]));
            let sums = _mm256_add_epi32(integers[0], integers[1]);
            let sums = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
            let sums = _mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums));
            (bytes, _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_srli_epi64::<32>(sums))))
        })
    }

    #[inline(always)]
    fn to_f32(self, v: [__m256i; 2]) -> [__m256; 2] {
        intrinsic!([_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])])
    }

    #[inline(always)]
    fn max(self, v: [__m256; 2]) -> f32 {
        intrinsic!({
            let max = _mm256_max_ps(v[0], v[1]);
            let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps::<1>(max));
            let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
            _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)))
        })
    }
}
