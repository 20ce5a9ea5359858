//! Element types: their size, and their bytes widened to what operators compute in and rounded back.
//!
//! Floats round to nearest even. An integer that does not fit its type saturates.

use half::{bf16, f16, slice::HalfFloatSliceExt};

use crate::constants::*;

/// Bits of one element; `None` for a type that the simulator does not hold.
pub fn bits(dtype: i32) -> Option<usize> {
    match i64::from(dtype) {
        ACL_INT4 => Some(4),
        ACL_INT8 | ACL_UINT8 | ACL_BOOL => Some(8),
        ACL_FLOAT16 | ACL_BF16 | ACL_INT16 | ACL_UINT16 => Some(16),
        ACL_FLOAT | ACL_INT32 | ACL_UINT32 => Some(32),
        ACL_DOUBLE | ACL_INT64 | ACL_UINT64 => Some(64),
        _ => None,
    }
}

/// Bytes that `elements` elements take; two 4-bit elements share a byte.
pub fn bytes(dtype: i32, elements: u64) -> u64 {
    (elements * bits(dtype).expect("a tensor's dtype was checked when it was made") as u64).div_ceil(8)
}

/// Whether elements are floating-point numbers.
pub fn is_float(dtype: i32) -> bool {
    matches!(i64::from(dtype), ACL_FLOAT | ACL_FLOAT16 | ACL_BF16 | ACL_DOUBLE)
}

/// Little-endian elements of `$bytes` as iterator of `$ty`.
macro_rules! each {
    ($ty:ty, $bytes:expr) => {
        $bytes
            .chunks_exact(size_of::<$ty>())
            .map(|b| <$ty>::from_le_bytes(b.try_into().expect("chunks are of this size")))
    };
}

/// Widens whole elements to f32. `bytes` holds exactly `out.len()` elements, of a type of whole bytes.
pub fn widen(dtype: i32, bytes: &[u8], out: &mut [f32]) {
    fn fill(out: &mut [f32], values: impl Iterator<Item = f32>) {
        for (o, v) in out.iter_mut().zip(values) {
            *o = v;
        }
    }
    match i64::from(dtype) {
        ACL_FLOAT => fill(out, each!(f32, bytes)),
        ACL_FLOAT16 => match bytemuck_u16::<f16>(bytes) {
            Some(values) => values.convert_to_f32_slice(out),
            None => fill(out, each!(f16, bytes).map(f32::from)),
        },
        ACL_BF16 => fill(out, each!(u16, bytes).map(|b| f32::from_bits(u32::from(b) << 16))),
        ACL_DOUBLE => fill(out, each!(f64, bytes).map(|v| v as f32)),
        _ => {
            let mut ints = vec![0; out.len()];
            widen_ints(dtype, bytes, &mut ints);
            fill(out, ints.into_iter().map(|v| v as f32));
        }
    }
}

/// The bytes as 16-bit floats, if they are aligned for them.
fn bytemuck_u16<T: 'static>(bytes: &[u8]) -> Option<&[T]> {
    const { assert!(size_of::<T>() == 2) };
    // SAFETY: every pattern of 16 bits is a value of the 16-bit float types that this is called with.
    let (head, values, tail) = unsafe { bytes.align_to::<T>() };
    (head.is_empty() && tail.is_empty()).then_some(values)
}

/// Rounds f32 values to whole elements; the reverse of [`widen`].
pub fn narrow(dtype: i32, values: &[f32], out: &mut [u8]) {
    fn put<const N: usize>(out: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
        for (o, v) in out.chunks_exact_mut(N).zip(values) {
            o.copy_from_slice(&v);
        }
    }
    let v = values.iter().copied();
    match i64::from(dtype) {
        ACL_FLOAT => put(out, v.map(f32::to_le_bytes)),
        ACL_FLOAT16 => put(out, v.map(|v| f16::from_f32(v).to_le_bytes())),
        ACL_BF16 => put(out, v.map(|v| bf16::from_f32(v).to_le_bytes())),
        ACL_DOUBLE => put(out, v.map(|v| f64::from(v).to_le_bytes())),
        _ => {
            let ints: Vec<i64> = v.map(|v| v as i64).collect();
            narrow_ints(dtype, &ints, out);
        }
    }
}

/// Widens integers, booleans, or whole-valued floats to i64.
pub fn widen_ints(dtype: i32, bytes: &[u8], out: &mut [i64]) {
    fn fill(out: &mut [i64], values: impl Iterator<Item = i64>) {
        for (o, v) in out.iter_mut().zip(values) {
            *o = v;
        }
    }
    match i64::from(dtype) {
        ACL_INT8 => fill(out, each!(i8, bytes).map(i64::from)),
        ACL_UINT8 | ACL_BOOL => fill(out, bytes.iter().map(|&b| i64::from(b))),
        ACL_INT16 => fill(out, each!(i16, bytes).map(i64::from)),
        ACL_UINT16 => fill(out, each!(u16, bytes).map(i64::from)),
        ACL_INT32 => fill(out, each!(i32, bytes).map(i64::from)),
        ACL_UINT32 => fill(out, each!(u32, bytes).map(i64::from)),
        ACL_INT64 => fill(out, each!(i64, bytes)),
        ACL_UINT64 => fill(out, each!(u64, bytes).map(|v| v as i64)),
        _ => {
            let mut floats = vec![0.0; out.len()];
            widen(dtype, bytes, &mut floats);
            fill(out, floats.into_iter().map(|v| v as i64));
        }
    }
}

/// Writes integers as elements of the type, saturated to its range (booleans: not zero).
pub fn narrow_ints(dtype: i32, values: &[i64], out: &mut [u8]) {
    fn put<const N: usize>(out: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
        for (o, v) in out.chunks_exact_mut(N).zip(values) {
            o.copy_from_slice(&v);
        }
    }
    macro_rules! saturate {
        ($ty:ty) => {
            put(out, values.iter().map(|&v| (v.clamp(<$ty>::MIN as i64, <$ty>::MAX as i64) as $ty).to_le_bytes()))
        };
    }
    match i64::from(dtype) {
        ACL_INT8 => saturate!(i8),
        ACL_UINT8 => saturate!(u8),
        ACL_BOOL => put(out, values.iter().map(|&v| [u8::from(v != 0)])),
        ACL_INT16 => saturate!(i16),
        ACL_UINT16 => saturate!(u16),
        ACL_INT32 => saturate!(i32),
        ACL_UINT32 => saturate!(u32),
        ACL_INT64 | ACL_UINT64 => put(out, values.iter().map(|v| v.to_le_bytes())),
        _ => {
            let floats: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            narrow(dtype, &floats, out);
        }
    }
}
