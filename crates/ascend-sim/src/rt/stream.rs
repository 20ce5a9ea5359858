//! Streams.

use std::ffi::c_void;

use crate::{
    array::{Chip, Refusal},
    constants::*,
    machine::{Machine, Needs, call, call_waiting, lock, refusal},
    meta::put,
    rt::{handle, timeout},
    stream::{Stream, synchronize},
};

/// Streams that a device has.
fn stream_limit(chip: Chip) -> usize {
    match chip {
        Chip::A2 | Chip::A3 => 1984,
        Chip::P310 => 1024,
    }
}

/// Refuses if the thread's device has no stream left. Captured graphs take as many as took part in the capture.
pub fn check_stream_limit(m: &Machine) -> Result<(), Refusal> {
    let device = m.current_device()?;
    let of_device = |context: u64| m.contexts.get(context).is_ok_and(|c| c.device == device);
    let streams = m.streams.iter().filter(|(_, stream)| of_device(stream.context)).count();
    let graphs = m.graphs.iter().filter(|(_, graph)| of_device(graph.context));
    let limit = stream_limit(m.settings.chip());
    if streams + graphs.map(|(_, graph)| graph.streams()).sum::<usize>() >= limit {
        return Err(refusal!(ACL_ERROR_RT_NO_STREAM_RESOURCE, "all {limit} streams of the device are in use"));
    }
    Ok(())
}

fn create(m: &mut Machine) -> Result<*mut c_void, Refusal> {
    let context = m.sound()?;
    check_stream_limit(m)?;
    Ok(m.streams.insert(Stream::new(context)) as *mut c_void)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtCreateStream(stream: *mut *mut c_void) -> i32 {
    call("aclrtCreateStream", Needs::Init, |m| {
        let made = create(m)?;
        // SAFETY: the C ABI has room for a pointer there.
        unsafe { put(stream, made) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtCreateStreamWithConfig(stream: *mut *mut c_void, _priority: u32, flags: u32) -> i32 {
    call("aclrtCreateStreamWithConfig", Needs::Init, |m| {
        if flags >= 0x40 {
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "flags {flags:#x}: known are those up to 0x20"));
        }
        let made = create(m)?;
        // SAFETY: the C ABI has room for a pointer there.
        unsafe { put(stream, made) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtDestroyStream(stream: *mut c_void) -> i32 {
    call_waiting("aclrtDestroyStream", Needs::Init, |guard| {
        let stream = own(&guard, stream)?;
        let target = (stream, guard.streams.get(stream)?.submitted);
        // A stream whose tasks failed is destroyed all the same.
        let _ = synchronize(guard, &[target], None, 0);
        lock().streams.remove(stream).map(drop)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtDestroyStreamForce(stream: *mut c_void) -> i32 {
    call("aclrtDestroyStreamForce", Needs::Init, |m| {
        let stream = own(m, stream)?;
        m.streams.remove(stream).map(drop)
    })
}

/// A stream that its owner may destroy; a default stream ends with its context.
fn own(m: &Machine, stream: *mut c_void) -> Result<u64, Refusal> {
    let stream = m.stream(handle(stream))?;
    if m.contexts.get(m.current()?)?.default_stream == stream {
        return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "the default stream ends with its context"));
    }
    Ok(stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtSynchronizeStream(stream: *mut c_void) -> i32 {
    synchronize_stream("aclrtSynchronizeStream", stream, -1)
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtSynchronizeStreamWithTimeout(stream: *mut c_void, milliseconds: i32) -> i32 {
    synchronize_stream("aclrtSynchronizeStreamWithTimeout", stream, milliseconds)
}

fn synchronize_stream(symbol: &'static str, stream: *mut c_void, milliseconds: i32) -> i32 {
    call_waiting(symbol, Needs::Init, |mut guard| {
        guard.sound()?;
        let stream = guard.stream(handle(stream))?;
        guard.refuse_captured(stream)?;
        let target = (stream, guard.streams.get(stream)?.submitted);
        synchronize(guard, &[target], timeout(milliseconds), ACL_ERROR_RT_STREAM_SYNC_TIMEOUT)
    })
}

/// Lets the device finish one more task, so that whoever polls comes to an end.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtStreamQuery(stream: *mut c_void, status: *mut i32) -> i32 {
    call("aclrtStreamQuery", Needs::Init, |m| {
        m.sound()?;
        let stream = m.stream(handle(stream))?;
        m.refuse_captured(stream)?;
        let complete = m.poll(stream, m.streams.get(stream)?.submitted)?;
        let answer = if complete { ACL_STREAM_STATUS_COMPLETE } else { ACL_STREAM_STATUS_NOT_READY };
        // SAFETY: the C ABI has room for an enum there.
        unsafe { put(status, answer as i32) }
    })
}

/// Drops what is queued.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtStreamAbort(stream: *mut c_void) -> i32 {
    call("aclrtStreamAbort", Needs::Init, |m| {
        let stream = m.stream(handle(stream))?;
        m.streams.get_mut(stream)?.abandon();
        Ok(())
    })
}

/// Accepted, and without effect: a failed task always ends its context here.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtSetStreamFailureMode(stream: *mut c_void, _mode: u64) -> i32 {
    call("aclrtSetStreamFailureMode", Needs::Init, |m| m.stream(handle(stream)).map(drop))
}
