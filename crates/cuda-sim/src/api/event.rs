//! Events.

use crate::{
    codes::{cuda, flag},
    machine::{Event, Fail, Machine, Record, fail, in_context, outside_capture, put, waiting},
    stream::{Task, synchronize},
};

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(event: *mut u64, flags: u32) -> i32 {
    in_context("cuEventCreate", |m, context| {
        let timed = flags & flag::EVENT_DISABLE_TIMING == 0;
        put(event, m.events.insert(Event { context, timed, record: None, reached: None }))
    })
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
            Record::Stream { stream, position: m.submit(stream, Task::Record(event))? }
        };
        let event = m.events.get_mut(event)?;
        (event.record, event.reached) = (Some(record), None);
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

#[unsafe(no_mangle)]
pub extern "C" fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: u64, end: u64) -> i32 {
    in_context("cuEventElapsedTime_v2", |m, _| {
        let (start, end) = (m.time_of(start)?, m.time_of(end)?);
        put(milliseconds, end.saturating_duration_since(start).as_secs_f32() * 1e3)
    })
}

impl Machine {
    fn time_of(&self, event: u64) -> Result<std::time::Instant, Fail> {
        let event = self.events.get(event)?;
        if !event.timed || event.record.is_none() {
            return Err(fail!(cuda::INVALID_HANDLE, "the event has no time, or was not recorded"));
        }
        event.reached.ok_or_else(|| fail!(cuda::NOT_READY, "not reached yet"))
    }
}
