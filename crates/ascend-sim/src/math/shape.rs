//! Dimensions of row-major data.

/// `dims` cut at `dim`: the product before it, its length, the product after it.
pub fn around(dims: &[usize], dim: usize) -> (usize, usize, usize) {
    (dims[..dim].iter().product(), dims[dim], dims[dim + 1..].iter().product())
}

/// A dimension counted from the front, where a negative one counts from the back; `None` outside `rank`.
pub fn axis(dim: i64, rank: usize) -> Option<usize> {
    let rank = rank as i64;
    (-rank..rank).contains(&dim).then(|| dim.rem_euclid(rank) as usize)
}

/// The shape that both broadcast to; `None` if they do not.
pub fn broadcast(a: &[i64], b: &[i64]) -> Option<Vec<i64>> {
    let rank = a.len().max(b.len());
    let at = |dims: &[i64], i: usize| if i + dims.len() < rank { 1 } else { dims[i + dims.len() - rank] };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Some(x),
            (1, y) => Some(y),
            (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_broadcast_from_the_back_where_one_length_is_one() {
        for (a, b, both) in [
            (vec![2, 3], vec![3], Some(vec![2, 3])),
            (vec![2, 1], vec![1, 5], Some(vec![2, 5])),
            (vec![], vec![4], Some(vec![4])),
            (vec![4, 1, 3], vec![2, 3], Some(vec![4, 2, 3])),
            (vec![2, 3], vec![2], None),
            (vec![2, 3], vec![2, 3], Some(vec![2, 3])),
        ] {
            assert_eq!(broadcast(&a, &b), both, "{a:?} {b:?}");
            assert_eq!(broadcast(&b, &a), both, "{b:?} {a:?}");
        }
    }

    #[test]
    fn a_negative_dimension_counts_from_the_back() {
        assert_eq!([-3, -2, -1, 0, 1, 2].map(|d| axis(d, 2)), [None, Some(0), Some(1), Some(0), Some(1), None]);
        assert_eq!(around(&[2, 3, 4, 5], 1), (2, 3, 20));
    }
}
