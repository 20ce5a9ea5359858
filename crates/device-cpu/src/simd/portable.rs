//! Plain arrays; the compiler vectorises them for the target's base instruction set.

use std::array::from_fn;

use half::{bf16, f16};

use super::{LANES, Simd};

/// Any machine.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type F32 = [f32; LANES];
    type I32 = [i32; LANES];
    type Bytes = [u8; 4 * LANES];

    const ACCUMULATORS: usize = 4;
    const SIGNED_SHIFT: u32 = 32;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F32 {
        *x
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Self::F32 {
        from_fn(|i| widen_f16(x[i]))
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::F32 {
        from_fn(|i| f32::from_bits(u32::from(x[i].to_bits()) << 16))
    }

    #[inline(always)]
    fn first_bf16(self, pairs: Self::Bytes) -> Self::F32 {
        from_fn(|i| f32::from_bits(u32::from_le_bytes([0, 0, pairs[4 * i], pairs[4 * i + 1]])))
    }

    #[inline(always)]
    fn second_bf16(self, pairs: Self::Bytes) -> Self::F32 {
        from_fn(|i| f32::from_bits(u32::from_le_bytes([0, 0, pairs[4 * i + 2], pairs[4 * i + 3]])))
    }

    #[inline(always)]
    fn store(self, v: Self::F32, out: &mut [f32; LANES]) {
        *out = v;
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn at_least(self, x: Self::F32, low: Self::F32) -> Self::F32 {
        from_fn(|i| if x[i] < low[i] { low[i] } else { x[i] })
    }

    #[inline(always)]
    fn at_most(self, x: Self::F32, high: Self::F32) -> Self::F32 {
        from_fn(|i| if x[i] > high[i] { high[i] } else { x[i] })
    }

    #[inline(always)]
    fn add_exponent(self, v: Self::F32, n: Self::F32) -> Self::F32 {
        from_fn(|i| f32::from_bits(v[i].to_bits().wrapping_add(n[i].to_bits() << 23)))
    }

    #[inline(always)]
    fn sums(self, v: [Self::F32; 4]) -> [f32; 4] {
        from_fn(|i| {
            let quarter = |j: usize| (v[i][j] + v[i][j + 4]) + (v[i][j + 8] + v[i][j + 12]);
            (quarter(0) + quarter(2)) + (quarter(1) + quarter(3))
        })
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::F32 {
        x.map(f32::from)
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::Bytes {
        *x
    }

    #[inline(always)]
    fn field(self, v: Self::Bytes, shift: i32, mask: u8) -> Self::Bytes {
        v.map(|b| if shift < 0 { b << -shift } else { b >> shift } & mask)
    }

    #[inline(always)]
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        from_fn(|i| a[i] | b[i])
    }

    #[inline(always)]
    fn plane(self, bits: u64, value: u8) -> Self::Bytes {
        from_fn(|i| (bits >> i & 1) as u8 * value)
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; LANES], indices: Self::Bytes) -> Self::Bytes {
        indices.map(|i| table[usize::from(i & 15)] as u8)
    }

    #[inline(always)]
    fn signed(self, v: Self::Bytes) -> Self::Bytes {
        v
    }

    #[inline(always)]
    fn shifted(self, x: &i32, shift: u32) -> Self::I32 {
        [x.checked_shl(shift).unwrap_or(0); LANES]
    }

    #[inline(always)]
    fn dot(self, acc: Self::I32, w: Self::Bytes, x: &[i8; 4]) -> Self::I32 {
        // Bytes below 128 are the same signed.
        self.dot_signed(acc, w, x)
    }

    #[inline(always)]
    fn dot_signed(self, acc: Self::I32, w: Self::Bytes, x: &[i8; 4]) -> Self::I32 {
        from_fn(|i| (0..4).fold(acc[i], |sum, j| sum + i32::from(w[4 * i + j] as i8) * i32::from(x[j])))
    }

    #[inline(always)]
    fn max_abs(self, a: Self::F32, b: Self::F32) -> f32 {
        // Magnitudes are ordered as the integers that have their bits, infinities and NaN above all numbers.
        let magnitude = |v: f32| v.to_bits() & 0x7fff_ffff;
        f32::from_bits((0..LANES).fold(0, |max, i| max.max(magnitude(a[i])).max(magnitude(b[i]))))
    }

    #[inline(always)]
    fn round_to_bytes(self, v: Self::F32) -> ([i8; LANES], i32) {
        let bytes = v.map(|v| (v + super::ALMOST_HALF.copysign(v)) as i8);
        (bytes, bytes.iter().map(|&b| i32::from(b)).sum())
    }

    #[inline(always)]
    fn to_f32(self, v: Self::I32) -> Self::F32 {
        v.map(|x| x as f32)
    }
}

/// Without branches, so that it vectorises: the exponent is corrected by a multiplication, which also
/// makes subnormals exact; infinities and NaN get the f32 exponent of such.
#[inline(always)]
fn widen_f16(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let magnitude = (bits & 0x7fff) << 13;
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    let scaled = f32::from_bits(magnitude) * f32::from_bits((254 - 15) << 23);
    f32::from_bits(scaled.to_bits() | special | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_f16_is_exact_for_every_value() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            let (ours, theirs) = (widen_f16(x), x.to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:#x}");
        }
    }
}
