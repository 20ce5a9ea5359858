//! Indices that name slices, and slices put together. Any element type will do.

use super::shape::around;
use crate::array::Fault;

/// An index as a row of a dimension of `rows`; an index outside is what faults a real kernel.
pub fn row(index: i64, rows: usize, what: &str) -> Result<usize, Fault> {
    usize::try_from(index)
        .ok()
        .filter(|&i| i < rows)
        .ok_or_else(|| Fault::OutOfRange(format!("{what} {index} is outside 0..{rows}")))
}

/// Indices as rows of a dimension of `rows`. An index named twice leaves the order of two writes open: a violation.
pub fn unique_rows(indices: &[i64], rows: usize, what: &str) -> Result<Vec<usize>, Fault> {
    let mut seen = vec![false; rows];
    indices
        .iter()
        .map(|&i| {
            let r = row(i, rows, what)?;
            if std::mem::replace(&mut seen[r], true) {
                return Err(Fault::Violation(format!("{what} {i} is written twice by one operator")));
            }
            Ok(r)
        })
        .collect()
}

/// The parts, each its dimensions and data, one after another along `dim`.
pub fn cat<T: Copy>(parts: &[(Vec<usize>, Vec<T>)], dim: usize) -> Vec<T> {
    let outer = around(&parts[0].0, dim).0;
    let mut out = Vec::with_capacity(parts.iter().map(|(_, data)| data.len()).sum());
    for o in 0..outer {
        for (dims, data) in parts {
            let (_, len, inner) = around(dims, dim);
            out.extend_from_slice(&data[o * len * inner..][..len * inner]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_outside_its_dimension_is_a_fault() {
        for (index, inside) in [(-1, None), (0, Some(0)), (3, Some(3)), (4, None)] {
            assert_eq!(row(index, 4, "index").ok(), inside);
            assert_eq!(unique_rows(&[index], 4, "index").ok(), inside.map(|i| vec![i]));
        }
        assert_eq!(row(4, 4, "slot"), Err(Fault::OutOfRange("slot 4 is outside 0..4".to_owned())));
    }

    #[test]
    fn an_index_written_twice_is_a_violation() {
        assert!(matches!(unique_rows(&[1, 0, 1], 4, "slot"), Err(Fault::Violation(_))));
    }

    #[test]
    fn parts_follow_one_another_along_the_dimension() {
        let (a, b) = ((vec![2, 1], vec![1, 2]), (vec![2, 2], vec![3, 4, 5, 6]));
        assert_eq!(cat(&[a, b.clone()], 1), [1, 3, 4, 2, 5, 6]);
        assert_eq!(cat(&[b.clone(), b], 0), [3, 4, 5, 6, 3, 4, 5, 6]);
    }
}
