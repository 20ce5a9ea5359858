//! What operators compute on: a view's description, and dense values that were loaded through one.
//!
//! Invariant: `Array` and `Ints` are row-major and whole: `data.len()` is the product of `dims`.

/// A view of device memory: shape, strides and offset in elements, as `aclCreateTensor` was given them.
#[derive(Clone, Debug, PartialEq)]
pub struct Meta {
    pub dims: Vec<i64>,
    pub strides: Vec<i64>,
    /// Elements from the tensor's address to its first element.
    pub offset: i64,
    /// An `aclDataType`.
    pub dtype: i32,
    /// An `aclFormat`.
    pub format: i32,
    pub storage: Vec<i64>,
}

impl Meta {
    /// A row-major view in ND format whose storage is its own shape.
    #[cfg(test)]
    pub fn dense(dims: &[i64], dtype: i32) -> Self {
        let (dims, strides) = (dims.to_vec(), row_major(dims));
        Self { storage: dims.clone(), dims, strides, offset: 0, dtype, format: crate::constants::ACL_FORMAT_ND as i32 }
    }

    /// Elements of the view; 1 for a scalar.
    pub fn numel(&self) -> usize {
        self.dims.iter().product::<i64>() as usize
    }

    /// Whether the elements lie one after the other in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.dims.iter().zip(&self.strides).rev().all(|(&dim, &stride)| {
            let fits = dim == 1 || stride == expected;
            expected *= dim;
            fits
        })
    }

    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// The shape as `usize`.
    pub fn shape(&self) -> Vec<usize> {
        self.dims.iter().map(|&d| d as usize).collect()
    }

    /// Half-open range of the elements that the view reaches, counted from the tensor's address. Empty views reach nothing.
    pub fn reach(&self) -> (i64, i64) {
        if self.dims.contains(&0) {
            return (self.offset, self.offset);
        }
        let last: i64 = self.dims.iter().zip(&self.strides).map(|(d, s)| (d - 1) * s).sum();
        (self.offset, self.offset + last + 1)
    }
}

/// Row-major strides of a shape.
pub fn row_major(dims: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; dims.len()];
    for i in (1..dims.len()).rev() {
        strides[i - 1] = strides[i] * dims[i];
    }
    strides
}

/// Values of a tensor widened to f32: any float, or an integer that f32 holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub dims: Vec<usize>,
    pub data: Vec<f32>,
}

/// Values of an integer or boolean tensor, exact.
#[derive(Clone, Debug, PartialEq)]
pub struct Ints {
    pub dims: Vec<usize>,
    pub data: Vec<i64>,
}

/// A call that is refused: the code that it returns, and the text for `aclGetRecentErrMsg`.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    pub code: i32,
    pub message: String,
}

/// Why a task failed when it ran.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// An address or an index outside of what it may be: the context is poisoned with 507015.
    OutOfRange(String),
    /// What is undefined on a device: recorded as a violation, and the context is poisoned with 507015.
    Violation(String),
    /// Any other failure, with the code that later calls return.
    Code(i32, String),
}

/// The chips whose limits are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    A2,
    A3,
    P310,
}
