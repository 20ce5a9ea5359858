//! NEON, alone or with the dot products of ARMv8.2: four registers per vector.

#![allow(unused_unsafe)] // many intrinsics are safe where NEON is part of the base, as it is here

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::array::from_fn;

use half::{bf16, f16};

use super::{Kernel, LANES, Simd};

/// Every aarch64 machine; with `DOTPROD`, those whose bytes have a dot product: Cortex-A76, Neoverse N1, Apple M1 and
/// later.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const DOTPROD: bool>(());

impl<const DOTPROD: bool> Neon<DOTPROD> {
    /// `Some` if this machine has it.
    pub(crate) fn detect() -> Option<Self> {
        (!DOTPROD || is_aarch64_feature_detected!("dotprod")).then_some(Self(()))
    }

    /// Runs a kernel compiled for these features.
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        #[target_feature(enable = "dotprod")]
        fn enter<S: Simd, K: Kernel>(s: S, kernel: K) {
            kernel.run(s);
        }
        if DOTPROD {
            // SAFETY: a value of this type exists only if `detect` found the feature.
            unsafe { enter(self, kernel) }
        } else {
            kernel.run(self);
        }
    }
}

/// Adds to each lane the dot product of its four bytes. (The intrinsic for it is not yet stable.)
#[target_feature(enable = "dotprod")]
#[inline]
fn sdot(mut acc: int32x4_t, w: uint8x16_t, x: int32x4_t) -> int32x4_t {
    // SAFETY: the feature is enabled; the instruction touches its registers alone.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {w:v}.16b, {x:v}.16b",
            acc = inout(vreg) acc, w = in(vreg) w, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// An intrinsic on values, or on memory that a reference of its exact size vouches for.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: NEON is part of the architecture's base; addresses stay within the four quarters
        // of an array of 16.
        unsafe { $e }
    };
}

impl<const DOTPROD: bool> Simd for Neon<DOTPROD> {
    type F32 = [float32x4_t; 4];
    type I32 = [int32x4_t; 4];
    type Bytes = [uint8x16_t; 4];

