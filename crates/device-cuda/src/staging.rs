//! Host memory that the device copies from and to by itself, and the fixed places on the device for what changes from step
//! to step.
//!
//! Invariant: pinned memory is written again only when the stream has passed the copies that read it.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use baton_device::Result;
use cudarc::driver::sys::{self, CUevent, CUstream};

use crate::context::{Context, Owned};
use crate::memory::Buffer;

/// Bytes of a part of a long copy.
const PART: usize = 4 << 20;

/// Page-locked host memory.
struct Pinned {
    start: Owned<*mut c_void>,
    bytes: usize,
}

impl Pinned {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        context.enter()?;
        let mut start = std::ptr::null_mut();
        // SAFETY: a valid out pointer.
        context.check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&raw mut start, bytes, 0) })?;
        // SAFETY: allocated once, and no copy is under way.
        let free = |start| _ = unsafe { sys::cuMemFreeHost(start) };
        Ok(Self { start: Owned::new(context, start, free), bytes })
    }

    /// Nobody reads or writes the range on the device's side.
    fn fill(&mut self, offset: usize, bytes: &[u8]) -> *const c_void {
        assert!(offset + bytes.len() <= self.bytes, "{} bytes at {offset} of {}", bytes.len(), self.bytes);
        // SAFETY: within the allocation, which is ours alone.
        unsafe {
            let place = self.start.get().cast::<u8>().add(offset);
            place.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            place.cast::<c_void>().cast_const()
        }
    }
}

/// Step-time copies on one stream.
pub(crate) struct Staging {
    up: Pinned,
    /// Bytes of `up` that copies under way may read.
    used: usize,
    down: Pinned,
}

impl Staging {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        Ok(Self { up: Pinned::new(context, PART)?, used: 0, down: Pinned::new(context, PART)? })
    }

    /// Queues a copy to the device on `stream`, of which this is the only user. Whether it waited for the stream first.
    pub(crate) fn upload(&mut self, context: &Context, stream: CUstream, address: u64, bytes: &[u8]) -> Result<bool> {
        let mut waited = false;
        for (at, part) in (0u64..).step_by(PART).zip(bytes.chunks(PART)) {
            if self.used + part.len() > self.up.bytes {
                synchronize(context, stream)?;
                (self.used, waited) = (0, true);
            }
            let source = self.up.fill(self.used, part);
            self.used = (self.used + part.len()).next_multiple_of(64);
            // SAFETY: the source stays as it is until the stream has passed, the target is the caller's.
            let code = unsafe { sys::cuMemcpyHtoDAsync_v2(address + at, source, part.len(), stream) };
            context.check("upload", code)?;
        }
        Ok(waited)
    }

    /// Copies from the device behind all that `stream` was given, and waits for it.
    pub(crate) fn read(&mut self, context: &Context, stream: CUstream, address: u64, out: &mut [u8]) -> Result<()> {
        for (at, part) in (0u64..).step_by(PART).zip(out.chunks_mut(PART)) {
            let start = self.down.start.get();
            // SAFETY: the target has PART bytes and nobody else uses it, the source is the caller's.
            let code = unsafe { sys::cuMemcpyDtoHAsync_v2(start, address + at, part.len(), stream) };
            context.check("read", code)?;
            synchronize(context, stream)?;
            // SAFETY: as many bytes as the copy has written, and it has ended.
            part.copy_from_slice(unsafe { std::slice::from_raw_parts(start.cast::<u8>(), part.len()) });
        }
        Ok(())
    }

    /// The stream has passed everything.
    pub(crate) fn passed(&mut self) {
        self.used = 0;
    }
}

/// Waits for a stream.
pub(crate) fn synchronize(context: &Context, stream: CUstream) -> Result<()> {
    // SAFETY: a stream of this context.
    context.check("step", unsafe { sys::cuStreamSynchronize(stream) })
}

/// Load-time copies, on a stream of their own, so that loading does not disturb steps.
pub(crate) struct Loader {
    stream: Owned<CUstream>,
    /// One is filled while the other is copied.
    parts: Vec<(Pinned, Owned<CUevent>)>,
}

impl Loader {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        let stream = stream(context)?;
        let part = |_| {
            let pinned = Pinned::new(context, PART)?;
            let mut event = std::ptr::null_mut();
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: a valid out pointer.
            context.check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
            // SAFETY: made once, and passed.
            Ok((pinned, Owned::new(context, event, |event| _ = unsafe { sys::cuEventDestroy_v2(event) })))
        };
        Ok(Self { stream, parts: (0..2).map(part).collect::<Result<_>>()? })
    }

    /// Copies to device memory that no queued work uses, and waits.
    pub(crate) fn write(&mut self, context: &Context, address: u64, bytes: &[u8]) -> Result<()> {
        context.enter()?;
        for (i, part) in bytes.chunks(PART).enumerate() {
            let (pinned, event) = &mut self.parts[i % 2];
            // SAFETY: handles of this context; the event tells when the copy before last no longer reads `pinned`. The target
            // is the caller's.
            unsafe {
                context.check("load", sys::cuEventSynchronize(event.get()))?;
                let source = pinned.fill(0, part);
                let target = address + (i * PART) as u64;
                context.check("load", sys::cuMemcpyHtoDAsync_v2(target, source, part.len(), self.stream.get()))?;
                context.check("load", sys::cuEventRecord(event.get(), self.stream.get()))?;
            }
        }
        synchronize(context, self.stream.get())
    }
}

/// A stream that does not wait for the default one.
pub(crate) fn stream(context: &Arc<Context>) -> Result<Owned<CUstream>> {
    context.enter()?;
    let mut stream = std::ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: a valid out pointer.
    context.check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut stream, flags) })?;
    // SAFETY: made once, and empty.
    Ok(Owned::new(context, stream, |stream| _ = unsafe { sys::cuStreamDestroy_v2(stream) }))
}

/// A place on the device for something of a step: at one address for as long as it is large enough.
pub(crate) struct Slot {
    what: &'static str,
    buffer: Mutex<Buffer>,
}

impl Slot {
    pub(crate) fn new(what: &'static str, buffer: Buffer) -> Self {
        Self { what, buffer: Mutex::new(buffer) }
    }

    /// Makes room for as many bytes: if there is not enough, `alloc` makes a larger place elsewhere.
    pub(crate) fn reserve(
        &self,
        bytes: usize,
        alloc: impl FnOnce(usize, &'static str) -> Result<Buffer>,
    ) -> Result<u64> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes > buffer.bytes() {
            *buffer = alloc(bytes.next_power_of_two(), self.what)?;
        }
        Ok(buffer.address())
    }
}
