//! Activations as signed bytes, for products with weights of block formats: 32 values along K share one f32
//! scale, so the product of a block with a group of weights is an exact integer times two scales.

/// Values that share a scale.
pub const BLOCK: usize = 32;

/// Quantises one block: `scale = max|x| / 127`, `q = round(x / scale)`, half away from zero. The scale of a
/// block with a value that is not finite is not a number, so that nothing behind it looks sound.
pub fn quantize(x: &[f32; BLOCK]) -> (f32, [i8; BLOCK]) {
    if x.iter().any(|v| !v.is_finite()) {
        return (f32::NAN, [0; BLOCK]);
    }
    let scale = x.iter().fold(0.0, |max: f32, v| max.max(v.abs())) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    (scale, x.map(|v| (v * inverse).round().clamp(-127.0, 127.0) as i8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_within_half_a_step() {
        let x: [f32; BLOCK] = std::array::from_fn(|i| (i as f32 - 11.5) * 0.37);
        let (scale, q) = quantize(&x);
        for (x, q) in x.iter().zip(q) {
            assert!((x - f32::from(q) * scale).abs() <= 0.5001 * scale, "{x} {q}");
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_shows() {
        assert_eq!(quantize(&[0.0; BLOCK]), (0.0, [0; BLOCK]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; BLOCK];
            x[17] = bad;
            assert!(quantize(&x).0.is_nan());
        }
    }
}
