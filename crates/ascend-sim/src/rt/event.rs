//! Events.

use std::ffi::c_void;

use crate::{
    array::{Chip, Refusal},
    constants::*,
    event::Event,
    machine::{Machine, Needs, call, call_waiting, refusal},
    meta::put,
    rt::{handle, timeout},
    stream::synchronize,
};

/// Events with SYNC or EXTERNAL that a device has.
fn event_limit(chip: Chip) -> usize {
    match chip {
        Chip::A2 | Chip::A3 => 65536,
        Chip::P310 => 1023,
    }
}

fn create(m: &mut Machine, flags: i64, extended: bool) -> Result<*mut c_void, Refusal> {
    let context = m.sound()?;
    let device = m.current_device()?;
    // An extended event takes its place when it is recorded, where the device waits for one; so it never runs out.
    let counts = |event: &Event| !event.extended && event.flags & (ACL_EVENT_SYNC | ACL_EVENT_EXTERNAL) != 0;
    let event = Event::new(context, flags, extended);
    let of_device = |context: u64| m.contexts.get(context).is_ok_and(|c| c.device == device);
    let limit = event_limit(m.settings.chip());
    if counts(&event) && m.events.iter().filter(|(_, e)| counts(e) && of_device(e.context)).count() >= limit {
        return Err(refusal!(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "all {limit} events of the device are in use"));
    }
    Ok(m.events.insert(event) as *mut c_void)
}

/// The exported functions that make an event.
macro_rules! creates {
    ($($name:ident ( $($flag:ident)? ) = $flags:expr, $extended:expr;)*) => {
        $(#[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(event: *mut *mut c_void $(, $flag: u32)?) -> i32 {
            call(stringify!($name), Needs::Init, |m| {
                let made = create(m, $flags, $extended)?;
                // SAFETY: the C ABI has room for a pointer there.
                unsafe { put(event, made) }
            })
        })*
    };
}

creates! {
    aclrtCreateEvent() = ACL_EVENT_SYNC | ACL_EVENT_TIME_LINE, false;
    aclrtCreateEventWithFlag(flag) = flag.into(), false;
    aclrtCreateEventExWithFlag(flag) = flag.into(), true;
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtDestroyEvent(event: *mut c_void) -> i32 {
    call("aclrtDestroyEvent", Needs::Init, |m| m.events.remove(handle(event)).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtRecordEvent(event: *mut c_void, stream: *mut c_void) -> i32 {
    call("aclrtRecordEvent", Needs::Init, |m| m.record(own(m, event)?, m.stream(handle(stream))?))
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtStreamWaitEvent(stream: *mut c_void, event: *mut c_void) -> i32 {
    call("aclrtStreamWaitEvent", Needs::Init, |m| m.stream_wait(m.stream(handle(stream))?, own(m, event)?))
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtResetEvent(event: *mut c_void, stream: *mut c_void) -> i32 {
    call("aclrtResetEvent", Needs::Init, |m| m.reset_event(own(m, event)?, m.stream(handle(stream))?))
}

/// Lets the device finish one more task, so that whoever polls comes to an end.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtQueryEventStatus(event: *mut c_void, status: *mut i32) -> i32 {
    call("aclrtQueryEventStatus", Needs::Init, |m| {
        m.sound()?;
        let complete = match m.target(own(m, event)?)? {
            None => false,
            Some((stream, position)) => m.poll(stream, position)?,
        };
        let answer = if complete { ACL_EVENT_RECORDED_STATUS_COMPLETE } else { ACL_EVENT_RECORDED_STATUS_NOT_READY };
        // SAFETY: the C ABI has room for an enum there.
        unsafe { put(status, answer as i32) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtSynchronizeEvent(event: *mut c_void) -> i32 {
    synchronize_event("aclrtSynchronizeEvent", event, -1)
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtSynchronizeEventWithTimeout(event: *mut c_void, milliseconds: i32) -> i32 {
    synchronize_event("aclrtSynchronizeEventWithTimeout", event, milliseconds)
}

fn synchronize_event(symbol: &'static str, event: *mut c_void, milliseconds: i32) -> i32 {
    call_waiting(symbol, Needs::Init, |guard| {
        guard.sound()?;
        let targets: Vec<_> = guard.target(own(&guard, event)?)?.into_iter().collect();
        synchronize(guard, &targets, timeout(milliseconds), ACL_ERROR_RT_WAIT_TIMEOUT)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtEventElapsedTime(milliseconds: *mut f32, start: *mut c_void, end: *mut c_void) -> i32 {
    call("aclrtEventElapsedTime", Needs::Init, |m| {
        let at = |event| {
            let event = m.events.get(own(m, event)?)?;
            if event.flags & ACL_EVENT_TIME_LINE == 0 {
                return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "an event without ACL_EVENT_TIME_LINE has no time"));
            }
            event.completed_at.ok_or_else(|| refusal!(ACL_ERROR_RT_PARAM_INVALID, "the event is not complete"))
        };
        let elapsed = at(end)?.saturating_duration_since(at(start)?);
        // SAFETY: the C ABI has room for a number there.
        unsafe { put(milliseconds, elapsed.as_secs_f32() * 1e3) }
    })
}

/// An event of the thread's context.
fn own(m: &Machine, event: *mut c_void) -> Result<u64, Refusal> {
    if m.events.get(handle(event))?.context != m.current()? {
        return Err(refusal!(ACL_ERROR_RT_STREAM_CONTEXT, "the event belongs to another context than the thread's"));
    }
    Ok(handle(event))
}
