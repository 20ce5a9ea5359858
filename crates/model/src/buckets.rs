//! How many rows a step of single tokens has on a device that replays steps: of many numbers of sequences the same.
//!
//! Such a device records a step for each number of rows that it meets, which costs memory and the time of a step that is not
//! replayed. All numbers up to 16 are met anyway where there is little to do, and there a row more is a large part of the
//! work. Above, an eighth of the power of two below is a step: 18, 20, …, 32, 36, …, 64, 72, …: eight for each doubling, and
//! less than a ninth of all rows is padding. Weights that all rows meet are read once for them; of experts, rows that pad meet
//! what one row meets, since they are all alike.

/// Rows up to which every number is its own.
const EXACT: usize = 16;
/// Numbers for each doubling.
const FOR_EACH_DOUBLING: usize = 8;

/// The rows that a step of `rows` single tokens gets, where there are at most `most`.
pub(crate) fn padded(rows: usize, most: usize) -> usize {
    if rows <= EXACT {
        return rows;
    }
    let below = 1 << (rows - 1).ilog2();
    rows.next_multiple_of(below / FOR_EACH_DOUBLING).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_few_numbers_of_which_little_is_padding() {
        for most in [1, 16, 17, 64, 100, 256, 1000] {
            let mut sizes: Vec<_> = (1..=most).map(|rows| padded(rows, most)).collect();
            for (rows, size) in (1..).zip(&sizes) {
                assert!((rows..=most).contains(size) && (size - rows) * 9 < *size, "{rows} become {size}");
                assert!(rows > EXACT || *size == rows, "{rows} become {size}");
                assert_eq!(padded(*size, most), *size, "{rows}");
            }
            sizes.dedup();
            assert!(sizes.is_sorted() && sizes.last() == Some(&most));
            let doublings = most.div_ceil(EXACT).next_power_of_two().ilog2() as usize;
            assert!(sizes.len() <= EXACT + FOR_EACH_DOUBLING * doublings, "{most}: {sizes:?}");
        }
        assert_eq!([17, 24, 25, 32, 33, 64, 65].map(|rows| padded(rows, 256)), [18, 24, 26, 32, 36, 64, 72]);
    }
}
