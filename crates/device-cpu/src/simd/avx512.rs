//! AVX-512: one register per vector, dot products of bytes by VNNI and, where there is BF16, of its pairs.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, LANES, PairDot, PairKernel, Simd};

/// An intrinsic on values, or on memory that a reference of its exact size vouches for.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: `self` proves that the features are there (see `detect`).
        unsafe { $e }
    };
}

/// AVX-512 F, BW, VL, DQ and VNNI: Ice Lake, Zen 4 and later.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// `Some` if this machine has it.
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni");
        found.then_some(Self(()))
    }

    /// Runs a kernel compiled for these features.
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
        fn enter<K: Kernel>(s: Avx512, kernel: K) {
            kernel.run(s);
        }
        // SAFETY: a value of this type exists only if `detect` found the features; those of AVX2 are
        // implied by them.
        unsafe { enter(self, kernel) }
    }
}

/// AVX-512 BF16 beside [`Avx512`]: Cooper Lake, Sapphire Rapids, Zen 4 and later.
#[derive(Clone, Copy)]
pub(crate) struct Bf16(Avx512);

impl Bf16 {
    /// `Some` if this machine has it.
    pub(crate) fn detect() -> Option<Self> {
        Avx512::detect().filter(|_| is_x86_feature_detected!("avx512bf16")).map(Self)
    }

    /// What all other kernels run with.
    pub(crate) fn base(self) -> Avx512 {
        self.0
    }

    /// Runs a kernel compiled for these features.
    pub(crate) fn run<K: PairKernel>(self, kernel: K) {
        #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
        fn enter<K: PairKernel>(pairs: Bf16, kernel: K) {
            kernel.run(pairs.0, pairs);
        }
        // SAFETY: as in `Avx512::run`.
        unsafe { enter(self, kernel) }
    }
}

impl PairDot<Avx512> for Bf16 {
    #[inline(always)]
    fn dot(self, acc: __m512, w: __m512i, x: &[bf16; 2]) -> __m512 {
        let x = i32::from(x[1].to_bits()) << 16 | i32::from(x[0].to_bits());
        intrinsic!({
            let [w, x] = std::mem::transmute::<[__m512i; 2], [__m512bh; 2]>([w, _mm512_set1_epi32(x)]);
            _mm512_dpbf16_ps(acc, w, x)
        })
    }

    #[inline(always)]
    fn round(self, x: __m512) -> [bf16; LANES] {
        intrinsic!(std::mem::transmute::<__m256bh, [bf16; LANES]>(_mm512_cvtneps_pbh(x)))
    }
}

impl Simd for Avx512 {
    type F32 = __m512;
    type I32 = __m512i;
    type Bytes = __m512i;

