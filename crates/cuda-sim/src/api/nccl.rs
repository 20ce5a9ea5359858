//! NCCL: communicators, the sum over ranks, and what all get of one.

use std::{
    ffi::{CStr, c_char},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{
    collective::{Communicator, Kind, Meeting},
    dtype::DType,
    machine::{Fail, Guard, Machine, current, fail, lock, notify, put, wait},
    stream::Task,
};

pub const UNHANDLED_CUDA_ERROR: i32 = 1;
pub const INVALID_ARGUMENT: i32 = 4;
pub const INVALID_USAGE: i32 = 5;
pub const REMOTE_ERROR: i32 = 6;
pub const SUM: i32 = 0;
const INT32: i32 = 2;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId {
    bytes: [u8; 128],
}

impl UniqueId {
    fn ring(&self) -> u64 {
        u64::from_le_bytes(self.bytes[..8].try_into().expect("8 bytes"))
    }
}

/// A call; failures of the driver are this library's unhandled error.
fn nccl(symbol: &'static str, body: impl FnOnce(Guard) -> (Guard, Result<(), Fail>)) -> i32 {
    let mut m = lock();
    let (mut m, result) = match m.enter(symbol) {
        Ok(_) => body(m),
        Err(failure) => (m, Err(failure)),
    };
    let own = [INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR];
    let result = result.map_err(|failure| match own.contains(&failure.code) {
        true => failure,
        false => Fail { code: UNHANDLED_CUDA_ERROR, ..failure },
    });
    m.answer(symbol, result)
}

fn at_once(symbol: &'static str, body: impl FnOnce(&mut Machine) -> Result<(), Fail>) -> i32 {
    nccl(symbol, |mut m| {
        let result = body(&mut m);
        (m, result)
    })
}

/// Handles of this library are arguments.
fn argument<T>(result: Result<T, Fail>) -> Result<T, Fail> {
    result.map_err(|failure| Fail { code: INVALID_ARGUMENT, ..failure })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetVersion(version: *mut i32) -> i32 {
    at_once("ncclGetVersion", |_| argument(put(version, 22_700)))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(code: i32) -> *const c_char {
    let text: &CStr = match code {
        0 => c"no error",
        UNHANDLED_CUDA_ERROR => c"unhandled cuda error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        REMOTE_ERROR => c"remote process exited or there was a network error",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

/// Nothing: what failed is among the simulator's messages.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(_communicator: u64) -> *const c_char {
    c"".as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> i32 {
    at_once("ncclGetUniqueId", |_| argument(put(id, new_id())))
}

fn new_id() -> UniqueId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut id = UniqueId { bytes: [0; 128] };
    id.bytes[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    id
}

impl Machine {
    fn join(&mut self, ring: u64, size: i32, rank: i32, device: u32) -> Result<u64, Fail> {
        if ring == 0 || size < 1 || !(0..size).contains(&rank) {
            return Err(fail!(INVALID_ARGUMENT, "rank {rank} of {size}"));
        }
        let found = self.rings.entry(ring).or_default();
        if found.size != 0 && found.size != size as u32 || found.ranks.contains_key(&(rank as u32)) {
            return Err(fail!(
                INVALID_USAGE,
                "rank {rank} of {size} in a ring of {} with {:?}",
                found.size,
                found.ranks
            ));
        }
        found.size = size as u32;
        let communicator = self.communicators.insert(Communicator::new(ring, rank as u32, device));
        found.ranks.insert(rank as u32, communicator);
        notify();
        Ok(communicator)
    }
}

/// Waits until all ranks of a ring have joined.
fn wait_for_all(mut m: Guard, ring: u64) -> (Guard, Result<(), Fail>) {
    loop {
        match m.rings.get(&ring) {
            Some(ring) if ring.aborted => return (m, Err(fail!(REMOTE_ERROR, "another rank gave up"))),
            Some(ring) if ring.ranks.len() < ring.size as usize => m = wait(m),
            _ => return (m, Ok(())),
        }
    }
}

/// Waits for the other ranks.
#[unsafe(no_mangle)]
pub extern "C" fn ncclCommInitRank(communicator: *mut u64, size: i32, id: UniqueId, rank: i32) -> i32 {
    nccl("ncclCommInitRank", |mut m| {
        let joined = (|m: &mut Guard| {
            let device = m.contexts.get(current())?.device;
            let joined = m.join(id.ring(), size, rank, device)?;
            argument(put(communicator, joined))
        })(&mut m);
        if joined.is_err() { (m, joined) } else { wait_for_all(m, id.ring()) }
    })
}

/// # Safety
/// There is room for as many communicators as devices, and if there is a list, it has as many numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitAll(communicators: *mut u64, count: i32, devices: *const i32) -> i32 {
    at_once("ncclCommInitAll", |m| {
        let ring = new_id().ring();
        for rank in 0..count {
            // SAFETY: as the caller promises.
            let device = if devices.is_null() { rank } else { unsafe { *devices.add(rank as usize) } };
            argument(m.device(device))?;
            let joined = m.join(ring, count, rank, device as u32)?;
            argument(put(communicators.wrapping_add(rank as usize), joined))?;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclAllReduce(
    from: u64,
    to: u64,
    count: usize,
    kind: i32,
    operation: i32,
    communicator: u64,
    stream: u64,
) -> i32 {
    at_once("ncclAllReduce", |m| {
        let dtype = DType::of_nccl(kind).filter(|_| operation == SUM);
        let dtype = dtype.ok_or_else(|| fail!(INVALID_ARGUMENT, "only sums of f32, f16 and bf16 are simulated"))?;
        queue(m, Meeting { communicator, from, to, count: count as u64, kind: Kind::Sum(dtype) }, stream)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclBroadcast(
    from: u64,
    to: u64,
    count: usize,
    kind: i32,
    root: i32,
    communicator: u64,
    stream: u64,
) -> i32 {
    at_once("ncclBroadcast", |m| {
        let ring = argument(m.communicators.get(communicator))?.ring;
        let root = u32::try_from(root).ok().filter(|root| *root < m.rings[&ring].size && kind == INT32);
        let root =
            root.ok_or_else(|| fail!(INVALID_ARGUMENT, "only words of 32 bits of one of the ranks are simulated"))?;
        queue(m, Meeting { communicator, from, to, count: count as u64, kind: Kind::Of(root) }, stream)
    })
}

/// Puts a rank's part of a collective on its stream.
fn queue(m: &mut Machine, meeting: Meeting, stream: u64) -> Result<(), Fail> {
    let Meeting { communicator, from, to, .. } = meeting;
    let device = argument(m.communicators.get(communicator))?.device;
    for address in [from, to] {
        let lies_on = m.memory.device(address, meeting.bytes());
        if lies_on.map_err(|text| fail!(INVALID_ARGUMENT, "{text}"))? != device {
            return Err(fail!(INVALID_ARGUMENT, "{address:#x} is not on the communicator's device"));
        }
    }
    let context = argument(m.streams.get(stream))?.context;
    if m.contexts.get(context)?.device != device {
        return Err(fail!(INVALID_ARGUMENT, "the stream is not of the communicator's device"));
    }
    m.submit(stream, Task::Meet(meeting))?;
    m.communicators.get_mut(communicator)?.stream = Some(stream);
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommGetAsyncError(communicator: u64, error: *mut i32) -> i32 {
    at_once("ncclCommGetAsyncError", |m| {
        let ring = argument(m.communicators.get(communicator))?.ring;
        argument(put(error, if m.rings[&ring].aborted { REMOTE_ERROR } else { 0 }))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommDestroy(communicator: u64) -> i32 {
    at_once("ncclCommDestroy", |m| leave(m, communicator, false))
}

/// Nobody waits for this rank any more.
#[unsafe(no_mangle)]
pub extern "C" fn ncclCommAbort(communicator: u64) -> i32 {
    at_once("ncclCommAbort", |m| leave(m, communicator, true))
}

fn leave(m: &mut Machine, communicator: u64, abort: bool) -> Result<(), Fail> {
    let left = argument(m.communicators.remove(communicator))?;
    let ring = m.rings.get_mut(&left.ring).expect("a communicator has its ring");
    ring.aborted |= abort;
    ring.ranks.remove(&left.rank);
    if ring.ranks.is_empty() {
        m.rings.remove(&left.ring);
    }
    notify();
    Ok(())
}
