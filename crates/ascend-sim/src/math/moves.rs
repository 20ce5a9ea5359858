//! Indices that name slices of a dimension.

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
}
