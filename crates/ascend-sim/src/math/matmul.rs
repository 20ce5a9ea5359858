//! Products of matrices. The right operand is given by its columns, each contiguous: the way checkpoints keep weights.

/// The order in which the terms of a sum are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Order {
    /// The term that comes first; those before it come last.
    start: usize,
}

impl Order {
    /// From the first term to the last, unless `perturb`: then from one that depends on the size of the batch, so that a
    /// row's bits differ with what it is computed beside, as they may on a device.
    pub fn of(perturb: bool, batch: usize) -> Order {
        Order { start: if perturb { batch * 7 } else { 0 } }
    }

    /// The terms of a sum in this order.
    pub fn rotate<T>(self, terms: impl Iterator<Item = T>) -> impl Iterator<Item = T> {
        let mut terms: Vec<T> = terms.collect();
        if !terms.is_empty() {
            let start = self.start % terms.len();
            terms.rotate_left(start);
        }
        terms.into_iter()
    }
}

/// Sums that run side by side, so that the compiler can use vector registers.
const LANES: usize = 16;

/// The inner product of two equally long rows.
pub fn dot(a: &[f32], b: &[f32], order: Order) -> f32 {
    let start = if a.is_empty() { 0 } else { order.start % a.len() };
    let ((a0, a1), (b0, b1)) = (a.split_at(start), b.split_at(start));
    if start == 0 { lanes(a1, b1) } else { lanes(a1, b1) + lanes(a0, b0) }
}

fn lanes(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a.zip(b) {
        for i in 0..LANES {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// `a [m, k]` times the matrix whose columns are `columns [n, k]`: `[m, n]`.
pub fn matmul(a: &[f32], columns: &[f32], k: usize, order: Order) -> Vec<f32> {
    let n = columns.len() / k;
    let mut out = vec![0.0; a.len() / k * n];
    // Column by column, so that each is read from memory once however many rows there are.
    for (j, column) in columns.chunks_exact(k).enumerate() {
        for (i, row) in a.chunks_exact(k).enumerate() {
            out[i * n + j] = dot(row, column, order);
        }
    }
    out
}

/// Rounds to the nearest of the numbers with 11 bits of fraction, the inputs of the chips' "HF32" products. UNCONFIRMED
/// which bits are kept, and that ties go to even.
pub fn to_hf32(x: f32) -> f32 {
    const DROPPED: u32 = 12;
    if !x.is_finite() {
        return x;
    }
    let bits = x.to_bits();
    let half = (1 << (DROPPED - 1)) - 1 + (bits >> DROPPED & 1);
    f32::from_bits((bits + half) >> DROPPED << DROPPED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        (0..count as u32).map(|i| ((i * 37 + seed * 101) % 29) as f32 / 7.0 - 2.0).collect()
    }

    #[test]
    fn every_element_is_the_inner_product_of_its_row_and_column() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 4), (2, 16, 3), (4, 83, 6)] {
            let (a, b) = (numbers(m * k, 1), numbers(n * k, 2));
            for order in [Order::default(), Order::of(true, m)] {
                let c = matmul(&a, &b, k, order);
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let want: f64 = (0..k).map(|x| f64::from(a[i * k + x]) * f64::from(b[j * k + x])).sum();
                    assert!((f64::from(c[i * n + j]) - want).abs() < 1e-4, "{m} {k} {n} {i} {j}");
                }
            }
        }
    }

    #[test]
    fn the_order_of_a_sum_changes_bits_only_when_perturbed() {
        let (a, b) = (numbers(301, 3), numbers(301, 4));
        let sums = |perturb| (1..20).map(|batch| dot(&a, &b, Order::of(perturb, batch)).to_bits()).collect::<Vec<_>>();
        assert!(sums(false).windows(2).all(|w| w[0] == w[1]));
        assert!(sums(true).windows(2).any(|w| w[0] != w[1]));
    }

    #[test]
    fn hf32_keeps_eleven_bits_of_fraction() {
        let step = 2f32.powi(-11);
        for (x, rounded) in [
            (1.0, 1.0),
            (1.0 + step, 1.0 + step),
            (1.0 + 0.5 * step, 1.0),
            (1.0 + 1.5 * step, 1.0 + 2.0 * step),
            (-1.0 - 0.6 * step, -1.0 - step),
            (f32::INFINITY, f32::INFINITY),
        ] {
            assert_eq!(to_hf32(x), rounded, "{x}");
        }
        assert!(to_hf32(f32::NAN).is_nan());
    }
}
