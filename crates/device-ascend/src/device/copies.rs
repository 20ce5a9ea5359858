//! Copies and fills on the stream, and waiting for it.
//!
//! Invariant: the host's side of every copy is pinned memory that nothing in flight uses.

use super::Device;
use crate::abi::consts::memcpy_kind;
use crate::error::AscendError;
use crate::graphs::Call;
use crate::memory::Pinned;
use crate::object::Address;

impl Device {
    /// Queues a copy of `data` to `to`. It is complete in itself: `data` may go at once.
    pub(crate) fn upload(&mut self, data: &[u8], to: Address) -> Result<(), AscendError> {
        self.end_piece()?;
        for (piece, at) in data.chunks(Pinned::BYTES / 2).zip((0..).step_by(Pinned::BYTES / 2)) {
            let pinned = self.pinned(piece.len())?;
            // SAFETY: the pinned bytes are as many and used by nothing in flight; the device's block is the caller's.
            let code = unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), pinned, piece.len());
                (self.acl.runtime.memcpy_async)(
                    Address(to.0 + at).as_ptr(),
                    piece.len(),
                    pinned.cast(),
                    piece.len(),
                    memcpy_kind::HOST_TO_DEVICE,
                    self.stream,
                )
            };
            self.check("aclrtMemcpyAsync", code)?;
        }
        Ok(())
    }

    /// Waits for everything queued and brings `len` bytes to the host.
    pub(crate) fn download(&mut self, from: Address, len: usize) -> Result<Vec<u8>, AscendError> {
        self.end_piece()?;
        let mut data = Vec::with_capacity(len);
        while data.len() < len {
            let bytes = (len - data.len()).min(Pinned::BYTES / 2);
            let pinned = self.pinned(bytes)?;
            // SAFETY: the pinned bytes are as many and used by nothing in flight.
            let code = unsafe {
                (self.acl.runtime.memcpy_async)(
                    pinned.cast(),
                    bytes,
                    Address(from.0 + data.len()).as_ptr(),
                    bytes,
                    memcpy_kind::DEVICE_TO_HOST,
                    self.stream,
                )
            };
            self.check("aclrtMemcpyAsync", code)?;
            self.synchronize()?;
            // SAFETY: the copy is done, and the next one begins after this.
            data.extend_from_slice(unsafe { std::slice::from_raw_parts(pinned, bytes) });
        }
        Ok(data)
    }

    /// Queues a copy between blocks of the device.
    pub(crate) fn copy_within(&mut self, from: Address, to: Address, bytes: usize) -> Result<(), AscendError> {
        self.run(Call::Copy { from, to, bytes })
    }

    /// Queues a fill with zero bytes.
    pub(crate) fn clear(&mut self, at: Address, bytes: usize) -> Result<(), AscendError> {
        self.run(Call::Clear { at, bytes })
    }

    fn pinned(&mut self, len: usize) -> Result<*mut u8, AscendError> {
        if let Some(pinned) = self.pinned.take(len) {
            return Ok(pinned);
        }
        self.synchronize()?;
        Ok(self.pinned.take(len).expect("a piece is at most half of the arena"))
    }

    /// Waits until all queued work is done, or for as long as was allowed.
    pub(crate) fn synchronize(&mut self) -> Result<(), AscendError> {
        self.end_piece()?;
        // SAFETY: our own stream.
        let code = unsafe { (self.acl.runtime.synchronize)(self.stream, self.timeout_ms()) };
        let result = self.check("aclrtSynchronizeStreamWithTimeout", code);
        match result {
            Ok(()) => {
                self.pinned.reset();
                self.pieces.destroy_retired();
            }
            Err(AscendError::Call { call, code, message, .. }) => {
                return Err(AscendError::Call { call, code, message, late: true });
            }
            Err(_) => {}
        }
        result
    }
}
