//! Host memory that the device copies from and to by itself, and the fixed places on the device for what changes from step
//! to step.
//!
//! Invariant: pinned memory is written again only when the stream has passed the copies that read it, and read only when it has
//! passed the copy that wrote it.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use baton_device::Result;
use cudarc::driver::sys::{self, CUevent, CUstream};

use crate::context::{Context, Owned};
use crate::memory::Buffer;

/// Bytes of a part of a long copy.
const PART: usize = 4 << 20;
/// Bytes of a landing at first.
const LANDING: usize = 16 << 10;

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
    ring: Ring,
    down: Pinned,
    /// Where small things arrive; those that nobody waits for are free.
    landings: Vec<Arc<Landing>>,
}

/// Where a copy to the host arrives, and the event that tells when it has.
struct Landing {
    pinned: Pinned,
    event: Owned<CUevent>,
}

/// Something on its way to the host.
pub(crate) struct Arrival {
    landing: Arc<Landing>,
    bytes: usize,
}

impl Arrival {
    /// Waits for it. It was asked for in this context.
    pub(crate) fn wait(&self, context: &Context, out: &mut [u8]) -> Result<()> {
        // SAFETY: an event of this context, recorded behind the copy.
        context.check("step", unsafe { sys::cuEventSynchronize(self.landing.event.get()) })?;
        assert_eq!(out.len(), self.bytes, "bytes that arrived");
        let start = self.landing.pinned.start.get().cast::<u8>();
        // SAFETY: as many bytes as the copy has written, and it has ended; no other is made to a landing that is held.
        out.copy_from_slice(unsafe { std::slice::from_raw_parts(start, self.bytes) });
        Ok(())
    }
}

impl Staging {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        let [up, down] = [Pinned::new(context, PART)?, Pinned::new(context, PART)?];
        // One for each step that may be under way.
        let landings = [Landing::new(context, LANDING)?, Landing::new(context, LANDING)?].map(Arc::new).into();
        Ok(Self { up, ring: Ring::new(PART), down, landings })
    }

    /// Queues a copy to the device on `stream`, of which this is the only user. Whether it waited for the stream first.
    pub(crate) fn upload(&mut self, context: &Context, stream: CUstream, address: u64, bytes: &[u8]) -> Result<bool> {
        let mut waited = false;
        for (at, part) in (0u64..).step_by(PART).zip(bytes.chunks(PART)) {
            let place = match self.ring.take(part.len()) {
                Some(place) => place,
                None => {
                    synchronize(context, stream)?;
                    waited = true;
                    self.ring.pass_all();
                    self.ring.take(part.len()).expect("a part is no larger than the ring")
                }
            };
            let source = self.up.fill(place, part);
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

    /// Queues a copy to the host behind all that `stream` was given. Of no bytes it is the end of that.
    pub(crate) fn fetch(
        &mut self,
        context: &Arc<Context>,
        stream: CUstream,
        address: u64,
        bytes: usize,
    ) -> Result<Arrival> {
        let landing = self.landing(context, bytes)?;
        if bytes > 0 {
            let start = landing.pinned.start.get();
            // SAFETY: the target has so many bytes and nobody reads it before the event, the source is the caller's.
            let code = unsafe { sys::cuMemcpyDtoHAsync_v2(start, address, bytes, stream) };
            context.check("fetch", code)?;
        }
        // SAFETY: an event and a stream of this context.
        context.check("fetch", unsafe { sys::cuEventRecord(landing.event.get(), stream) })?;
        Ok(Arrival { landing, bytes })
    }

    /// The first landing that is free. A copy that nobody waited for may still be under way to it: it ends before the next.
    fn landing(&mut self, context: &Arc<Context>, bytes: usize) -> Result<Arc<Landing>> {
        let free = |landing: &&Arc<Landing>| Arc::strong_count(landing) == 1 && landing.pinned.bytes >= bytes;
        if let Some(landing) = self.landings.iter().find(free) {
            return Ok(landing.clone());
        }
        let landing = Arc::new(Landing::new(context, bytes.next_power_of_two().max(LANDING))?);
        self.landings.push(landing.clone());
        Ok(landing)
    }

    /// How far uploads have come, for [`Staging::passed`].
    pub(crate) fn uploaded(&self) -> u64 {
        self.ring.head
    }

    /// The stream has passed the uploads up to there.
    pub(crate) fn passed(&mut self, uploaded: u64) {
        self.ring.pass(uploaded);
    }
}

impl Landing {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        Ok(Self { pinned: Pinned::new(context, bytes)?, event: event(context)? })
    }
}

/// Which bytes of a buffer are in use, taken in order and given back in order. Positions go on for ever; a place is one modulo the size.
#[derive(Debug)]
struct Ring {
    bytes: u64,
    head: u64,
    /// What is in use begins here.
    tail: u64,
}

impl Ring {
    fn new(bytes: usize) -> Self {
        Self { bytes: bytes as u64, head: 0, tail: 0 }
    }

    /// A place for so many bytes in one piece, if there is room.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let (size, bytes) = (self.bytes, bytes as u64);
        let start = self.head.next_multiple_of(64);
        let start = if start % size + bytes > size { start.next_multiple_of(size) } else { start };
        if start + bytes > self.tail + size {
            return None;
        }
        self.head = start + bytes;
        Some((start % size) as usize)
    }

    /// What was taken before `head` came there is free.
    fn pass(&mut self, head: u64) {
        self.tail = self.tail.max(head);
    }

    /// All is free, in one piece.
    fn pass_all(&mut self) {
        self.head = self.head.next_multiple_of(self.bytes);
        self.tail = self.head;
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
        let part = |_| Ok((Pinned::new(context, PART)?, event(context)?));
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

/// An event that was not recorded yet.
fn event(context: &Arc<Context>) -> Result<Owned<CUevent>> {
    let mut event = std::ptr::null_mut();
    let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
    // SAFETY: a valid out pointer.
    context.check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
    // SAFETY: made once, and passed.
    Ok(Owned::new(context, event, |event| _ = unsafe { sys::cuEventDestroy_v2(event) }))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_use_are_not_taken_again_and_those_passed_are() {
        let mut ring = Ring::new(1024);
        assert_eq!([100, 600].map(|bytes| ring.take(bytes)), [Some(0), Some(128)]);
        let mark = ring.head;
        // Not in one piece at the end, and at the beginning in use.
        assert_eq!(ring.take(400), None);
        assert_eq!(ring.take(200), Some(768));
        ring.pass(mark);
        assert_eq!([400, 256, 64].map(|bytes| ring.take(bytes)), [Some(0), Some(448), None]);
        ring.pass(mark);
        assert_eq!(ring.take(64), None, "passed before");
        ring.pass_all();
        assert_eq!([1024, 1].map(|bytes| ring.take(bytes)), [Some(0), None]);
    }
}
