//! Q8_0: 32 signed bytes along K share one f16 scale (the GGUF format of that name).
//!
//! Quantising a block: `scale = max|x| / 127` rounded to f16, `q = round(x / scale)` half away from
//! zero, clamped to ±127. A linear in this format quantises the activation row the same way (its
//! scale kept in f32), so the product of two blocks is an exact integer times two scales; blocks are
//! summed in order of K.

use half::f16;

/// Elements of a block.
pub const BLOCK: usize = 32;
/// Bytes of a stored block: 32 elements and an f16 scale.
pub const BLOCK_BYTES: usize = BLOCK + 2;

/// Quantises one block of weights; the scale is what the stored f16 widens to.
pub fn quantize_weight_block(x: &[f32; BLOCK]) -> (f16, [i8; BLOCK]) {
    let scale = f16::from_f32(max_abs(x) / 127.0);
    (scale, quantize(x, scale.to_f32()))
}

/// Quantises one block of activations, with a scale in f32.
pub fn quantize_activation_block(x: &[f32; BLOCK]) -> (f32, [i8; BLOCK]) {
    let scale = max_abs(x) / 127.0;
    (scale, quantize(x, scale))
}

fn max_abs(x: &[f32; BLOCK]) -> f32 {
    x.iter().fold(0.0, |m, v| m.max(v.abs()))
}

fn quantize(x: &[f32; BLOCK], scale: f32) -> [i8; BLOCK] {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    x.map(|v| (v * inverse).round().clamp(-127.0, 127.0) as i8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_within_half_a_step() {
        let x: [f32; BLOCK] = std::array::from_fn(|i| (i as f32 - 11.5) * 0.37);
        let (scale, q) = quantize_weight_block(&x);
        for (x, q) in x.iter().zip(q) {
            // f16 rounds the scale by 2^-11 at most, which moves a value of 127 steps by 0.07 step.
            assert!((x - f32::from(q) * scale.to_f32()).abs() <= 0.57 * scale.to_f32(), "{x} {q}");
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        assert_eq!(quantize_activation_block(&[0.0; BLOCK]), (0.0, [0; BLOCK]));
    }
}
