//! Blocks of device memory: out of the pool, and the pool's segments out of the device.
//!
//! Invariant: what is given back may be handed out at once, since all work is on one stream.

use super::Device;
use crate::abi::codes::{Class, describe};
use crate::abi::consts::{malloc_policy, mem_attr};
use crate::error::AscendError;
use crate::memory::{MemoryUse, Pool};
use crate::object::{Address, DataType, View};

impl Device {
    /// A block of at least `bytes`; its contents are whatever they were.
    pub(crate) fn alloc(&mut self, bytes: usize) -> Result<Address, AscendError> {
        let bytes = Pool::block_bytes(bytes);
        if let Some(address) = self.pool.take(bytes) {
            return Ok(address);
        }
        let (segment, size) = self.segment(bytes)?;
        self.pool.adopt(segment, size);
        Ok(self.pool.take(bytes).expect("a new segment has room"))
    }

    /// As above, in memory that was not in the pool before.
    pub(super) fn alloc_apart(&mut self, bytes: usize) -> Result<Address, AscendError> {
        let bytes = Pool::block_bytes(bytes);
        let (segment, size) = self.segment(bytes)?;
        self.pool.adopt(segment, size);
        self.pool.take_at(segment, bytes);
        Ok(segment)
    }

    /// A new segment with room for a block, in the usual size or else, if that does not fit, just for it; if need be when all
    /// that is free was given back.
    fn segment(&mut self, bytes: usize) -> Result<(Address, usize), AscendError> {
        let mut refused = None;
        for (size, release) in [(Pool::segment_bytes(bytes), false), (bytes, false), (bytes, true)] {
            if release {
                // Calls of a piece that is being issued use blocks that are free already.
                if self.pieces.is_ending() {
                    break;
                }
                self.release_free()?;
            }
            match self.malloc(size) {
                Ok(address) => return Ok((address, size)),
                Err(AscendError::Call { code, message, .. }) if describe(code).1 == Class::Memory => {
                    refused = Some(message);
                }
                Err(error) => return Err(error),
            }
        }
        Err(AscendError::OutOfMemory { bytes, message: refused.expect("it was asked for") })
    }

    fn malloc(&self, bytes: usize) -> Result<Address, AscendError> {
        let mut ptr = std::ptr::null_mut();
        // SAFETY: a valid out pointer; `bytes` is over 0.
        let code = unsafe { (self.acl.runtime.malloc)(&raw mut ptr, bytes, malloc_policy::HUGE_FIRST) };
        self.check("aclrtMalloc", code)?;
        Ok(Address(ptr.addr()))
    }

    /// Takes a block back; work that was queued may still use it.
    pub(crate) fn free(&mut self, address: Address) {
        self.pool.give_back(address);
    }

    /// What the pool holds.
    pub(crate) fn usage(&self) -> MemoryUse {
        self.pool.usage()
    }

    /// Gives segments that are free to the device.
    pub(crate) fn release_free(&mut self) -> Result<(), AscendError> {
        self.synchronize()?;
        let segments = self.pool.drain_free();
        if !segments.is_empty() {
            self.pieces.retire_graphs();
            self.pieces.destroy_retired();
        }
        for address in segments {
            // SAFETY: nothing uses the segment: all of it was given back, and the stream is done.
            self.check("aclrtFree", unsafe { (self.acl.runtime.free)(address.as_ptr()) })?;
        }
        Ok(())
    }

    /// Free and total bytes of the device.
    pub(crate) fn memory(&self) -> Result<(usize, usize), AscendError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: valid out pointers.
        let code = unsafe { (self.acl.runtime.mem_info)(mem_attr::HBM, &raw mut free, &raw mut total) };
        self.check("aclrtGetMemInfo", code)?;
        Ok((free, total))
    }

    /// Runs `work` with a block that is given back behind it.
    pub(crate) fn with_scratch<T>(
        &mut self,
        bytes: usize,
        work: impl FnOnce(&mut Self, Address) -> Result<T, AscendError>,
    ) -> Result<T, AscendError> {
        let block = self.alloc(bytes)?;
        let result = work(self, block);
        self.free(block);
        result
    }

    /// Runs `work` with contiguous scratch views, which are given back behind it.
    pub(crate) fn with_views<const N: usize, T>(
        &mut self,
        shapes: [(DataType, &[usize]); N],
        work: impl FnOnce(&mut Self, [View; N]) -> Result<T, AscendError>,
    ) -> Result<T, AscendError> {
        let mut bytes = 0;
        let starts = shapes.map(|(dtype, dims)| {
            let start = bytes;
            bytes += Pool::block_bytes(dims.iter().product::<usize>() * dtype.bytes());
            start
        });
        self.with_scratch(bytes, |device, block| {
            let view = |i: usize| View::new(Address(block.0 + starts[i]), shapes[i].0, shapes[i].1);
            work(device, std::array::from_fn(view))
        })
    }

    /// At least `bytes` zero bytes, which nobody writes to.
    pub(crate) fn zeros(&mut self, bytes: usize) -> Result<Address, AscendError> {
        if let Some((address, size)) = self.zeros {
            if size >= bytes {
                return Ok(address);
            }
            self.zeros = None;
            self.free(address);
        }
        let address = self.alloc(bytes)?;
        if let Err(error) = self.at_once(|device| device.clear(address, bytes)) {
            self.free(address);
            return Err(error);
        }
        self.zeros = Some((address, bytes));
        Ok(address)
    }
}
