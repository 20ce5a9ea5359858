//! Events.

use crate::{
    codes::cuda,
    machine::{Event, Record, fail, in_context, outside_capture, put, waiting},
    stream::{Task, synchronize},
};

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(event: *mut u64, _flags: u32) -> i32 {
    in_context("cuEventCreate", |m, context| put(event, m.events.insert(Event { context, record: None })))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: u64) -> i32 {
    in_context("cuEventDestroy_v2", |m, _| m.events.remove(event).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: u64, stream: u64) -> i32 {
    in_context("cuEventRecord", |m, context| {
        let stream = m.target(context, stream)?;
        if m.events.get(event)?.context != context {
            return Err(fail!(cuda::INVALID_HANDLE, "the event belongs to another context than the stream"));
        }
        let record = if m.streams.get(stream)?.capture.is_some() {
            Record::Captured { stream }
        } else {
            Record::Stream { stream, position: m.submit(stream, Task::Record)? }
        };
        m.events.get_mut(event)?.record = Some(record);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: u64) -> i32 {
    waiting("cuEventSynchronize", |mut guard, _, _| {
        let target = guard.refuse_in_capture("cuEventSynchronize").and_then(|()| guard.recorded(event));
        match target {
            Ok(target) => synchronize(guard, target.as_slice()),
            Err(failure) => (guard, Err(failure)),
        }
    })
}

/// Lets the device do one more task of the event's stream.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: u64) -> i32 {
    outside_capture("cuEventQuery", |m, _| match m.recorded(event)? {
        Some((stream, position)) if !m.poll(stream, position)? => Err(fail!(cuda::NOT_READY, "not reached yet")),
        _ => Ok(()),
    })
}
