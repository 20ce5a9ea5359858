//! Operators that order elements: the largest, the k largest, all of them; and running sums.

use std::{cmp::Ordering, ops::AddAssign};

use super::shape::around;

/// Which of two elements comes first, each with its index: the larger (or smaller), and of equals the one with the
/// smaller index. A NaN counts as larger than every number. UNCONFIRMED for ties and NaN: this is the one place that
/// decides.
fn first<T: PartialOrd + Copy>(a: (T, usize), b: (T, usize), largest: bool) -> Ordering {
    let nan = |x: T| x.partial_cmp(&x).is_none();
    let up = a.0.partial_cmp(&b.0).unwrap_or_else(|| nan(a.0).cmp(&nan(b.0)));
    if largest { up.reverse() } else { up }.then(a.1.cmp(&b.1))
}

/// Indices of the first `k` elements in order.
pub fn top<T: PartialOrd + Copy>(values: &[T], k: usize, largest: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_unstable_by(|&a, &b| first((values[a], a), (values[b], b), largest));
    order.truncate(k);
    order
}

/// For each row along `dim`, values and indices of its first `k` in order: `dims` with `dim` of length `k`.
pub fn topk<T: PartialOrd + Copy + Default>(
    x: &[T],
    dims: &[usize],
    dim: usize,
    k: usize,
    largest: bool,
) -> (Vec<T>, Vec<i64>) {
    let (outer, len, inner) = around(dims, dim);
    let (mut values, mut indices) = (vec![T::default(); outer * k * inner], vec![0; outer * k * inner]);
    for (o, i) in (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i))) {
        let row: Vec<T> = (0..len).map(|n| x[(o * len + n) * inner + i]).collect();
        for (n, index) in top(&row, k, largest).into_iter().enumerate() {
            values[(o * k + n) * inner + i] = row[index];
            indices[(o * k + n) * inner + i] = index as i64;
        }
    }
    (values, indices)
}

/// For each row along `dim`, the index of its largest element: `dims` without `dim`.
pub fn argmax<T: PartialOrd + Copy>(x: &[T], dims: &[usize], dim: usize) -> Vec<i64> {
    let (outer, len, inner) = around(dims, dim);
    (0..outer)
        .flat_map(|o| (0..inner).map(move |i| (o, i)))
        .map(|(o, i)| {
            let at = |n: usize| (x[(o * len + n) * inner + i], n);
            let best = (1..len).fold(at(0), |best, n| if first(at(n), best, true).is_lt() { at(n) } else { best });
            best.1 as i64
        })
        .collect()
}

/// Running sums along `dim`.
pub fn cumsum<T: Copy + AddAssign>(x: &[T], dims: &[usize], dim: usize) -> Vec<T> {
    let (_, len, inner) = around(dims, dim);
    let mut out = x.to_vec();
    for block in out.chunks_exact_mut(len * inner) {
        for i in inner..block.len() {
            let before = block[i - inner];
            block[i] += before;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_smaller_index() {
        let x = [1.0, 3.0, 3.0, 2.0, 3.0];
        assert_eq!(argmax(&x, &[5], 0), [1]);
        assert_eq!(top(&x, 4, true), [1, 2, 4, 3]);
        assert_eq!(top(&x, 5, false), [0, 3, 1, 2, 4]);
    }

    #[test]
    fn a_nan_is_seen_as_the_largest() {
        assert_eq!(argmax(&[1.0, f32::NAN, f32::INFINITY], &[3], 0), [1]);
        assert_eq!(top(&[f32::NAN, 1.0, 2.0], 3, false), [1, 2, 0]);
    }

    #[test]
    fn every_row_is_ordered_on_its_own_along_any_dimension() {
        let x = [3, 1, 2, 9, 7, 8];
        assert_eq!(argmax(&x, &[2, 3], 1), [0, 0]);
        assert_eq!(argmax(&x, &[2, 3], 0), [1, 1, 1]);
        assert_eq!(topk(&x, &[2, 3], 1, 2, true), (vec![3, 2, 9, 8], vec![0, 2, 0, 2]));
        assert_eq!(topk(&x, &[3, 2], 0, 1, false), (vec![2, 1], vec![1, 0]));
    }

    #[test]
    fn sums_run_along_their_dimension() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        assert_eq!(cumsum(&x, &[2, 3], 1), [1.0, 3.0, 6.0, 4.0, 9.0, 15.0]);
        assert_eq!(cumsum(&x, &[2, 3], 0), [1.0, 2.0, 3.0, 5.0, 7.0, 9.0]);
    }
}
