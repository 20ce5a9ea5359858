//! Copies and fills. The blocking ones wait for the streams that the null stream waits for, and for no others.

use std::sync::Arc;

use crate::{
    codes::{cuda, flag},
    machine::{Fail, Guard, Machine, fail, in_context, waiting},
    stream::{Side, Task, synchronize},
};

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoD_v2(to: u64, from: u64, bytes: usize) -> i32 {
    now("cuMemcpyHtoD_v2", bytes, |m, n| Ok((m.device_side(to, n)?, m.host_side(from, n)?)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoH_v2(to: u64, from: u64, bytes: usize) -> i32 {
    now("cuMemcpyDtoH_v2", bytes, |m, n| Ok((m.host_side(to, n)?, m.device_side(from, n)?)))
}

type Sides = Result<(Side, Side), Fail>;

/// A copy on the null stream, waited for.
fn now(symbol: &'static str, bytes: usize, sides: impl Fn(&Machine, u64) -> Sides) -> i32 {
    waiting(symbol, |mut guard, context, _| {
        if let Err(failure) = guard.refuse_null_stream_in_capture(context) {
            return (guard, Err(failure));
        }
        if let Err(failure) = guard.refuse_in_capture(symbol) {
            return (guard, Err(failure));
        }
        let streams = guard.blocking_streams(context);
        let (mut guard, result) = synchronize(guard, &streams);
        let copied = result.and_then(|()| {
            let (to, from) = sides(&guard, bytes as u64)?;
            if bytes == 0 { Ok(()) } else { guard.copy(&to, &from, bytes as u64) }
        });
        (guard, copied)
    })
}

impl Machine {
    /// Work on the null stream would wait for a stream that is being captured, if that is a blocking one.
    fn refuse_null_stream_in_capture(&mut self, context: u64) -> Result<(), Fail> {
        let blocking = |flags: u32| flags & flag::STREAM_NON_BLOCKING == 0;
        let streams = self.streams.iter_mut().filter(|(_, s)| s.context == context && blocking(s.flags));
        match streams.filter_map(|(_, s)| s.capture.as_mut()).map(|capture| capture.broken = true).count() {
            0 => Ok(()),
            _ => Err(fail!(cuda::STREAM_CAPTURE_IMPLICIT, "the null stream waits for a stream that is captured")),
        }
    }

    /// A stream that a copy or a launch names. The null stream is no part of a capture.
    pub fn target(&mut self, context: u64, stream: u64) -> Result<u64, Fail> {
        if stream == 0 {
            self.refuse_null_stream_in_capture(context)?;
        }
        let handle = self.stream(context, stream)?;
        match self.streams.get(handle)?.context == context {
            true => Ok(handle),
            false => Err(fail!(cuda::INVALID_HANDLE, "the stream belongs to another context than the thread's")),
        }
    }

    fn captures(&self, stream: u64) -> bool {
        self.streams.get(stream).is_ok_and(|s| s.capture.is_some())
    }
}

/// Pageable memory is read at the call, page-locked memory when the copy runs.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) -> i32 {
    in_context("cuMemcpyHtoDAsync_v2", |m, context| {
        let stream = m.target(context, stream)?;
        let to = m.device_side(to, bytes as u64)?;
        let from = match m.host_side(from, bytes as u64)? {
            Side::Pageable(at) if !m.captures(stream) => {
                // SAFETY: the caller says that so many bytes can be read.
                Side::Taken(Arc::from(unsafe { std::slice::from_raw_parts(at as *const u8, bytes) }))
            }
            side => side,
        };
        m.submit(stream, Task::Copy { to, from, bytes: bytes as u64 }).map(drop)
    })
}

/// Into pageable memory the copy is waited for.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) -> i32 {
    waiting("cuMemcpyDtoHAsync_v2", |mut guard, context, _| {
        let submitted = (|m: &mut Guard| {
            let stream = m.target(context, stream)?;
            let from = m.device_side(from, bytes as u64)?;
            let to = m.host_side(to, bytes as u64)?;
            let wait = matches!(to, Side::Pageable(_)) && !m.captures(stream);
            let position = m.submit(stream, Task::Copy { to, from, bytes: bytes as u64 })?;
            Ok(wait.then_some((stream, position)))
        })(&mut guard);
        match submitted {
            Ok(Some(target)) => synchronize(guard, &[target]),
            Ok(None) => (guard, Ok(())),
            Err(failure) => (guard, Err(failure)),
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) -> i32 {
    in_context("cuMemcpyDtoDAsync_v2", |m, context| {
        let stream = m.target(context, stream)?;
        let (to, from) = (m.device_side(to, bytes as u64)?, m.device_side(from, bytes as u64)?);
        m.submit(stream, Task::Copy { to, from, bytes: bytes as u64 }).map(drop)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(at: u64, value: u8, count: usize, stream: u64) -> i32 {
    in_context("cuMemsetD8Async", |m, context| m.fill(context, at, value.into(), 1, count, stream))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD32Async(at: u64, value: u32, count: usize, stream: u64) -> i32 {
    in_context("cuMemsetD32Async", |m, context| m.fill(context, at, value, 4, count, stream))
}

impl Machine {
    fn fill(&mut self, context: u64, at: u64, value: u32, width: u64, count: usize, stream: u64) -> Result<(), Fail> {
        let stream = self.target(context, stream)?;
        let count = count as u64;
        self.device_side(at, width * count)?;
        if !at.is_multiple_of(width) {
            return Err(fail!(cuda::INVALID_VALUE, "{at:#x} is not a multiple of {width}"));
        }
        self.submit(stream, Task::Fill { at, value, width, count }).map(drop)
    }
}
