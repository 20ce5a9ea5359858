//! Streams: made, waited for, asked, captured.

use std::thread;

use crate::{
    codes::{cuda, flag},
    machine::{Capture, Fail, Graph, Machine, Record, fail, in_context, notify, put, waiting},
    stream::{Stream, Task, synchronize},
};

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreate(stream: *mut u64, flags: u32) -> i32 {
    in_context("cuStreamCreate", |m, context| create(m, context, stream, flags))
}

fn create(m: &mut Machine, context: u64, stream: *mut u64, flags: u32) -> Result<(), Fail> {
    if flags > flag::STREAM_NON_BLOCKING {
        return Err(fail!(cuda::INVALID_VALUE, "flags {flags}"));
    }
    put(stream, m.streams.insert(Stream::new(context, flags)))
}

/// What is queued completes first.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: u64) -> i32 {
    waiting("cuStreamDestroy_v2", |guard, _, _| {
        let (default, submitted) = match guard.streams.get(stream) {
            Ok(found) => (guard.contexts.iter().any(|(_, c)| c.default_stream == stream), found.submitted),
            Err(failure) => return (guard, Err(failure)),
        };
        if default {
            return (guard, Err(fail!(cuda::INVALID_HANDLE, "the null stream is never destroyed")));
        }
        let (mut guard, result) = synchronize(guard, &[(stream, submitted)]);
        let removed = guard.streams.remove(stream).map(drop);
        (guard, result.and(removed))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: u64) -> i32 {
    waiting("cuStreamSynchronize", |mut guard, context, _| {
        let targets = guard.outside_own_capture(context, stream).and_then(|handle| match stream {
            0 => Ok(guard.blocking_streams(context)),
            _ => Ok(vec![(handle, guard.streams.get(handle)?.submitted)]),
        });
        match targets {
            Ok(targets) => synchronize(guard, &targets),
            Err(failure) => (guard, Err(failure)),
        }
    })
}

/// Lets the device do one more task.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: u64) -> i32 {
    in_context("cuStreamQuery", |m, context| {
        let handle = m.outside_own_capture(context, stream)?;
        let position = m.streams.get(handle)?.submitted;
        match m.poll(handle, position)? {
            true => Ok(()),
            false => Err(fail!(cuda::NOT_READY, "tasks are queued")),
        }
    })
}

impl Machine {
    /// The handle of a stream that is not being captured; a capture is lost by the question.
    fn outside_own_capture(&mut self, context: u64, stream: u64) -> Result<u64, Fail> {
        let handle = self.stream(context, stream)?;
        match &mut self.streams.get_mut(handle)?.capture {
            None => Ok(handle),
            Some(capture) => {
                capture.broken = true;
                Err(fail!(cuda::STREAM_CAPTURE_UNSUPPORTED, "the stream is being captured"))
            }
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: u64, event: u64, _flags: u32) -> i32 {
    in_context("cuStreamWaitEvent", |m, context| {
        let stream = m.target(context, stream)?;
        let record = m.events.get(event)?.record;
        let capture = &mut m.streams.get_mut(stream)?.capture;
        match (record, capture) {
            (None, _) => Ok(()),
            (Some(Record::Captured { stream: other }), Some(_)) if other == stream => Ok(()),
            (Some(Record::Captured { .. }), _) => {
                Err(fail!(cuda::STREAM_CAPTURE_UNSUPPORTED, "captures over several streams are not simulated"))
            }
            (Some(Record::Stream { .. }), Some(capture)) => {
                capture.broken = true;
                Err(fail!(cuda::STREAM_CAPTURE_ISOLATION, "the event was recorded outside of the capture"))
            }
            (Some(Record::Stream { stream: other, position }), None) => {
                m.submit(stream, Task::Wait { stream: other, position }).map(drop)
            }
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: u64, mode: i32) -> i32 {
    in_context("cuStreamBeginCapture_v2", |m, context| {
        let handle = m.stream(context, stream)?;
        if stream == 0 {
            return Err(fail!(cuda::STREAM_CAPTURE_UNSUPPORTED, "the null stream is never captured"));
        }
        if !(flag::CAPTURE_GLOBAL..=flag::CAPTURE_RELAXED).contains(&mode) {
            return Err(fail!(cuda::INVALID_VALUE, "mode {mode}"));
        }
        let stream = m.streams.get_mut(handle)?;
        if stream.capture.is_some() {
            return Err(fail!(cuda::INVALID_VALUE, "the stream is being captured already"));
        }
        let thread = thread::current().id();
        stream.capture = Some(Capture { mode, thread, tasks: Vec::new(), broken: false });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamEndCapture(stream: u64, graph: *mut u64) -> i32 {
    in_context("cuStreamEndCapture", |m, context| {
        put(graph, 0)?;
        let handle = m.stream(context, stream)?;
        let slot = &mut m.streams.get_mut(handle)?.capture;
        let unmatched = || fail!(cuda::STREAM_CAPTURE_UNMATCHED, "the stream is not being captured");
        let capture = slot.as_ref().ok_or_else(unmatched)?;
        if capture.mode != flag::CAPTURE_RELAXED && capture.thread != thread::current().id() {
            return Err(fail!(cuda::STREAM_CAPTURE_WRONG_THREAD, "another thread began the capture"));
        }
        let capture = slot.take().ok_or_else(unmatched)?;
        notify();
        if capture.broken {
            return Err(fail!(cuda::STREAM_CAPTURE_INVALIDATED, "something happened that a capture does not survive"));
        }
        put(graph, m.graphs.insert(Graph { context, tasks: capture.tasks.into(), bytes: 0 }))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamIsCapturing(stream: u64, status: *mut i32) -> i32 {
    in_context("cuStreamIsCapturing", |m, context| {
        let handle = m.stream(context, stream)?;
        let state =
            m.streams.get(handle)?.capture.as_ref().map_or(flag::CAPTURE_NONE, |capture| match capture.broken {
                true => flag::CAPTURE_INVALIDATED,
                false => flag::CAPTURE_ACTIVE,
            });
        put(status, state)
    })
}
