//! The objects that operators take: as plain data, which is what a call keeps of them, and as handles of the C side. A handle
//! is destroyed once; a list owns its elements.
//!
//! Invariant: handles are made, used and dropped on the owner thread, between the phases' call and its return. Objects borrow
//! device memory by address and never free it.

use std::fmt;
use std::marker::PhantomData;

use half::{bf16, f16};

use crate::abi::consts::{data_type, format};
use crate::abi::runtime::Meta;
use crate::abi::{IntArrayPtr, ScalarPtr, TensorListPtr, TensorPtr};
use crate::error::AscendError;

/// `aclDataType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct DataType(pub(crate) i32);

impl DataType {
    pub(crate) const F32: Self = Self(data_type::FLOAT);
    pub(crate) const F16: Self = Self(data_type::FLOAT16);
    pub(crate) const BF16: Self = Self(data_type::BF16);
    pub(crate) const I4: Self = Self(data_type::INT4);
    pub(crate) const I8: Self = Self(data_type::INT8);
    pub(crate) const U8: Self = Self(data_type::UINT8);
    pub(crate) const I32: Self = Self(data_type::INT32);
    pub(crate) const I64: Self = Self(data_type::INT64);

    /// Bytes of an element; of the types above.
    pub(crate) fn bytes(self) -> usize {
        match self.0 {
            data_type::FLOAT | data_type::INT32 => 4,
            data_type::FLOAT16 | data_type::BF16 => 2,
            data_type::INT64 => 8,
            data_type::INT8 | data_type::UINT8 | data_type::BOOL => 1,
            other => panic!("no element of whole bytes: {other}"),
        }
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            data_type::FLOAT => f.write_str("f32"),
            data_type::FLOAT16 => f.write_str("f16"),
            data_type::BF16 => f.write_str("bf16"),
            other => write!(f, "type {other}"),
        }
    }
}

/// An address on the device; nothing on the host may follow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Address(pub(crate) usize);

impl Address {
    pub(crate) const NULL: Self = Self(0);

    pub(crate) fn as_ptr(self) -> *mut std::ffi::c_void {
        // Never followed, so it carries no provenance.
        std::ptr::without_provenance_mut(self.0)
    }
}

/// A strided window on device memory: `element[i] = base[offset + Σ i_d · stride_d]`, offset and strides in elements. Plain
/// data: it neither owns nor checks the memory. `base` is 32-byte aligned, and `storage` elements lie there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct View {
    pub(crate) base: Address,
    pub(crate) dtype: DataType,
    pub(crate) dims: Vec<i64>,
    pub(crate) strides: Vec<i64>,
    pub(crate) offset: i64,
    pub(crate) storage: i64,
}

impl View {
    /// Row-major from the start of a block of memory.
    pub(crate) fn new(base: Address, dtype: DataType, dims: &[usize]) -> Self {
        let dims: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
        let strides = row_major(&dims);
        let storage = dims.iter().product();
        Self { base, dtype, dims, strides, offset: 0, storage }
    }

    /// Address of the first element.
    pub(crate) fn start(&self) -> Address {
        Address(self.base.0 + self.offset as usize * self.dtype.bytes())
    }

    /// Number of elements.
    pub(crate) fn numel(&self) -> usize {
        self.dims.iter().product::<i64>() as usize
    }

    pub(crate) fn is_contiguous(&self) -> bool {
        self.strides == row_major(&self.dims)
    }

    /// The same elements in other dimensions.
    ///
    /// # Panics
    /// If this is not contiguous or the counts differ.
    pub(crate) fn reshape(&self, dims: &[usize]) -> Self {
        assert!(self.is_contiguous(), "a strided view has no other shape");
        let dims: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
        assert_eq!(dims.iter().product::<i64>(), self.dims.iter().product::<i64>(), "elements of a reshaped view");
        Self { strides: row_major(&dims), dims, ..self.clone() }
    }

