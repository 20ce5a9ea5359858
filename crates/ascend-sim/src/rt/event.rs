//! Events.

use std::{ffi::c_void, time::Duration};

use crate::{
    array::{Chip, Refusal},
    constants::*,
    machine::{Machine, Needs, call, call_waiting, refusal},
    meta::put,
    rt::{handle, timeout},
    stream::{Action, Event, Progress, Task, synchronize},
};

/// Events with SYNC that a device has.
fn event_limit(chip: Chip) -> usize {
    match chip {
        Chip::A2 | Chip::A3 => 65536,
        Chip::P310 => 1023,
    }
}

fn create(m: &mut Machine, flags: i64) -> Result<*mut c_void, Refusal> {
    let context = m.sound()?;
    let device = m.current_device()?;
    let of_device = |context: u64| m.contexts.get(context).is_ok_and(|c| c.device == device);
    let counts = |flags: i64| flags & (ACL_EVENT_SYNC | ACL_EVENT_EXTERNAL) != 0;
    let taken = m.events.iter().filter(|(_, event)| counts(event.flags) && of_device(event.context)).count();
    let limit = event_limit(m.settings.chip());
    if counts(flags) && taken >= limit {
        return Err(refusal!(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "all {limit} events of the device are in use"));
    }
    let event = Event { context, flags, recorded: None, completed_at: None };
    Ok(m.events.insert(event) as *mut c_void)
}

/// The exported functions that make an event.
macro_rules! creates {
    ($($name:ident ( $($flag:ident)? ) = $flags:expr;)*) => {
        $(#[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(event: *mut *mut c_void $(, $flag: u32)?) -> i32 {
            call(stringify!($name), Needs::Init, |m| {
                let made = create(m, $flags)?;
                // SAFETY: the C ABI has room for a pointer there.
                unsafe { put(event, made) }
            })
        })*
    };
}

creates! {
    aclrtCreateEvent() = ACL_EVENT_SYNC | ACL_EVENT_TIME_LINE;
    aclrtCreateEventWithFlag(flag) = flag.into();
    aclrtCreateEventExWithFlag(flag) = flag.into();
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtDestroyEvent(event: *mut c_void) -> i32 {
    call("aclrtDestroyEvent", Needs::Init, |m| m.events.remove(handle(event)).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtRecordEvent(event: *mut c_void, stream: *mut c_void) -> i32 {
    call("aclrtRecordEvent", Needs::Init, |m| {
        let (stream, event) = (m.stream(handle(stream))?, own(m, event)?);
        let task =
            Task { name: "aclrtRecordEvent", ranges: Vec::new(), delay: Duration::ZERO, action: Action::Record(event) };
        let position = m.submit(stream, task)?;
        m.events.get_mut(event)?.recorded = Some((stream, position));
        Ok(())
    })
}

/// A stream waits for what was recorded up to now; for an event that never was, for nothing.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtStreamWaitEvent(stream: *mut c_void, event: *mut c_void) -> i32 {
    call("aclrtStreamWaitEvent", Needs::Init, |m| {
        let (stream, event) = (m.stream(handle(stream))?, own(m, event)?);
        let event = m.events.get(event)?;
        if event.flags & ACL_EVENT_SYNC == 0 {
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "an event without ACL_EVENT_SYNC cannot be waited for"));
        }
        let Some((recorder, position)) = event.recorded else { return Ok(()) };
        let action = Action::Wait { stream: recorder, position };
        let task = Task { name: "aclrtStreamWaitEvent", ranges: Vec::new(), delay: Duration::ZERO, action };
        m.submit(stream, task).map(drop)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtQueryEventStatus(event: *mut c_void, status: *mut i32) -> i32 {
    call("aclrtQueryEventStatus", Needs::Init, |m| {
        let context = m.sound()?;
        let event = own(m, event)?;
        let complete = match m.events.get(event)?.recorded {
            None => false,
            Some((stream, position)) => {
                let next = m.streams.get(stream)?.done + 1;
                let complete = next > position;
                if !complete {
                    let (Progress::Done | Progress::Blocked(_)) = m.advance(stream, next)?;
                    m.check_fault(context)?;
                }
                complete
            }
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
        let event = own(&guard, event)?;
        let targets: Vec<_> = guard.events.get(event)?.recorded.into_iter().collect();
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
