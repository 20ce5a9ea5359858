//! The exported collectives.

use std::{
    ffi::{c_char, c_void},
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use crate::{
    array::Refusal,
    collective::{Ask, Kind},
    constants::*,
    machine::{Guard, Machine, Needs, call, call_waiting, notify, refusal, set_current, wait},
    rt::handle,
};

/// Bytes of an `HcclRootInfo`.
const ROOT_INFO: usize = 4108;

/// Writes a result where the caller asked for it.
///
/// # Safety
/// `out` is null, or points to room for a value.
unsafe fn put<T>(out: *mut T, value: T) -> Result<(), Refusal> {
    // SAFETY: the caller's promise is handed on.
    unsafe { crate::meta::put(out, value) }.map_err(|r| refusal!(HCCL_E_PTR, "{}", r.message))
}

fn new_group() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The root info is the number of a new group, and zeros.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn HcclGetRootInfo(info: *mut c_void) -> i32 {
    call("HcclGetRootInfo", Needs::Init, |_| {
        let mut bytes = [0_u8; ROOT_INFO];
        bytes[..8].copy_from_slice(&new_group().to_le_bytes());
        // SAFETY: the C ABI has room for a root info, which needs no alignment.
        unsafe { put(info.cast::<[u8; ROOT_INFO]>(), bytes) }
    })
}

/// Waits until all ranks have joined, or the time that was set has passed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn HcclCommInitRootInfo(
    ranks: u32,
    info: *const c_void,
    rank: u32,
    out: *mut *mut c_void,
) -> i32 {
    call_waiting("HcclCommInitRootInfo", Needs::Init, |mut guard| {
        if info.is_null() {
            return Err(refusal!(HCCL_E_PTR, "the root info is null"));
        }
        // SAFETY: the C ABI has a root info at the pointer, of which the first bytes are the group's number.
        let group = u64::from_le_bytes(unsafe { info.cast::<[u8; 8]>().read_unaligned() });
        let communicator = guard.join_group(group, ranks as usize, rank as usize)?;
        notify();
        let guard = wait_for_all(guard, group, communicator)?;
        drop(guard);
        // SAFETY: the C ABI has room for a pointer there.
        unsafe { put(out, communicator as *mut c_void) }
    })
}

fn wait_for_all(mut guard: Guard, group: u64, communicator: u64) -> Result<Guard, Refusal> {
    let deadline = Instant::now() + guard.settings.collective_timeout;
    while guard.groups_of_ranks[&group].ranks.iter().any(Option::is_none) {
        if Instant::now() >= deadline {
            let rank = guard.communicators.remove(communicator)?.rank;
            let ranks = &mut guard.groups_of_ranks.get_mut(&group).expect("looked up above").ranks;
            ranks[rank] = None;
            let here = ranks.iter().flatten().count() + 1;
            return Err(refusal!(HCCL_E_TIMEOUT, "{here} of {} ranks have joined", ranks.len()));
        }
        guard = wait(guard, Some(deadline));
    }
    Ok(guard)
}

/// All ranks from one thread, whose current device is the same afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn HcclCommInitAll(count: u32, devices: *const i32, out: *mut *mut c_void) -> i32 {
    call("HcclCommInitAll", Needs::Init, |m| {
        if devices.is_null() || out.is_null() {
            return Err(refusal!(HCCL_E_PTR, "devices or communicators are null"));
        }
        let before = m.current().unwrap_or(0);
        let group = new_group();
        let made = (0..count as usize).try_for_each(|rank| {
            // SAFETY: the C ABI has `count` devices there.
            let device = unsafe { *devices.add(rank) };
            let default = m.device(device.into()).map_err(|r| refusal!(HCCL_E_PARA, "{}", r.message))?.default_context;
            if !m.contexts.contains(default) {
                return Err(refusal!(HCCL_E_PARA, "device {device} was not set by any thread"));
            }
            set_current(default);
            let communicator = m.join_group(group, count as usize, rank)?;
            // SAFETY: the C ABI has room for `count` pointers there.
            unsafe { put(out.add(rank), communicator as *mut c_void) }
        });
        set_current(before);
        made
    })
}

/// The `aclDataType` of an `HcclDataType`.
fn acl_dtype(dtype: i32) -> Result<i32, Refusal> {
    let acl = match i64::from(dtype) {
        HCCL_DATA_TYPE_INT8 => ACL_INT8,
        HCCL_DATA_TYPE_INT16 => ACL_INT16,
        HCCL_DATA_TYPE_INT32 => ACL_INT32,
        HCCL_DATA_TYPE_FP16 => ACL_FLOAT16,
        HCCL_DATA_TYPE_FP32 => ACL_FLOAT,
        HCCL_DATA_TYPE_INT64 => ACL_INT64,
        HCCL_DATA_TYPE_UINT64 => ACL_UINT64,
        HCCL_DATA_TYPE_UINT8 => ACL_UINT8,
        HCCL_DATA_TYPE_UINT16 => ACL_UINT16,
        HCCL_DATA_TYPE_UINT32 => ACL_UINT32,
        HCCL_DATA_TYPE_FP64 => ACL_DOUBLE,
        HCCL_DATA_TYPE_BFP16 => ACL_BF16,
        _ => return Err(refusal!(HCCL_E_PARA, "HcclDataType {dtype}")),
    };
    Ok(acl as i32)
}

fn reduction(op: i32) -> Result<i64, Refusal> {
    match i64::from(op) {
        op @ HCCL_REDUCE_SUM..=HCCL_REDUCE_MIN => Ok(op),
        _ => Err(refusal!(HCCL_E_PARA, "HcclReduceOp {op}")),
    }
}

