//! FRACTAL_NZ, the blocked form that matrix units read weights in: `[cols / c, rows / 16, 16, c]` for a matrix
//! `[rows, cols]`, padded with zeros to whole blocks, where a block's row has 32 bytes.

/// Rows of a block.
pub const BLOCK_ROWS: usize = 16;

/// Columns of a block of elements of so many bytes.
pub fn block_cols(element_bytes: usize) -> usize {
    32 / element_bytes
}

/// The shape of a matrix in blocks of `c` columns.
pub fn block_dims(rows: usize, cols: usize, c: usize) -> [usize; 4] {
    [cols.div_ceil(c), rows.div_ceil(BLOCK_ROWS), BLOCK_ROWS, c]
}

/// Where element `(row, col)` of a matrix of `rows` lies in blocks of `c` columns.
fn place(row: usize, col: usize, rows: usize, c: usize) -> usize {
    let row_blocks = rows.div_ceil(BLOCK_ROWS);
    ((col / c * row_blocks + row / BLOCK_ROWS) * BLOCK_ROWS + row % BLOCK_ROWS) * c + col % c
}

/// A row-major matrix in blocks.
pub fn to_blocks<T: Copy + Default>(data: &[T], rows: usize, cols: usize, c: usize) -> Vec<T> {
    let mut out = vec![T::default(); block_dims(rows, cols, c).iter().product()];
    data.iter().enumerate().for_each(|(i, &x)| out[place(i / cols, i % cols, rows, c)] = x);
    out
}

/// A matrix in blocks, row-major.
pub fn from_blocks<T: Copy>(blocks: &[T], rows: usize, cols: usize, c: usize) -> Vec<T> {
    (0..rows * cols).map(|i| blocks[place(i / cols, i % cols, rows, c)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_give_the_matrix_back_and_pad_with_zeros() {
        for (rows, cols, c) in [(16, 16, 16), (1, 1, 8), (17, 40, 16), (48, 33, 32)] {
            let data: Vec<i64> = (1..=(rows * cols) as i64).collect();
            let blocks = to_blocks(&data, rows, cols, c);
            assert_eq!(blocks.len(), rows.div_ceil(16) * 16 * cols.div_ceil(c) * c);
            assert_eq!(from_blocks(&blocks, rows, cols, c), data);
            assert_eq!(blocks.iter().sum::<i64>(), data.iter().sum());
        }
    }

    #[test]
    fn blocks_run_down_the_rows_first() {
        let data: Vec<usize> = (0..32 * 32).collect();
        let blocks = to_blocks(&data, 32, 32, 16);
        // The second row of the first block, the block below it, and the block to its right.
        assert_eq!([blocks[16], blocks[256], blocks[512]], [32, 16 * 32, 16]);
    }
}
