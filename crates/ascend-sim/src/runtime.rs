//! What a task sees when it runs: device memory through views, widened and rounded.
//!
//! Invariant: no byte outside of a live block of the task's own device (or of a peer that was enabled) is read or written.

use crate::{
    array::{Array, Chip, Fault, Ints, Meta},
    constants::ACL_INT4,
    dtype,
    memory::{Memory, Range},
    op::Tensor,
};

/// A device at work on one task.
pub struct Runtime<'a> {
    pub device: u32,
    pub chip: Chip,
    /// Sums are to be taken in an order that depends on the size of the batch.
    pub perturb: bool,
    pub peers: &'a [u32],
    pub memory: &'a mut Memory,
    pub violations: &'a mut Vec<String>,
    /// Where the tensors of the operator lie, by their slot.
    pub addresses: &'a [u64],
}

impl Runtime<'_> {
    /// Records what is undefined on a device but does not stop it.
    pub fn violation(&mut self, text: impl Into<String>) {
        self.violations.push(text.into());
    }

    /// The view's elements as f32.
    pub fn load(&self, tensor: &Tensor) -> Result<Array, Fault> {
        let mut data = vec![0.0; tensor.numel()];
        self.gather(tensor, &mut data, dtype::widen, |v| v as f32)?;
        Ok(Array { dims: tensor.shape(), data })
    }

    /// The view's elements as integers.
    pub fn load_ints(&self, tensor: &Tensor) -> Result<Ints, Fault> {
        let mut data = vec![0; tensor.numel()];
        self.gather(tensor, &mut data, dtype::widen_ints, |v| v)?;
        Ok(Ints { dims: tensor.shape(), data })
    }

    /// Rounds the values to the tensor's dtype and writes them through its view.
    pub fn store(&mut self, tensor: &Tensor, array: &Array) -> Result<(), Fault> {
        self.scatter(tensor, &array.data, dtype::narrow, |v| v as i64)
    }

    pub fn store_ints(&mut self, tensor: &Tensor, ints: &Ints) -> Result<(), Fault> {
        self.scatter(tensor, &ints.data, dtype::narrow_ints, |v| v)
    }

    /// The bytes that the view reaches, gaps included.
    pub fn bytes(&self, tensor: &Tensor) -> Result<&[u8], Fault> {
        self.read(self.range(tensor))
    }

    /// [`Self::bytes`], to be written.
    pub fn bytes_mut(&mut self, tensor: &Tensor) -> Result<&mut [u8], Fault> {
        self.write(self.range(tensor))
    }

    pub fn read(&self, range: Range) -> Result<&[u8], Fault> {
        self.own(range)?;
        self.memory.read(range)
    }

    pub fn write(&mut self, range: Range) -> Result<&mut [u8], Fault> {
        self.own(range)?;
        self.memory.write(range)
    }

    fn own(&self, range: Range) -> Result<(), Fault> {
        let device = self.memory.device(range)?;
        if device == self.device || self.peers.contains(&device) {
            return Ok(());
        }
        Err(Fault::OutOfRange(format!("device {} uses memory of device {device} without peer access", self.device)))
    }

    fn range(&self, tensor: &Tensor) -> Range {
        byte_range(tensor, self.addresses[tensor.slot])
    }

    fn gather<T: Copy>(
        &self,
        tensor: &Tensor,
        out: &mut [T],
        widen: fn(i32, &[u8], &mut [T]),
        nibble: fn(i64) -> T,
    ) -> Result<(), Fault> {
        if out.is_empty() {
            return Ok(());
        }
        let bytes = self.bytes(tensor)?;
        if i64::from(tensor.dtype) == ACL_INT4 {
            let skew = tensor.offset % 2;
            let mut out = out.iter_mut();
            each_element(tensor, |at| *out.next().expect("as many as the view has") = nibble(int4(bytes, at + skew)));
            return Ok(());
        }
        let size = dtype::bytes(tensor.dtype, 1) as usize;
        if tensor.is_contiguous() {
            widen(tensor.dtype, bytes, out);
            return Ok(());
        }
        let (rows, run) = runs(tensor);
        if run > 1 {
            let mut chunks = out.chunks_exact_mut(run);
            each_element(&rows, |at| {
                let at = at as usize * size;
                widen(tensor.dtype, &bytes[at..at + run * size], chunks.next().expect("as many as the view has rows"));
            });
            return Ok(());
        }
        // Widen what the view reaches as a whole, then pick: a call per element would cost more.
        let mut reached = vec![out[0]; bytes.len() / size];
        widen(tensor.dtype, bytes, &mut reached);
        let mut out = out.iter_mut();
        each_element(tensor, |at| *out.next().expect("as many as the view has") = reached[at as usize]);
        Ok(())
    }

    fn scatter<T: Copy>(
        &mut self,
        tensor: &Tensor,
        values: &[T],
        narrow: fn(i32, &[T], &mut [u8]),
        nibble: fn(T) -> i64,
    ) -> Result<(), Fault> {
        assert_eq!(values.len(), tensor.numel(), "an operator stores as many values as its output has");
        if values.is_empty() {
            return Ok(());
        }
        let bytes = self.bytes_mut(tensor)?;
        if i64::from(tensor.dtype) == ACL_INT4 {
            let skew = tensor.offset % 2;
            let mut values = values.iter();
            each_element(tensor, |at| {
                let (at, value) =
                    ((at + skew) as usize, nibble(*values.next().expect("as many as the view has")) as u8 & 0xf);
                let shift = at % 2 * 4;
                bytes[at / 2] = bytes[at / 2] & !(0xf << shift) | value << shift;
            });
            return Ok(());
        }
        let size = dtype::bytes(tensor.dtype, 1) as usize;
        if tensor.is_contiguous() {
            narrow(tensor.dtype, values, bytes);
            return Ok(());
        }
        let (rows, run) = runs(tensor);
        let mut chunks = values.chunks_exact(run);
        each_element(&rows, |at| {
            let at = at as usize * size;
            narrow(tensor.dtype, chunks.next().expect("as many as the view has rows"), &mut bytes[at..at + run * size]);
        });
        Ok(())
    }
}

