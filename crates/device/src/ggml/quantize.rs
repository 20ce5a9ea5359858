//! From values to blocks, as ggml's plain quantisers do it (`quantize_row_*_ref`).

use half::f16;

/// `scale = max|x| / 127` rounded to f16, `q = round(x / scale)`, half away from zero.
pub(super) fn q8_0(x: &[f32; 32], block: &mut [u8; 34]) {
    let scale = f16::from_f32(x.iter().fold(0.0, |max: f32, v| max.max(v.abs())) / 127.0);
    let inverse = invert(scale.to_f32());
    block[..2].copy_from_slice(&scale.to_le_bytes());
    for (byte, v) in block[2..].iter_mut().zip(x) {
        *byte = (v * inverse).round().clamp(-127.0, 127.0) as i8 as u8;
    }
}

/// The value of largest magnitude becomes -8: `scale = v / -8` rounded to f16, `q = ⌊x / scale + 8.5⌋`.
pub(super) fn q4_0(x: &[f32; 32], block: &mut [u8; 18]) {
    let largest = x.iter().fold(0.0, |max: f32, &v| if v.abs() > max.abs() { v } else { max });
    let scale = f16::from_f32(largest / -8.0);
    let inverse = invert(scale.to_f32());
    let code = |v: f32| (v * inverse + 8.5).clamp(0.0, 15.0) as u8;
    block[..2].copy_from_slice(&scale.to_le_bytes());
    for (i, byte) in block[2..].iter_mut().enumerate() {
        *byte = code(x[i]) | code(x[i + 16]) << 4;
    }
}

fn invert(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}
