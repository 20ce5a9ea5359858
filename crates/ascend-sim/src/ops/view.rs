//! Views made from views, and values moved through them.

use std::ops::Range;

use crate::{
    array::{Array, Fault, Ints, Refusal, row_major},
    constants::ACL_BOOL,
    dtype::is_float,
    limits::valid,
    math::shape,
    op::Tensor,
    runtime::Runtime,
};

/// Positions `start..start + len` of a dimension.
pub fn narrow(tensor: &Tensor, dim: usize, start: usize, len: usize) -> Tensor {
    let mut dims = tensor.dims.clone();
    dims[dim] = len as i64;
    tensor.view(dims, tensor.strides.clone(), tensor.offset + start as i64 * tensor.strides[dim])
}

/// One position of a run of dimensions, counted row-major, without them.
pub fn fix(tensor: &Tensor, run: Range<usize>, mut position: usize) -> Tensor {
    let (mut dims, mut strides, mut offset) = (tensor.dims.clone(), tensor.strides.clone(), tensor.offset);
    for d in run.clone().rev() {
        let len = dims[d] as usize;
        offset += (position % len) as i64 * strides[d];
        position /= len;
    }
    dims.drain(run.clone());
    strides.drain(run);
    tensor.view(dims, strides, offset)
}

/// The dimensions in another order.
pub fn permuted(tensor: &Tensor, order: &[usize]) -> Tensor {
    let pick = |values: &[i64]| order.iter().map(|&d| values[d]).collect();
    tensor.view(pick(&tensor.dims), pick(&tensor.strides), tensor.offset)
}

/// Repeated to `dims`, which its shape broadcasts to.
pub fn expanded(tensor: &Tensor, dims: &[i64]) -> Tensor {
    let ahead = dims.len() - tensor.rank();
    let stride = |d: usize| if d < ahead || tensor.dims[d - ahead] == 1 { 0 } else { tensor.strides[d - ahead] };
    tensor.view(dims.to_vec(), (0..dims.len()).map(stride).collect(), tensor.offset)
}

/// The memory from the view's first element on, as `dims` elements in a row.
pub fn dense(tensor: &Tensor, dims: &[i64]) -> Tensor {
    tensor.view(dims.to_vec(), row_major(dims), tensor.offset)
}

/// Refuses (161002) what is no matrix; its two dimensions.
pub fn matrix(what: &str, x: &Tensor) -> Result<[i64; 2], Refusal> {
    valid(x.rank() == 2, || format!("{what} {:?}: two dimensions", x.dims))?;
    Ok([x.dims[0], x.dims[1]])
}

/// Refuses (161002) a shape other than `want`.
pub fn shaped(what: &str, tensor: &Tensor, want: &[i64]) -> Result<(), Refusal> {
    valid(tensor.dims == want, || format!("{what} has the shape {:?}, not {want:?}", tensor.dims))
}

/// Refuses (161002) a shape that does not broadcast to `dims`.
pub fn broadcasts(what: &str, tensor: &Tensor, dims: &[i64]) -> Result<(), Refusal> {
    let fits = shape::broadcast(&tensor.dims, dims).is_some_and(|both| both == dims);
    valid(fits, || format!("{what} has the shape {:?}, which does not broadcast to {dims:?}", tensor.dims))
}

/// A dimension counted from the front; refused (161002) outside of the tensor's.
pub fn axis(tensor: &Tensor, dim: i64) -> Result<usize, Refusal> {
    let axis = shape::axis(dim, tensor.rank());
    valid(axis.is_some(), || format!("dim {dim} of a tensor of {} dimensions", tensor.rank()))?;
    Ok(axis.unwrap_or_default())
}

/// Copies one view over another of the same shape, converting: a number that is not zero is true, a fraction is cut off.
pub fn copy(rt: &mut Runtime, from: &Tensor, to: &Tensor) -> Result<(), Fault> {
    if !is_float(from.dtype) {
        let ints = rt.load_ints(from)?;
        return rt.store_ints(to, &ints);
    }
    let mut array = rt.load(from)?;
    if i64::from(to.dtype) == ACL_BOOL {
        array.data.iter_mut().for_each(|x| *x = f32::from(*x != 0.0));
    }
    rt.store(to, &array)
}

/// Stores f32 values through a view.
pub fn store(rt: &mut Runtime, to: &Tensor, data: Vec<f32>) -> Result<(), Fault> {
    rt.store(to, &Array { dims: to.shape(), data })
}

/// Stores integers through a view.
pub fn store_ints(rt: &mut Runtime, to: &Tensor, data: impl IntoIterator<Item = i64>) -> Result<(), Fault> {
    rt.store_ints(to, &Ints { dims: to.shape(), data: data.into_iter().collect() })
}
