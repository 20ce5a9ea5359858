//! What the seam's types are here: blocks of device memory with a shape, and the handle that gives them back.
//!
//! Invariant: shapes and addresses are plain data on the caller's side; contents change only in the device's queue, in order.

use std::sync::Arc;

use baton_device::{Result, Rows};

use crate::device::rounded;
use crate::object::{Address, DataType, View};
use crate::owner::Owner;

/// A block of device memory; dropping it gives it back behind all work queued before.
pub(crate) struct Buffer {
    owner: Arc<Owner>,
    address: Address,
}

impl Buffer {
    /// At least `bytes`, with whatever contents.
    pub(crate) fn new(owner: &Arc<Owner>, bytes: usize) -> Result<Self> {
        let address = owner.call("allocation", move |device| device.alloc(bytes))?;
        Ok(Self { owner: owner.clone(), address })
    }

    /// With the contents of `data`.
    pub(crate) fn with(owner: &Arc<Owner>, data: Vec<u8>) -> Result<Self> {
        let buffer = Self::new(owner, data.len())?;
        let address = buffer.address;
        owner.call("upload", move |device| device.upload(&data, address))?;
        Ok(buffer)
    }

    pub(crate) fn address(&self) -> Address {
        self.address
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.owner.free(self.address);
    }
}

/// An activation `[rows, cols]`, row-major. The operation that writes it says in which type: that of the activations, or f32
/// where it computed in f32.
pub struct Tensor {
    buffer: Buffer,
    capacity: usize,
    cols: usize,
    rows: usize,
    dtype: DataType,
}

impl Tensor {
    pub(crate) fn new(owner: &Arc<Owner>, capacity: usize, cols: usize, dtype: DataType) -> Result<Self> {
        let buffer = Buffer::new(owner, capacity * cols * DataType::F32.bytes())?;
        Ok(Self { buffer, capacity, cols, rows: 0, dtype })
    }

    /// Makes it the output of an operation, and gives the window to write.
    pub(crate) fn output(&mut self, rows: usize, dtype: DataType) -> View {
        assert!(rows <= self.capacity, "{rows} rows in a tensor of {}", self.capacity);
        (self.rows, self.dtype) = (rows, dtype);
        self.view()
    }

    /// The rows in use.
    pub(crate) fn view(&self) -> View {
        View::new(self.buffer.address(), self.dtype, &[self.rows, self.cols])
    }

    pub(crate) fn dtype(&self) -> DataType {
        self.dtype
    }
}

impl Rows for Tensor {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }
}

/// A vector of parameters, in the types in which operations meet it.
pub struct Vector {
    buffers: Vec<(Buffer, DataType)>,
    len: usize,
    /// Whether the type of the activations holds all values as they are.
    exact: bool,
}

impl Vector {
    /// Keeps `values` in f32 and in the type of the activations.
    pub(crate) fn new(owner: &Arc<Owner>, values: &[f32], activations: DataType) -> Result<Self> {
        let mut dtypes = vec![DataType::F32];
        dtypes.extend((activations != DataType::F32).then_some(activations));
        let keep = |dtype| Ok((Buffer::with(owner, crate::device::encode(values, dtype))?, dtype));
        let exact = rounded(values.to_vec(), activations) == values;
        Ok(Self { buffers: dtypes.into_iter().map(keep).collect::<Result<_>>()?, len: values.len(), exact })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether it is kept in a type and nothing is lost there.
    pub(crate) fn is_exact(&self, dtype: DataType) -> bool {
        dtype == DataType::F32 || self.exact && self.buffers.iter().any(|(_, kept)| *kept == dtype)
    }

    /// `[len]` in a type.
    pub(crate) fn view(&self, dtype: DataType) -> View {
        let (buffer, dtype) = self.buffers.iter().find(|(_, kept)| *kept == dtype).expect("kept in this type");
        View::new(buffer.address(), *dtype, &[self.len])
    }
}