    /// Two dimensions exchanged.
    pub(crate) fn swap(&self, a: usize, b: usize) -> Self {
        let mut view = self.clone();
        view.dims.swap(a, b);
        view.strides.swap(a, b);
        view
    }

    /// The dimensions in another order: dimension `i` of the result is `order[i]` of this.
    pub(crate) fn permute(&self, order: &[usize]) -> Self {
        assert_eq!(order.len(), self.dims.len(), "an order of {:?}", self.dims);
        let pick = |from: &[i64]| order.iter().map(|&d| from[d]).collect();
        Self { dims: pick(&self.dims), strides: pick(&self.strides), ..self.clone() }
    }

    /// `start..start + len` along a dimension.
    pub(crate) fn narrow(&self, dim: usize, start: usize, len: usize) -> Self {
        assert!((start + len) as i64 <= self.dims[dim], "{start}+{len} of {:?} along {dim}", self.dims);
        let mut view = self.clone();
        view.offset += start as i64 * view.strides[dim];
        view.dims[dim] = len as i64;
        view
    }

    /// A dimension split in two, the outer one of `outer` entries.
    pub(crate) fn split(&self, dim: usize, outer: usize) -> Self {
        let mut view = self.clone();
        let inner = view.dims[dim] / outer as i64;
        assert_eq!(inner * outer as i64, view.dims[dim], "a dimension in {outer} parts");
        view.dims[dim] = inner;
        view.dims.insert(dim, outer as i64);
        view.strides.insert(dim, inner * view.strides[dim]);
        view
    }

    /// A new dimension of `len` equal entries; for inputs only.
    pub(crate) fn broadcast(&self, dim: usize, len: usize) -> Self {
        let mut view = self.clone();
        view.dims.insert(dim, len as i64);
        view.strides.insert(dim, 0);
        view
    }
}

fn row_major(dims: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; dims.len()];
    for i in (1..dims.len()).rev() {
        strides[i - 1] = strides[i] * dims[i];
    }
    strides
}

/// `aclTensor`, as it is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Tensor {
    view: View,
    format: i32,
    storage: Vec<i64>,
}

impl Tensor {
    pub(crate) fn new(view: &View) -> Self {
        Self::with_storage(view, format::ND, &[view.storage])
    }

    /// A tensor whose memory has a shape and format of its own: blocks of FRACTAL_NZ.
    pub(crate) fn with_storage(view: &View, format: i32, storage: &[i64]) -> Self {
        Self { view: view.clone(), format, storage: storage.to_vec() }
    }
}

/// `aclScalar`, as it is to be made: a factor for tensors of `dtype`, in that type.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Scalar {
    /// Of the value in f32.
    bits: u32,
    dtype: DataType,
}

impl Scalar {
    pub(crate) fn new(value: f32, dtype: DataType) -> Self {
        Self { bits: value.to_bits(), dtype }
    }

    /// The value in its type.
    fn bytes(&self) -> Vec<u8> {
        let value = f32::from_bits(self.bits);
        match self.dtype {
            DataType::F32 => value.to_le_bytes().to_vec(),
            DataType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            DataType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            DataType::I32 => (value as i32).to_le_bytes().to_vec(),
            DataType::I64 => (value as i64).to_le_bytes().to_vec(),
            other => panic!("no scalar of {other:?}"),
        }
    }
}

/// `aclIntArray`, as it is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct IntArray(pub(crate) Vec<i64>);

/// `aclTensorList`, as it is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct TensorList(pub(crate) Vec<Tensor>);

