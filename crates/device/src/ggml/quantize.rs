//! From values to blocks, as ggml's plain quantisers do it (`quantize_row_*_ref`).
//!
//! Values are finite. Those beyond a format give an infinite scale, so that what comes back is not finite either and
//! the reader can refuse it. Sums are taken in one order ([`sums`]), so that every machine makes the same blocks. All is
//! inlined, so that a caller that was compiled for an instruction set quantises with it.

use half::f16;

/// `scale = max|x| / 127` rounded to f16, `q = round(x / scale)`, half away from zero.
#[inline(always)]
pub(super) fn q8_0(x: &[f32; 32], block: &mut [u8; 34]) {
    eight_bits(x, f16::from_f32(max_abs(x) / 127.0), block);
}

/// A row as blocks of Q8_0 with one scale for all of them: `scale = max|x| / 127` rounded to f16.
#[inline(always)]
pub(super) fn int8_row(row: &[f32], blocks: &mut [[u8; 34]]) {
    let scale = f16::from_f32(max_abs(row) / 127.0);
    for (x, block) in row.as_chunks().0.iter().zip(blocks) {
        eight_bits(x, scale, block);
    }
}

#[inline(always)]
fn eight_bits(x: &[f32; 32], scale: f16, block: &mut [u8; 34]) {
    let inverse = invert(scale.to_f32());
    block[..2].copy_from_slice(&scale.to_le_bytes());
    for (byte, v) in block[2..].iter_mut().zip(x) {
        let v = (v * inverse).clamp(-127.0, 127.0);
        let even = nearest(v);
        let off = v - even;
        // A half that went to the even side goes to the one away from zero.
        let away = if off == 0.5f32.copysign(v) { 2.0 * off } else { 0.0 };
        *byte = low_byte(even + away);
    }
}

/// The largest magnitude of finite numbers, which are ordered as the integers that have their bits.
#[inline(always)]
fn max_abs(x: &[f32]) -> f32 {
    f32::from_bits(x.iter().fold(0, |max, v| max.max(v.abs().to_bits())))
}

/// The value of largest magnitude becomes -8: `scale = v / -8` rounded to f16, `q = ⌊x / scale + 8.5⌋`.
#[inline(always)]
pub(super) fn q4_0(x: &[f32; 32], block: &mut [u8; 18]) {
    let most = max_abs(x);
    let largest = x.iter().copied().find(|v| v.abs() == most).unwrap_or(0.0);
    let scale = f16::from_f32(largest / -8.0);
    let inverse = invert(scale.to_f32());
    let code = |v: f32| {
        let v = (v * inverse + 8.5).clamp(0.0, 15.0);
        let nearest = nearest(v);
        low_byte(if nearest > v { nearest - 1.0 } else { nearest })
    };
    block[..2].copy_from_slice(&scale.to_le_bytes());
    for (i, byte) in block[2..].iter_mut().enumerate() {
        *byte = code(x[i]) | code(x[i + 16]) << 4;
    }
}

/// Steps of the search for a group's scale.
const STEPS: usize = 20;

/// Per group of 32 a scale and a minimum ([`scale_and_minimum`]), both kept as six bits of the block's largest, which is
/// rounded to f16: `q = round((x + minimum) / scale)` with the scale and minimum that come back.
#[inline(always)]
pub(super) fn q4_k(x: &[f32; 256], block: &mut [u8; 144]) {
    let groups = x.as_chunks::<32>().0;
    let fits: [(f32, f32); 8] = std::array::from_fn(|j| scale_and_minimum(&groups[j]));
    let (scale, scales) = six_bits(fits.map(|fit| fit.0));
    let (min, mins) = six_bits(fits.map(|fit| fit.1));
    block[..2].copy_from_slice(&scale.to_le_bytes());
    block[2..4].copy_from_slice(&min.to_le_bytes());
    for j in 0..4 {
        block[4 + j] = scales[j] | scales[j + 4] >> 4 << 6;
        block[8 + j] = mins[j] | mins[j + 4] >> 4 << 6;
        block[12 + j] = scales[j + 4] & 15 | mins[j + 4] << 4;
    }
    let codes: [[u8; 32]; 8] = std::array::from_fn(|j| {
        let (scale, min) = (scale.to_f32() * f32::from(scales[j]), min.to_f32() * f32::from(mins[j]));
        let inverse = invert(scale);
        groups[j].map(|v| low_byte(code(v + min, inverse)))
    });
    for (pair, bytes) in codes.as_chunks::<2>().0.iter().zip(block[16..].as_chunks_mut::<32>().0) {
        *bytes = std::array::from_fn(|i| pair[0][i] | pair[1][i] << 4);
    }
}

/// Factors below 64 of a scale that gives the largest of `values`, none of which is negative.
#[inline(always)]
fn six_bits(values: [f32; 8]) -> (f16, [u8; 8]) {
    let scale = f16::from_f32(values.iter().fold(0.0, |max: f32, v| max.max(*v)) / 63.0);
    let inverse = invert(scale.to_f32());
    (scale, values.map(|v| (v * inverse).round().min(63.0) as u8))
}