/// The bytes that a view of memory at `address` reaches.
pub fn byte_range(meta: &Meta, address: u64) -> Range {
    let bits = dtype::bits(meta.dtype).expect("a tensor's dtype was checked when it was made") as u64;
    let (first, end) = meta.reach();
    let start = first as u64 * bits / 8;
    Range::new(address + start, dtype::bytes(meta.dtype, end as u64) - start)
}

/// Signed 4-bit element: two to a byte, the low half first.
fn int4(bytes: &[u8], at: i64) -> i64 {
    let at = at as usize;
    i64::from(((bytes[at / 2] >> (at % 2 * 4)) << 4) as i8 >> 4)
}

/// The view without its last dimension, and the length of the rows that lie behind its elements; 1 if they are not dense.
fn runs(meta: &Meta) -> (Meta, usize) {
    match (meta.strides.last(), meta.dims.last()) {
        (Some(1), Some(&run)) => {
            let mut rows = meta.clone();
            rows.dims.pop();
            rows.strides.pop();
            (rows, run as usize)
        }
        _ => (meta.clone(), 1),
    }
}

/// Calls `each` with the position of every element in row-major order, counted from the first.
fn each_element(meta: &Meta, mut each: impl FnMut(i64)) {
    let Some((&inner, outer)) = meta.dims.split_last() else { return each(0) };
    let stride = meta.strides[outer.len()];
    let mut index = vec![0; outer.len()];
    let mut at = 0;
    loop {
        (0..inner).for_each(|i| each(at + i * stride));
        let Some(axis) = (0..outer.len()).rev().find(|&axis| {
            at += meta.strides[axis];
            index[axis] += 1;
            if index[axis] < outer[axis] {
                return true;
            }
            at -= index[axis] * meta.strides[axis];
            index[axis] = 0;
            false
        }) else {
            return;
        };
        debug_assert!(index[axis] > 0);
    }
}
