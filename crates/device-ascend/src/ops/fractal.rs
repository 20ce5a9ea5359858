//! Weights in FRACTAL_NZ, the blocks in which matrix units read them: a product with few rows need not rearrange the weight
//! first. Rows become blocks where they lie; from then on nothing but a product understands them.
//!
//! `[out, in]` of 16 bits lies as `[in / 16, out / 16, 16, 16]`, padded with zeros to whole blocks: a block is a row-major piece
//! of the matrix, and blocks run along `out` first. That a product takes the turned view over storage of that shape, and that
//! the conversion takes storage larger than its view: UNCONFIRMED, as all of it; a trial decides.

use crate::abi::consts::format;
use crate::abi::operators::MATMUL_WEIGHT_SIZE;
use crate::device::{Device, check};
use crate::error::AscendError;
use crate::object::{Address, DataType, IntArrayHandle, Tensor, View};

type Result<T> = std::result::Result<T, AscendError>;

/// Rows and columns of a block.
const SIDE: usize = 16;

/// The shape in which a matrix `[out, in]` lies.
fn block_dims([out, into]: [usize; 2]) -> [usize; 4] {
    [into.div_ceil(SIDE), out.div_ceil(SIDE), SIDE, SIDE]
}

/// Elements of that shape.
pub(crate) fn elements(dims: [usize; 2]) -> usize {
    block_dims(dims).iter().product()
}

/// A matrix `[out, in]` in memory for [`elements`].
pub(crate) fn with_room(base: Address, dtype: DataType, dims: [usize; 2]) -> View {
    View { storage: elements(dims) as i64, ..View::new(base, dtype, &dims) }
}

/// The elements, not bytes, for which the library wants memory.
pub(crate) fn elements_asked(device: &Device, weight: &View) -> Result<u64> {
    let size = device.acl().matmul_weight_size.ok_or(AscendError::Missing { operator: MATMUL_WEIGHT_SIZE })?;
    let dims = IntArrayHandle::new(&device.acl().meta, &device.ints(&weight.dims))?;
    let mut elements = 0;
    // SAFETY: a live array, and a valid out pointer.
    let code = unsafe { size(dims.as_ptr(), weight.dtype.0, &raw mut elements) };
    check(device.acl(), MATMUL_WEIGHT_SIZE, code)?;
    Ok(elements)
}

/// Makes blocks of a matrix that has room for them.
pub(crate) fn to_blocks(device: &mut Device, weight: &View) -> Result<()> {
    let result = device.trans_matmul_weight(&device.tensor(weight));
    // It may be as large as the weight, and is needed only while weights are loaded.
    device.release_workspace();
    result
}

/// The matrix in blocks as a product takes it: `[in, out]`.
pub(crate) fn turned(weight: &View) -> Tensor {
    let storage = block_dims([0, 1].map(|d| weight.dims[d] as usize)).map(|d| d as i64);
    Tensor::with_storage(&weight.swap(0, 1), format::FRACTAL_NZ, &storage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_blocks_hold_a_matrix_of_any_size() {
        assert_eq!(block_dims([4096, 1024]), [64, 256, 16, 16]);
        assert_eq!(block_dims([17, 33]), [3, 2, 16, 16]);
        for dims in [[2, 2], [16, 16], [17, 33], [31, 160]] {
            assert!(elements(dims) >= dims[0] * dims[1], "{dims:?}");
        }
    }
}