/// The scale and the minimum, taken off and not negative, with which four bits give a group best, searched as in
/// `make_qkx2_quants`. The squared error counts by `rms(x) + |x|`. Codes of scales around the one that just spans the
/// values are tried; to each belong the scale and minimum of weighted least squares.
#[inline(always)]
fn scale_and_minimum(x: &[f32; 32]) -> (f32, f32) {
    let (low, high) = x.iter().fold((0.0, f32::MIN), |(low, high): (f32, f32), &v| (low.min(v), high.max(v)));
    let range = high - low;
    if range <= 0.0 {
        return (0.0, -low);
    }
    let [squares] = sums(|i| [x[i] * x[i]]);
    let rms = (squares / 32.0).sqrt();
    let weights = x.map(|v| rms + v.abs());
    // Counted from the lowest, so that sums keep their precision where all values are alike.
    let y = x.map(|v| v - low);
    let [w, wy] = sums(|i| [weights[i], weights[i] * y[i]]);
    let (mut best, mut most) = ((range / 15.0, 0.0), f32::MIN);
    for step in 0..=STEPS {
        let inverse = (14.0 + 0.1 * step as f32) / range;
        let [wq, wqq, wqy] = sums(|i| {
            let q = code(y[i], inverse);
            let wq = weights[i] * q;
            [wq, wq * q, wq * y[i]]
        });
        let determinant = w * wqq - wq * wq;
        let mut scale = (w * wqy - wy * wq) / determinant;
        let mut offset = (wqq * wy - wq * wqy) / determinant;
        if offset > -low {
            // A minimum above zero cannot be kept: the best scale with none.
            (scale, offset) = ((wqy + low * wq) / wqq, -low);
        }
        // By how much the error is below that of zeros.
        let gain = scale * (2.0 * (wqy - offset * wq) - scale * wqq) + offset * (2.0 * wy - offset * w);
        if determinant > 0.0 && gain > most {
            (best, most) = ((scale, offset), gain);
        }
    }
    (best.0, -(low + best.1))
}

/// The nearest of the codes 0 to 15.
#[inline(always)]
fn code(value: f32, inverse: f32) -> f32 {
    nearest((value * inverse).clamp(0.0, 15.0))
}

/// 1.5·2²³: numbers near it are integers, whose low bits are those of what was added. No call and no cast does this in
/// vector code on every machine.
const ROUND: f32 = 12_582_912.0;

/// The nearest integer, halves to even, of a small number.
#[inline(always)]
fn nearest(v: f32) -> f32 {
    v + ROUND - ROUND
}

/// A small integer as a byte, in two's complement.
#[inline(always)]
fn low_byte(integer: f32) -> u8 {
    (integer + ROUND).to_bits() as u8
}

/// Sums over a group, of eight terms at once.
#[inline(always)]
fn sums<const N: usize>(terms: impl Fn(usize) -> [f32; N]) -> [f32; N] {
    let mut lanes = [[0.0; 8]; N];
    for start in (0..32).step_by(8) {
        for i in 0..8 {
            let terms = terms(start + i);
            for (lanes, term) in lanes.iter_mut().zip(terms) {
                lanes[i] += term;
            }
        }
    }
    lanes.map(|[a, b, c, d, e, f, g, h]| ((a + e) + (b + f)) + ((c + g) + (d + h)))
}

