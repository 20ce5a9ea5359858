//! The greedy choice.

/// The index of the first of the largest; `None` unless all are finite. Sixteen maxima side by side compile to vector code,
/// which one maximum that carries its index does not; finding the index is cheap then.
///
/// # Panics
/// If there is none.
pub fn first_largest(row: &[f32]) -> Option<u32> {
    let mut finite = [true; 16];
    let mut max = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = row.as_chunks::<16>();
    for chunk in chunks {
        for lane in 0..16 {
            finite[lane] &= chunk[lane].is_finite();
            max[lane] = if chunk[lane] > max[lane] { chunk[lane] } else { max[lane] };
        }
    }
    for &x in rest {
        finite[0] &= x.is_finite();
        max[0] = if x > max[0] { x } else { max[0] };
    }
    if !finite.into_iter().all(|f| f) {
        return None;
    }
    let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    Some(row.iter().position(|x| *x == max).expect("a row has elements") as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equals_wins_and_a_row_that_is_not_finite_has_none() {
        let mut row: Vec<f32> = (0..37).map(|i| (i % 7) as f32).collect();
        assert_eq!(first_largest(&row), Some(6));
        row[36] = 9.0;
        assert_eq!(first_largest(&row), Some(36));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 20, 36] {
                let mut row = row.clone();
                row[at] = bad;
                assert_eq!(first_largest(&row), None);
            }
        }
    }
}
