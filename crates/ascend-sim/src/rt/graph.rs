//! The exported functions of graph capture.

use std::ffi::c_void;

use crate::{
    constants::*,
    graph::exchange_mode,
    machine::{Needs, call, call_waiting, refusal},
    meta::put,
    rt::{handle, stream::check_stream_limit, timeout},
    stream::synchronize,
};

/// A capture mode that exists.
fn mode(mode: i32) -> Result<i64, crate::array::Refusal> {
    match i64::from(mode) {
        mode @ ACL_MODEL_RI_CAPTURE_MODE_GLOBAL..=ACL_MODEL_RI_CAPTURE_MODE_RELAXED => Ok(mode),
        _ => Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "capture mode {mode}: 0 to 2")),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn aclmdlRICaptureBegin(stream: *mut c_void, capture_mode: i32) -> i32 {
    call("aclmdlRICaptureBegin", Needs::Init, |m| {
        m.sound()?;
        let stream = m.stream(handle(stream))?;
        check_stream_limit(m)?;
        m.capture_begin(stream, mode(capture_mode)?)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclmdlRICaptureGetInfo(stream: *mut c_void, status: *mut i32, graph: *mut *mut c_void) -> i32 {
    call("aclmdlRICaptureGetInfo", Needs::Init, |m| {
        let stream = m.stream(handle(stream))?;
        let capture = m.streams.get(stream)?.capture;
        let found =
            capture.map_or(Ok(ACL_MODEL_RI_CAPTURE_STATUS_NONE), |graph| m.graphs.get(graph).map(|g| g.status))?;
        // SAFETY: the C ABI has room for an enum and a pointer there.
        unsafe { put(status, found as i32).and(put(graph, capture.unwrap_or(0) as *mut c_void)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclmdlRICaptureEnd(stream: *mut c_void, graph: *mut *mut c_void) -> i32 {
    call("aclmdlRICaptureEnd", Needs::Init, |m| {
        let stream = m.stream(handle(stream))?;
        let captured = m.capture_end(stream)?;
        // SAFETY: the C ABI has room for a pointer there.
        unsafe { put(graph, captured as *mut c_void) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclmdlRICaptureThreadExchangeMode(exchanged: *mut i32) -> i32 {
    call("aclmdlRICaptureThreadExchangeMode", Needs::Init, |_| {
        if exchanged.is_null() {
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "the mode is null"));
        }
        // SAFETY: the C ABI has an enum there, and the pointer is not null.
        let wanted = mode(unsafe { *exchanged })?;
        // SAFETY: as above.
        unsafe { put(exchanged, exchange_mode(wanted) as i32) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclmdlRICaptureTaskGrpBegin(stream: *mut c_void) -> i32 {
    call("aclmdlRICaptureTaskGrpBegin", Needs::Init, |m| m.group_begin(m.stream(handle(stream))?))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclmdlRICaptureTaskGrpEnd(stream: *mut c_void, group: *mut *mut c_void) -> i32 {
    call("aclmdlRICaptureTaskGrpEnd", Needs::Init, |m| {
        let made = m.group_end(m.stream(handle(stream))?)?;
        // SAFETY: the C ABI has room for a pointer there.
        unsafe { put(group, made as *mut c_void) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclmdlRICaptureTaskUpdateBegin(stream: *mut c_void, group: *mut c_void) -> i32 {
    call("aclmdlRICaptureTaskUpdateBegin", Needs::Init, |m| m.update_begin(m.stream(handle(stream))?, handle(group)))
}

#[unsafe(no_mangle)]
pub extern "C" fn aclmdlRICaptureTaskUpdateEnd(stream: *mut c_void) -> i32 {
    call("aclmdlRICaptureTaskUpdateEnd", Needs::Init, |m| m.update_end(m.stream(handle(stream))?))
}

#[unsafe(no_mangle)]
pub extern "C" fn aclmdlRIExecuteAsync(graph: *mut c_void, stream: *mut c_void) -> i32 {
    call("aclmdlRIExecuteAsync", Needs::Init, |m| {
        m.sound()?;
        m.submit_graph(handle(graph), m.stream(handle(stream))?).map(drop)
    })
}

/// Runs on the default stream and waits.
#[unsafe(no_mangle)]
pub extern "C" fn aclmdlRIExecute(graph: *mut c_void, milliseconds: i32) -> i32 {
    call_waiting("aclmdlRIExecute", Needs::Init, |mut guard| {
        guard.sound()?;
        let stream = guard.stream(0)?;
        let position = guard.submit_graph(handle(graph), stream)?;
        synchronize(guard, &[(stream, position)], timeout(milliseconds), ACL_ERROR_RT_STREAM_SYNC_TIMEOUT)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclmdlRIDestroy(graph: *mut c_void) -> i32 {
    call("aclmdlRIDestroy", Needs::Init, |m| m.graphs.remove(handle(graph)).map(drop))
}

/// Prints nothing: a graph is seen in its replays.
#[unsafe(no_mangle)]
pub extern "C" fn aclmdlRIDebugPrint(graph: *mut c_void) -> i32 {
    call("aclmdlRIDebugPrint", Needs::Init, |m| m.graphs.get(handle(graph)).map(drop))
}