    const ACCUMULATORS: usize = 16;
    const SIGNED_SHIFT: u32 = 7;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        intrinsic!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        intrinsic!(_mm512_loadu_ps(x.as_ptr()))
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> __m512 {
        intrinsic!(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> __m512 {
        intrinsic!({
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }

    #[inline(always)]
    fn first_bf16(self, pairs: __m512i) -> __m512 {
        intrinsic!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)))
    }

    #[inline(always)]
    fn second_bf16(self, pairs: __m512i) -> __m512 {
        intrinsic!(_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-1 << 16))))
    }

    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; LANES]) {
        intrinsic!(_mm512_storeu_ps(out.as_mut_ptr(), v))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn at_least(self, x: __m512, low: __m512) -> __m512 {
        // The instruction yields its second operand if either is not a number.
        intrinsic!(_mm512_max_ps(low, x))
    }

    #[inline(always)]
    fn at_most(self, x: __m512, high: __m512) -> __m512 {
        intrinsic!(_mm512_min_ps(high, x))
    }

    #[inline(always)]
    fn add_exponent(self, v: __m512, n: __m512) -> __m512 {
        intrinsic!({
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(n));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), n))
        })
    }

    #[inline(always)]
    fn sums(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        intrinsic!({
            // Within each quarter: [a, b, a, b], then [a, b, c, d].
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let quarters = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
            let halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps::<1>(quarters));
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
    fn load_i8(self, x: &[i8; LANES]) -> __m512 {
        intrinsic!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))))
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> __m512i {
        intrinsic!(_mm512_loadu_si512(x.as_ptr().cast()))
    }

    #[inline(always)]
    fn field(self, v: __m512i, shift: i32, mask: u8) -> __m512i {
        intrinsic!({
            let count = _mm_cvtsi32_si128(shift.abs());
            let moved = if shift < 0 { _mm512_sll_epi16(v, count) } else { _mm512_srl_epi16(v, count) };
            _mm512_and_si512(moved, _mm512_set1_epi8(mask as i8))
        })
    }

    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsic!(_mm512_or_si512(a, b))
    }

    #[inline(always)]
    fn plane(self, bits: u64, value: u8) -> __m512i {
        intrinsic!(_mm512_and_si512(_mm512_movm_epi8(bits), _mm512_set1_epi8(value as i8)))
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; LANES], indices: __m512i) -> __m512i {
        intrinsic!({
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, indices)
        })
    }

    #[inline(always)]
    fn signed(self, v: __m512i) -> __m512i {
        // Plus 128: VNNI's first factor is unsigned.
        intrinsic!(_mm512_xor_si512(v, _mm512_set1_epi8(-128)))
    }

    #[inline(always)]
    fn shifted(self, x: &i32, shift: u32) -> __m512i {
        intrinsic!(_mm512_sll_epi32(_mm512_set1_epi32(*x), _mm_cvtsi32_si128(shift as i32)))
    }

    #[inline(always)]
    fn dot(self, acc: __m512i, w: __m512i, x: &[i8; 4]) -> __m512i {
        let x = i32::from_le_bytes([x[0] as u8, x[1] as u8, x[2] as u8, x[3] as u8]);
        intrinsic!(_mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)))
    }

    #[inline(always)]
    fn dot_signed(self, acc: __m512i, w: __m512i, x: &[i8; 4]) -> __m512i {
        self.dot(acc, w, x)
    }

    #[inline(always)]
    fn max_abs(self, a: __m512, b: __m512) -> f32 {
        // Magnitudes are ordered as the integers that have their bits, infinities and NaN above all numbers.
        intrinsic!({
            let (a, b) = (_mm512_castps_si512(_mm512_abs_ps(a)), _mm512_castps_si512(_mm512_abs_ps(b)));
            f32::from_bits(_mm512_reduce_max_epi32(_mm512_max_epi32(a, b)) as u32)
        })
    }

    #[inline(always)]
    fn round_to_bytes(self, v: __m512) -> ([i8; LANES], i32) {
        intrinsic!({
            let sign = _mm512_and_ps(v, _mm512_set1_ps(-0.0));
            let half = _mm512_or_ps(sign, _mm512_set1_ps(super::ALMOST_HALF));
            let integers = _mm512_cvttps_epi32(_mm512_add_ps(v, half));
            let mut bytes = [0; LANES];
            _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(integers));
            (bytes, _mm512_reduce_add_epi32(integers))
        })
    }

    #[inline(always)]
    fn to_f32(self, v: __m512i) -> __m512 {
        intrinsic!(_mm512_cvtepi32_ps(v))
    }

    #[inline(always)]
    fn max(self, v: __m512) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(v))
    }

    #[inline(always)]
    fn transpose(self, v: [__m512; LANES]) -> [__m512; LANES] {
        let (mut pairs, mut fours, mut out) = (v, v, v);
        intrinsic!({
            for i in 0..8 {
                pairs[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
            }
            for i in 0..8 {
                // Of four vectors, lane c of each quarter.
                let four = 4 * (i / 2) + i % 2;
                let (a, b) = (_mm512_castps_pd(pairs[four]), _mm512_castps_pd(pairs[four + 2]));
                fours[2 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                fours[2 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
            for c in 0..4 {
                let (a, b, x, y) = (fours[c], fours[c + 4], fours[c + 8], fours[c + 12]);
                let (even_ab, even_xy) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(x, y));
                let (odd_ab, odd_xy) = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(x, y));
                out[c] = _mm512_shuffle_f32x4::<0x88>(even_ab, even_xy);
                out[c + 4] = _mm512_shuffle_f32x4::<0x88>(odd_ab, odd_xy);
                out[c + 8] = _mm512_shuffle_f32x4::<0xdd>(even_ab, even_xy);
                out[c + 12] = _mm512_shuffle_f32x4::<0xdd>(odd_ab, odd_xy);
            }
        });
        out
    }
}
