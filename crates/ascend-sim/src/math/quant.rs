//! Integers that stand for floats: rows of activations, weights with scales, and four-bit integers in bytes.

/// A row as signed bytes with the scale that brings its largest magnitude to 127; a row of zeros has scale 0.
pub fn quantize_row(x: &[f32]) -> (Vec<i64>, f32) {
    let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let scale = largest / 127.0;
    let byte = |&v: &f32| if largest == 0.0 { 0 } else { (v * (127.0 / largest)).round_ties_even() as i64 };
    (x.iter().map(byte).collect(), scale)
}

/// How scales (and offsets) are shared by the weights `[k, n]` of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    /// One for all.
    Tensor,
    /// One for each column.
    Channel,
    /// One for each column and each group of so many rows: `[ceil(k / group), n]`.
    Group(usize),
}

/// `(w + offset) * scale`: the offset is added, so it is the negative of a zero point. Integers come by columns
/// `[n, k]`, and so do the weights that are returned.
pub fn dequantize(columns: &[i64], k: usize, scale: &[f32], offset: Option<&[f32]>, shared: Shared) -> Vec<f32> {
    let n = columns.len() / k;
    let at = |i: usize| match (shared, i / k, i % k) {
        (Shared::Tensor, _, _) => 0,
        (Shared::Channel, column, _) => column,
        (Shared::Group(rows), column, row) => row / rows * n + column,
    };
    columns.iter().enumerate().map(|(i, &w)| (w as f32 + offset.map_or(0.0, |o| o[at(i)])) * scale[at(i)]).collect()
}

/// `a [m, k]` times the matrix with columns `[n, k]`, exactly.
pub fn int_matmul(a: &[i64], columns: &[i64], k: usize) -> Vec<i64> {
    let dot = |x: &[i64], y: &[i64]| x.iter().zip(y).map(|(x, y)| x * y).sum();
    a.chunks_exact(k).flat_map(|row| columns.chunks_exact(k).map(move |column| dot(row, column))).collect()
}

/// Eight four-bit integers in 32 bits, the first in the lowest (UNCONFIRMED).
pub fn pack_int4(values: &[i64]) -> Vec<i64> {
    let word = |eight: &[i64]| eight.iter().rev().fold(0u32, |word, v| word << 4 | (v & 15) as u32);
    values.chunks_exact(8).map(|eight| i64::from(word(eight) as i32)).collect()
}

/// The inverse of [`pack_int4`].
pub fn unpack_int4(words: &[i64]) -> Vec<i64> {
    words.iter().flat_map(|&w| (0..8).map(move |i| i64::from((w as i32) << (28 - 4 * i) >> 28))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_magnitude_of_a_row_becomes_127() {
        let (q, scale) = quantize_row(&[1.0, -2.54, 0.01, 0.0]);
        assert_eq!(q, [50, -127, 0, 0]);
        assert!((scale - 0.02).abs() < 1e-9);
        assert_eq!(quantize_row(&[0.0, 0.0]), (vec![0, 0], 0.0));
    }

    #[test]
    fn an_offset_is_added_before_the_scale() {
        // Columns (1, 2, 3) and (4, 5, 6).
        let w = [1, 2, 3, 4, 5, 6];
        for (shared, scale, offset, want) in [
            (Shared::Tensor, vec![2.0], None, [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]),
            (Shared::Channel, vec![1.0, 10.0], None, [1.0, 2.0, 3.0, 40.0, 50.0, 60.0]),
            (Shared::Channel, vec![1.0, 10.0], Some(vec![-1.0, 1.0]), [0.0, 1.0, 2.0, 50.0, 60.0, 70.0]),
            (
                Shared::Group(2),
                vec![1.0, 2.0, 3.0, 4.0],
                Some(vec![0.0, 0.0, 1.0, -6.0]),
                [1.0, 2.0, 12.0, 8.0, 10.0, 0.0],
            ),
        ] {
            assert_eq!(dequantize(&w, 3, &scale, offset.as_deref(), shared), want, "{shared:?}");
        }
    }

    #[test]
    fn integer_products_are_exact() {
        let a = [127; 70_000];
        assert_eq!(int_matmul(&a, &a, 70_000), [70_000 * 127 * 127]);
        assert_eq!(int_matmul(&[1, 2, 3, 4], &[5, 6, 7, 8], 2), [17, 23, 39, 53]);
    }

    #[test]
    fn four_bit_integers_survive_packing() {
        let all: Vec<i64> = (-8..8).chain((-8..8).rev()).collect();
        assert_eq!(unpack_int4(&pack_int4(&all)), all);
        assert_eq!(pack_int4(&[1, -1, 0, 0, 0, 0, 0, 7]), [0x7000_00f1]);
    }
}
