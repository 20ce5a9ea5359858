//! Shapes of dense row-major data, and data moved from one shape to another.

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
pub fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |dims: &[usize], i: usize| if i + dims.len() < rank { 1 } else { dims[i + dims.len() - rank] };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Some(x),
            (1, y) => Some(y),
            (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

/// Row-major strides of `dims`.
pub fn strides(dims: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; dims.len()];
    for i in (1..dims.len()).rev() {
        strides[i - 1] = strides[i] * dims[i];
    }
    strides
}

/// Data of shape `from`, repeated to the shape `to` that it broadcasts to.
pub fn expand<T: Copy>(data: &[T], from: &[usize], to: &[usize]) -> Vec<T> {
    if from == to {
        return data.to_vec();
    }
    let ahead = to.len() - from.len();
    let own = strides(from);
    let steps: Vec<usize> =
        (0..to.len()).map(|i| if i < ahead || from[i - ahead] == 1 { 0 } else { own[i - ahead] }).collect();
    gather_strided(data, to, &steps)
}

/// Data of shape `dims` with its dimensions in the order `order`.
pub fn permute<T: Copy>(data: &[T], dims: &[usize], order: &[usize]) -> Vec<T> {
    let own = strides(dims);
    let to: Vec<usize> = order.iter().map(|&d| dims[d]).collect();
    let steps: Vec<usize> = order.iter().map(|&d| own[d]).collect();
    gather_strided(data, &to, &steps)
}

/// The elements that a view of shape `dims` and strides `steps` names, in row-major order.
fn gather_strided<T: Copy>(data: &[T], dims: &[usize], steps: &[usize]) -> Vec<T> {
    let Some((&inner, outer)) = dims.split_last() else { return data.to_vec() };
    let (step, count) = (steps[dims.len() - 1], dims.iter().product());
    let mut out = Vec::with_capacity(count);
    let (mut index, mut base) = (vec![0; outer.len()], 0);
    while out.len() < count {
        out.extend((0..inner).map(|i| data[base + i * step]));
        for d in (0..outer.len()).rev() {
            index[d] += 1;
            base += steps[d];
            if index[d] < outer[d] {
                break;
            }
            base -= steps[d] * outer[d];
            index[d] = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_broadcast_from_the_back_where_one_length_is_one() {
        let table: [(&[usize], &[usize], Option<&[usize]>); 6] = [
            (&[2, 3], &[3], Some(&[2, 3])),
            (&[2, 1], &[1, 5], Some(&[2, 5])),
            (&[], &[4], Some(&[4])),
            (&[4, 1, 3], &[2, 3], Some(&[4, 2, 3])),
            (&[2, 3], &[2], None),
            (&[2, 3], &[2, 3], Some(&[2, 3])),
        ];
        for (a, b, both) in table {
            assert_eq!(broadcast(a, b).as_deref(), both, "{a:?} {b:?}");
            assert_eq!(broadcast(b, a).as_deref(), both, "{b:?} {a:?}");
        }
    }

    #[test]
    fn expanding_repeats_and_permuting_moves() {
        assert_eq!(expand(&[1, 2], &[2], &[3, 2]), [1, 2, 1, 2, 1, 2]);
        assert_eq!(expand(&[1, 2], &[2, 1], &[2, 3]), [1, 1, 1, 2, 2, 2]);
        assert_eq!(expand(&[7], &[], &[2, 2]), [7; 4]);
        let x: Vec<usize> = (0..24).collect();
        let y = permute(&x, &[2, 3, 4], &[2, 0, 1]);
        for (i, j, k) in (0..2).flat_map(|i| (0..3).flat_map(move |j| (0..4).map(move |k| (i, j, k)))) {
            assert_eq!(y[(k * 2 + i) * 3 + j], x[(i * 3 + j) * 4 + k]);
        }
    }

    #[test]
    fn a_negative_dimension_counts_from_the_back() {
        assert_eq!([-3, -2, -1, 0, 1, 2].map(|d| axis(d, 2)), [None, Some(0), Some(1), Some(0), Some(1), None]);
    }
}