    const ACCUMULATORS: usize = 6;
    const SIGNED_SHIFT: u32 = 32;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        [intrinsic!(vdupq_n_f32(x)); 4]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F32 {
        from_fn(|i| intrinsic!(vld1q_f32(x.as_ptr().add(4 * i))))
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Self::F32 {
        // The exponent is corrected by a multiplication, which also makes subnormals exact; infinities
        // and NaN get the f32 exponent of such.
        from_fn(|i| {
            intrinsic!({
                let bits = vmovl_u16(vld1_u16(x.as_ptr().cast::<u16>().add(4 * i)));
                let magnitude = vshlq_n_u32::<13>(vandq_u32(bits, vdupq_n_u32(0x7fff)));
                let correction = vdupq_n_f32(f32::from_bits((254 - 15) << 23));
                let scaled = vreinterpretq_u32_f32(vmulq_f32(vreinterpretq_f32_u32(magnitude), correction));
                let exponent = vandq_u32(bits, vdupq_n_u32(0x7c00));
                let special = vandq_u32(vceqq_u32(exponent, vdupq_n_u32(0x7c00)), vdupq_n_u32(0x7f80_0000));
                let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
                vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(scaled, special), sign))
            })
        })
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::F32 {
        from_fn(|i| {
            let bits = intrinsic!(vmovl_u16(vld1_u16(x.as_ptr().cast::<u16>().add(4 * i))));
            intrinsic!(vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits)))
        })
    }

    #[inline(always)]
    fn first_bf16(self, pairs: Self::Bytes) -> Self::F32 {
        from_fn(|i| {
            let pairs = intrinsic!(vreinterpretq_u32_u8(pairs[i]));
            intrinsic!(vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)))
        })
    }

    #[inline(always)]
    fn second_bf16(self, pairs: Self::Bytes) -> Self::F32 {
        from_fn(|i| {
            let pairs = intrinsic!(vreinterpretq_u32_u8(pairs[i]));
            intrinsic!(vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000))))
        })
    }

    #[inline(always)]
    fn store(self, v: Self::F32, out: &mut [f32; LANES]) {
        for (quarter, v) in out.as_chunks_mut::<4>().0.iter_mut().zip(v) {
            intrinsic!(vst1q_f32(quarter.as_mut_ptr(), v));
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        from_fn(|i| intrinsic!(vaddq_f32(a[i], b[i])))
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        from_fn(|i| intrinsic!(vsubq_f32(a[i], b[i])))
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        from_fn(|i| intrinsic!(vmulq_f32(a[i], b[i])))
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        from_fn(|i| intrinsic!(vdivq_f32(a[i], b[i])))
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        from_fn(|i| intrinsic!(vfmaq_f32(c[i], a[i], b[i])))
    }

    #[inline(always)]
    fn at_least(self, x: Self::F32, low: Self::F32) -> Self::F32 {
        // Yields not-a-number if either is.
        from_fn(|i| intrinsic!(vmaxq_f32(x[i], low[i])))
    }

    #[inline(always)]
    fn at_most(self, x: Self::F32, high: Self::F32) -> Self::F32 {
        from_fn(|i| intrinsic!(vminq_f32(x[i], high[i])))
    }

    #[inline(always)]
    fn add_exponent(self, v: Self::F32, n: Self::F32) -> Self::F32 {
        from_fn(|i| {
            intrinsic!({
                let n = vshlq_n_u32::<23>(vreinterpretq_u32_f32(n[i]));
                vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(v[i]), n))
            })
        })
    }

    #[inline(always)]
    fn sums(self, v: [Self::F32; 4]) -> [f32; 4] {
        let quarters: [float32x4_t; 4] =
            from_fn(|i| intrinsic!(vaddq_f32(vaddq_f32(v[i][0], v[i][1]), vaddq_f32(v[i][2], v[i][3]))));
        let mut out = [0.0; 4];
        intrinsic!({
            let (ab, cd) = (vpaddq_f32(quarters[0], quarters[1]), vpaddq_f32(quarters[2], quarters[3]));
            vst1q_f32(out.as_mut_ptr(), vpaddq_f32(ab, cd));
        });
        out
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::F32 {
        intrinsic!({
            let x = vld1q_s8(x.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_s8(vget_high_s8(x)));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(high))),
            ]
        })
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::Bytes {
        from_fn(|i| intrinsic!(vld1q_u8(x.as_ptr().add(LANES * i))))
    }

    #[inline(always)]
    fn field(self, v: Self::Bytes, shift: i32, mask: u8) -> Self::Bytes {
        // A negative count shifts to the right.
        v.map(|v| intrinsic!(vandq_u8(vshlq_u8(v, vdupq_n_s8(-shift as i8)), vdupq_n_u8(mask))))
    }

    #[inline(always)]
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        from_fn(|i| intrinsic!(vorrq_u8(a[i], b[i])))
    }

    #[inline(always)]
    fn plane(self, bits: u64, value: u8) -> Self::Bytes {
        const BIT: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
        from_fn(|i| {
            let [low, high] = ((bits >> (LANES * i)) as u16).to_le_bytes();
            intrinsic!({
                let spread = vcombine_u8(vdup_n_u8(low), vdup_n_u8(high));
                vandq_u8(vtstq_u8(spread, vld1q_u8(BIT.as_ptr())), vdupq_n_u8(value))
            })
        })
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; LANES], indices: Self::Bytes) -> Self::Bytes {
        indices.map(|i| intrinsic!(vqtbl1q_u8(vld1q_u8(table.as_ptr().cast()), i)))
    }

    #[inline(always)]
    fn signed(self, v: Self::Bytes) -> Self::Bytes {
        v
    }

    #[inline(always)]
    fn shifted(self, x: &i32, shift: u32) -> Self::I32 {
        [intrinsic!(vdupq_n_s32(x.checked_shl(shift).unwrap_or(0))); 4]
    }

    #[inline(always)]
    fn dot(self, acc: Self::I32, w: Self::Bytes, x: &[i8; 4]) -> Self::I32 {
        // Bytes below 128 are the same signed.
        self.dot_signed(acc, w, x)
    }

    #[inline(always)]
    fn dot_signed(self, acc: Self::I32, w: Self::Bytes, x: &[i8; 4]) -> Self::I32 {
        let x = i32::from_le_bytes(x.map(|b| b as u8));
        if DOTPROD {
            let mut out = acc;
            for (out, w) in out.iter_mut().zip(w) {
                // SAFETY: `self` proves that the feature is there (see `Neon::detect`).
                *out = unsafe { sdot(*out, w, vdupq_n_s32(x)) };
            }
            return out;
        }
        from_fn(|i| {
            intrinsic!({
                let (w, x) = (vreinterpretq_s8_u8(w[i]), vreinterpretq_s8_s32(vdupq_n_s32(x)));
                // Products of at most 127² fit 16 bits; pairs are added in 32.
                let low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
                let high = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(x)));
                vaddq_s32(acc[i], vpaddq_s32(low, high))
            })
        })
    }

    #[inline(always)]
    fn max_abs(self, a: Self::F32, b: Self::F32) -> f32 {
        // Magnitudes are ordered as the integers that have their bits, infinities and NaN above all numbers.
        let magnitude = |v: float32x4_t| intrinsic!(vreinterpretq_u32_f32(vabsq_f32(v)));
        let mut max = intrinsic!(vdupq_n_u32(0));
        for i in 0..4 {
            max = intrinsic!(vmaxq_u32(max, vmaxq_u32(magnitude(a[i]), magnitude(b[i]))));
        }
        f32::from_bits(intrinsic!(vmaxvq_u32(max)))
    }

    #[inline(always)]
    fn round_to_bytes(self, v: Self::F32) -> ([i8; LANES], i32) {
        let integers: [int32x4_t; 4] = from_fn(|i| intrinsic!(vcvtaq_s32_f32(v[i])));
        let mut bytes = [0; LANES];
        let sum = intrinsic!({
            let low = vcombine_s16(vmovn_s32(integers[0]), vmovn_s32(integers[1]));
            let high = vcombine_s16(vmovn_s32(integers[2]), vmovn_s32(integers[3]));
            vst1q_s8(bytes.as_mut_ptr(), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
            vaddlvq_s16(low) + vaddlvq_s16(high)
        });
        (bytes, sum)
    }

    #[inline(always)]
    fn to_f32(self, v: Self::I32) -> Self::F32 {
        from_fn(|i| intrinsic!(vcvtq_f32_s32(v[i])))
    }
}
