//! Activations as signed bytes. For products with weights of block formats 32 values along K share one f32
//! scale, so the product of a block with a group of weights is an exact integer times two scales; in a cache of keys and
//! values the width of a head does.

/// Values that share a scale.
pub const BLOCK: usize = 32;

/// Quantises one block.
pub fn quantize(x: &[f32; BLOCK]) -> (f32, [i8; BLOCK]) {
    let (scale, mut bytes) = (scale(x), [0; BLOCK]);
    round(x, scale, &mut bytes);
    (scale, bytes)
}

/// The scale that values share: `max|x| / 127`. It is not a number if one of them is not finite, so that nothing behind it
/// looks sound.
pub fn scale(x: &[f32]) -> f32 {
    if x.iter().any(|v| !v.is_finite()) {
        return f32::NAN;
    }
    x.iter().fold(0.0, |max: f32, v| max.max(v.abs())) / 127.0
}

/// `q = round(x / scale)`, half away from zero, for values that share this scale; zeros for a scale of none.
pub fn round(x: &[f32], scale: f32, bytes: &mut [i8]) {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (q, v) in bytes.iter_mut().zip(x) {
        *q = (v * inverse).round().clamp(-127.0, 127.0) as i8;
    }
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