/// Queues a rank's part, after what every collective checks.
fn post(
    symbol: &'static str,
    communicator: *mut c_void,
    stream: *mut c_void,
    ask: impl FnOnce(usize, usize) -> Result<Ask, Refusal>,
) -> i32 {
    call(symbol, Needs::Init, |m: &mut Machine| {
        let state = m.communicators.get(handle(communicator));
        let state = state.map_err(|r| refusal!(HCCL_E_PARA, "{}", r.message))?;
        let (rank, size) = (state.rank, m.groups_of_ranks[&state.group].ranks.len());
        let ask = ask(rank, size)?;
        if ask.kind != Kind::Barrier && (ask.count == 0 || ask.send == 0 || ask.receive == 0) {
            return Err(refusal!(HCCL_E_PTR, "a null buffer, or no elements"));
        }
        let stream = m.stream(handle(stream)).map_err(|r| refusal!(HCCL_E_RUNTIME, "{}", r.message))?;
        m.post(symbol, handle(communicator), ask, stream)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn HcclAllReduce(
    send: *mut c_void,
    receive: *mut c_void,
    count: u64,
    dtype: i32,
    op: i32,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    post("HcclAllReduce", communicator, stream, |_, _| {
        let (kind, dtype) = (Kind::AllReduce { op: reduction(op)? }, acl_dtype(dtype)?);
        Ok(Ask { kind, dtype, count, send: send as u64, receive: receive as u64 })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn HcclAllGather(
    send: *mut c_void,
    receive: *mut c_void,
    count: u64,
    dtype: i32,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    post("HcclAllGather", communicator, stream, |_, _| {
        let dtype = acl_dtype(dtype)?;
        Ok(Ask { kind: Kind::AllGather, dtype, count, send: send as u64, receive: receive as u64 })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn HcclReduceScatter(
    send: *mut c_void,
    receive: *mut c_void,
    count: u64,
    dtype: i32,
    op: i32,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    post("HcclReduceScatter", communicator, stream, |_, _| {
        let (kind, dtype) = (Kind::ReduceScatter { op: reduction(op)? }, acl_dtype(dtype)?);
        Ok(Ask { kind, dtype, count, send: send as u64, receive: receive as u64 })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn HcclBroadcast(
    buffer: *mut c_void,
    count: u64,
    dtype: i32,
    root: u32,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    post("HcclBroadcast", communicator, stream, |_, size| {
        if root as usize >= size {
            return Err(refusal!(HCCL_E_PARA, "root {root} of {size} ranks"));
        }
        let (kind, dtype) = (Kind::Broadcast { root: root as usize }, acl_dtype(dtype)?);
        Ok(Ask { kind, dtype, count, send: buffer as u64, receive: buffer as u64 })
    })
}

/// A message between two ranks.
fn message(from: usize, to: usize, size: usize, buffer: *mut c_void, count: u64, dtype: i32) -> Result<Ask, Refusal> {
    if from == to || from.max(to) >= size {
        return Err(refusal!(HCCL_E_PARA, "a message from rank {from} to rank {to} of {size}"));
    }
    let (kind, dtype) = (Kind::Message { from, to }, acl_dtype(dtype)?);
    Ok(Ask { kind, dtype, count, send: buffer as u64, receive: buffer as u64 })
}

#[unsafe(no_mangle)]
pub extern "C" fn HcclSend(
    buffer: *mut c_void,
    count: u64,
    dtype: i32,
    to: u32,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    post("HcclSend", communicator, stream, |rank, size| message(rank, to as usize, size, buffer, count, dtype))
}

#[unsafe(no_mangle)]
pub extern "C" fn HcclRecv(
    buffer: *mut c_void,
    count: u64,
    dtype: i32,
    from: u32,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    post("HcclRecv", communicator, stream, |rank, size| message(from as usize, rank, size, buffer, count, dtype))
}

#[unsafe(no_mangle)]
pub extern "C" fn HcclBarrier(communicator: *mut c_void, stream: *mut c_void) -> i32 {
    post("HcclBarrier", communicator, stream, |_, _| {
        Ok(Ask { kind: Kind::Barrier, dtype: ACL_INT8 as i32, count: 0, send: 0, receive: 0 })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn HcclGetCommAsyncError(communicator: *mut c_void, error: *mut i32) -> i32 {
    call("HcclGetCommAsyncError", Needs::Init, |m| {
        let state = m.communicators.get(handle(communicator));
        let code = state.map_err(|r| refusal!(HCCL_E_PARA, "{}", r.message))?.error;
        // SAFETY: the C ABI has room for a code there.
        unsafe { put(error, code as i32) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn HcclCommDestroy(communicator: *mut c_void) -> i32 {
    call("HcclCommDestroy", Needs::Init, |m| {
        let state = m.communicators.remove(handle(communicator));
        state.map(drop).map_err(|r| refusal!(HCCL_E_PARA, "{}", r.message))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn HcclGetErrorString(code: i32) -> *const c_char {
    let text = match i64::from(code) {
        HCCL_SUCCESS => c"no error",
        HCCL_E_PARA => c"parameter error",
        HCCL_E_PTR => c"null pointer",
        HCCL_E_MEMORY => c"memory error",
        HCCL_E_INTERNAL => c"internal error",
        HCCL_E_NOT_SUPPORT => c"not supported",
        HCCL_E_TIMEOUT => c"timeout",
        HCCL_E_RUNTIME => c"runtime error",
        HCCL_E_OOM => c"out of memory",
        _ => c"unknown error",
    };
    text.as_ptr()
}