#[inline(always)]
fn invert(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[cfg(test)]
mod tests {
    use crate::BlockFormat::{self, Q4_0, Q4_K, Q8_0};

    /// Near normal: sums of twelve uniform numbers of a fixed sequence.
    fn normal(count: usize, sigma: f32) -> Vec<f32> {
        let mut state = 0x9e37_79b9_u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        (0..count).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * sigma).collect()
    }

    fn back(format: BlockFormat, values: &[f32]) -> Vec<f32> {
        let mut back = vec![0.0; values.len()];
        format.dequantize(&format.quantize(values), &mut back);
        back
    }

    /// Root mean square error over that of the values.
    fn relative_error(format: BlockFormat, values: &[f32]) -> f64 {
        let square = |v: f32| f64::from(v) * f64::from(v);
        let off: f64 = back(format, values).iter().zip(values).map(|(b, v)| square(b - v)).sum();
        (off / values.iter().map(|v| square(*v)).sum::<f64>()).sqrt()
    }

    #[test]
    fn normal_rows_lose_what_the_formats_are_known_to_lose() {
        for sigma in [0.02, 1.0, 50.0] {
            let values = normal(256 * 64, sigma);
            let errors = [Q8_0, Q4_K, Q4_0].map(|format| relative_error(format, &values));
            let known = [0.0052, 0.0711, 0.0839];
            let near = errors.iter().zip(known).all(|(error, known)| (error / known - 1.0).abs() < 0.01);
            assert!(near, "sigma {sigma}: {errors:?}");
        }
    }

    #[test]
    fn codes_are_rounded_as_round_does() {
        // Halves among them.
        for (scale, values) in [(0.7, normal(1 << 14, 40.0)), (1.0, (-1300..1300).map(|i| i as f32 / 10.0).collect())] {
            let mut block = [0; 34];
            for x in values.as_chunks::<32>().0 {
                super::eight_bits(x, half::f16::from_f32(scale), &mut block);
                let inverse = 1.0 / half::f16::from_f32(scale).to_f32();
                for (byte, v) in block[2..].iter().zip(x) {
                    assert_eq!(*byte as i8, (v * inverse).round().clamp(-127.0, 127.0) as i8, "{v}");
                }
            }
        }
    }

    #[test]
    fn one_scale_for_a_row_loses_more_than_one_per_block_and_no_more_than_its_step() {
        let values = normal(896 * 16, 0.02);
        let blocks = BlockFormat::int8_rows(&values, 896);
        let mut back = vec![0.0; values.len()];
        Q8_0.dequantize(&blocks, &mut back);
        let (mut off, mut all) = (0.0, 0.0);
        for ((row, back), blocks) in
            values.chunks(896).zip(back.chunks(896)).zip(blocks.chunks(896 / 32 * Q8_0.bytes()))
        {
            let scales: Vec<_> = blocks.chunks(Q8_0.bytes()).map(|block| [block[0], block[1]]).collect();
            assert!(scales.iter().all(|s| *s == scales[0]));
            let most = row.iter().fold(0.0, |max: f32, v| max.max(v.abs()));
            for (v, b) in row.iter().zip(back) {
                assert!((v - b).abs() <= 0.501 * most / 127.0 + most * 5e-4, "{v} came back as {b}");
                off += f64::from(v - b).powi(2);
                all += f64::from(*v).powi(2);
            }
        }
        let (row, block) = ((off / all).sqrt(), relative_error(Q8_0, &values));
        assert!(row > 1.3 * block && row < 2.0 * block, "{row} by row, {block} by block");
    }

    #[test]
    fn the_search_beats_the_plain_span_of_the_values() {
        for values in normal(256 * 16, 0.02).as_chunks::<32>().0 {
            let (low, high) = values.iter().fold((0f32, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
            let scale = (high - low) / 15.0;
            let rms = (values.iter().map(|v| v * v).sum::<f32>() / 32.0).sqrt();
            let error = |scale: f32, low: f32| {
                let off = |v: f32| v - (((v - low) / scale).round().clamp(0.0, 15.0) * scale + low);
                values.iter().map(|v| (rms + v.abs()) * off(*v).powi(2)).sum::<f32>()
            };
            let (fitted, minimum) = super::scale_and_minimum(values);
            assert!(minimum >= 0.0 && error(fitted, -minimum) <= 1.0001 * error(scale, low));
        }
    }

    #[test]
    fn edge_rows_come_back_within_a_step() {
        let outlier = |at: usize, value: f32| {
            let mut row = normal(256, 0.02);
            row[at] = value;
            row
        };
        let cases = [
            (vec![0.0; 256], 0.0),
            (vec![-0.0; 256], 0.0),
            (vec![0.7; 256], 0.7 / 1000.0),
            (vec![-0.7; 256], 0.7 / 1000.0),
            (outlier(100, 8.0), 8.2 / 20.0),
            (outlier(0, -8.0), 8.2 / 20.0),
            (normal(256, 0.02).iter().map(|v| v + 1.0).collect(), 1.2 / 20.0),
            (normal(256, 0.02).iter().map(|v| v - 1.0).collect(), 0.2 / 10.0),
            (vec![1e-40; 256], 1e-40),
            ((0..256).map(|i| (i % 3) as f32 * -1e-41).collect(), 1e-40),
            ((0..256).map(|i| if i % 32 == 7 { 1e-38 } else { 0.0 }).collect(), 1e-38),
            ((0..256).map(|i| if i == 9 { 3e7 } else { 0.0 }).collect(), 3e7 / 1000.0),
        ];
        for (case, (row, step)) in cases.iter().enumerate() {
            for (b, v) in back(Q4_K, row).iter().zip(row) {
                assert!((b - v).abs() <= *step, "case {case}: {v} came back as {b}");
            }
        }
    }

    #[test]
    fn what_a_block_cannot_hold_comes_back_as_no_number() {
        for value in [1e9, -1e9, 1e20, f32::MAX, f32::MIN] {
            for format in [Q4_K, Q4_0, Q8_0] {
                let mut row = normal(256, 1.0);
                row[77] = value;
                assert!(back(format, &row)[64..96].iter().any(|b| !b.is_finite()), "{format}: {value}");
            }
        }
    }

    #[test]
    fn rows_of_odd_widths_fall_back_to_what_divides_them() {
        assert_eq!([256, 4096].map(|cols| Q4_K.made_for(cols)), [Q4_K; 2]);
        assert_eq!([32, 896, 1504].map(|cols| Q4_K.made_for(cols)), [Q8_0; 3]);
        assert_eq!(Q4_K.made_for(100), Q4_K);
        assert_eq!([Q4_0, Q8_0].map(|f| f.made_for(100)), [Q4_0, Q8_0]);
    }
}