/// Defines handles: each with the function that destroys it.
macro_rules! handles {
    ($($(#[$meta:meta])* $name:ident($ptr:ident, $destroy:ident);)*) => {
        $(
            $(#[$meta])*
            pub(crate) struct $name {
                ptr: $ptr,
                meta: &'static Meta,
                /// Handles stay on the thread that made them.
                not_send: PhantomData<*mut ()>,
            }

            impl $name {
                fn own(meta: &'static Meta, ptr: $ptr, call: &'static str) -> Result<Self, AscendError> {
                    if ptr == $ptr::NULL {
                        return Err(AscendError::Null { call });
                    }
                    Ok(Self { ptr, meta, not_send: PhantomData })
                }

                pub(crate) fn as_ptr(&self) -> $ptr {
                    self.ptr
                }
            }

            impl Drop for $name {
                fn drop(&mut self) {
                    // SAFETY: the handle is ours, and destroyed nowhere else. A failure leaves nothing that could be done.
                    let _ = unsafe { (self.meta.$destroy)(self.ptr) };
                }
            }
        )*
    };
}

handles! {
    /// `aclTensor`.
    TensorHandle(TensorPtr, destroy_tensor);
    /// `aclScalar`.
    ScalarHandle(ScalarPtr, destroy_scalar);
    /// `aclIntArray`.
    IntArrayHandle(IntArrayPtr, destroy_int_array);
    /// `aclTensorList`, which destroys its elements.
    TensorListHandle(TensorListPtr, destroy_tensor_list);
}

impl TensorHandle {
    pub(crate) fn new(meta: &'static Meta, tensor: &Tensor) -> Result<Self, AscendError> {
        let Tensor { view: View { base, dtype, dims, strides, offset, .. }, format, storage } = tensor;
        // SAFETY: the arrays are as long as said and copied by the callee; the address is only kept.
        let ptr = unsafe {
            (meta.create_tensor)(
                dims.as_ptr(),
                dims.len() as u64,
                dtype.0,
                strides.as_ptr(),
                *offset,
                *format,
                storage.as_ptr(),
                storage.len() as u64,
                base.as_ptr(),
            )
        };
        Self::own(meta, ptr, "aclCreateTensor")
    }
}

impl ScalarHandle {
    pub(crate) fn new(meta: &'static Meta, scalar: &Scalar) -> Result<Self, AscendError> {
        // SAFETY: the value is copied, as many bytes as its type has.
        let ptr = unsafe { (meta.create_scalar)(scalar.bytes().as_mut_ptr().cast(), scalar.dtype.0) };
        Self::own(meta, ptr, "aclCreateScalar")
    }
}

impl IntArrayHandle {
    pub(crate) fn new(meta: &'static Meta, IntArray(values): &IntArray) -> Result<Self, AscendError> {
        // SAFETY: as many values as said, copied.
        let ptr = unsafe { (meta.create_int_array)(values.as_ptr(), values.len() as u64) };
        Self::own(meta, ptr, "aclCreateIntArray")
    }
}

impl TensorListHandle {
    pub(crate) fn new(meta: &'static Meta, TensorList(tensors): &TensorList) -> Result<Self, AscendError> {
        let tensors = tensors.iter().map(|tensor| TensorHandle::new(meta, tensor)).collect::<Result<Vec<_>, _>>()?;
        let ptrs: Vec<_> = tensors.iter().map(TensorHandle::as_ptr).collect();
        // SAFETY: as many handles as said, all alive.
        let ptr = unsafe { (meta.create_tensor_list)(ptrs.as_ptr(), ptrs.len() as u64) };
        let list = Self::own(meta, ptr, "aclCreateTensorList")?;
        // They are the list's now, which destroys them.
        tensors.into_iter().for_each(std::mem::forget);
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_names_the_elements_that_its_history_says() {
        let view = View::new(Address(64), DataType::F32, &[4, 6]);
        assert!(view.is_contiguous() && view.numel() == 24);
        let part = view.narrow(1, 2, 4).split(1, 2).swap(0, 1);
        assert_eq!((part.dims, part.strides, part.offset), (vec![2, 4, 2], vec![2, 6, 1], 2));
        assert_eq!(view.broadcast(0, 3).strides, [0, 6, 1]);
        assert_eq!(view.reshape(&[2, 12]).strides, [12, 1]);
        let turned = view.split(1, 2).permute(&[1, 0, 2]);
        assert_eq!((turned.dims, turned.strides), (vec![2, 4, 3], vec![3, 6, 1]));
    }
}
