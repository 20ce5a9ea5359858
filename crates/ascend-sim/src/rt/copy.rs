//! Copies between host and devices, at once or on a stream.

use std::{ffi::c_void, sync::Arc};

use crate::{
    array::{Fault, Refusal},
    constants::*,
    machine::{Machine, Needs, call, refusal},
    memory::{Place, Range},
    rt::{handle, room},
    runtime::Runtime,
    stream::{Action, Task},
};

/// Rows of bytes, from one place to another.
#[derive(Clone, Copy)]
struct Copy2d {
    to: u64,
    to_pitch: u64,
    from: u64,
    from_pitch: u64,
    width: u64,
    height: u64,
}

/// Direction of a copy, by where its ends are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    HostToHost,
    HostToDevice,
    DeviceToHost,
    DeviceToDevice,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::HostToHost => "host_to_host",
            Self::HostToDevice => "host_to_device",
            Self::DeviceToHost => "device_to_host",
            Self::DeviceToDevice => "device_to_device",
        }
    }
}

impl Copy2d {
    fn rows(self) -> impl Iterator<Item = (Range, Range)> {
        (0..self.height).map(move |row| {
            let to = Range::new(self.to + row * self.to_pitch, self.width);
            (to, Range::new(self.from + row * self.from_pitch, self.width))
        })
    }

    /// Where it goes, checked against what the caller said.
    fn direction(self, m: &Machine, kind: i32) -> Result<Direction, Refusal> {
        let on_device = |address| matches!(m.memory.place(address), Place::Device(_) | Place::Dangling);
        let direction = match (on_device(self.from), on_device(self.to)) {
            (false, false) => Direction::HostToHost,
            (false, true) => Direction::HostToDevice,
            (true, false) => Direction::DeviceToHost,
            (true, true) => Direction::DeviceToDevice,
        };
        let said = match i64::from(kind) {
            ACL_MEMCPY_HOST_TO_HOST => Direction::HostToHost,
            ACL_MEMCPY_HOST_TO_DEVICE | ACL_MEMCPY_HOST_TO_BUF_TO_DEVICE => Direction::HostToDevice,
            ACL_MEMCPY_DEVICE_TO_HOST => Direction::DeviceToHost,
            ACL_MEMCPY_DEVICE_TO_DEVICE | ACL_MEMCPY_INNER_DEVICE_TO_DEVICE | ACL_MEMCPY_INTER_DEVICE_TO_DEVICE => {
                Direction::DeviceToDevice
            }
            ACL_MEMCPY_DEFAULT => direction,
            _ => return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemcpyKind {kind}")),
        };
        if said != direction {
            let (said, direction) = (said.name(), direction.name());
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "the kind says {said}, the addresses {direction}"));
        }
        Ok(direction)
    }

    /// Copies now. `host` gives the pointer of a range of host memory.
    fn run(
        self,
        direction: Direction,
        runtime: &mut Runtime,
        host: impl Fn(&Runtime, Range) -> Result<*mut u8, Fault>,
    ) -> Result<(), Fault> {
        for (to, from) in self.rows() {
            match direction {
                Direction::HostToHost => {
                    let (source, target) = (host(runtime, from)?, host(runtime, to)?);
                    // SAFETY: `host` vouches for both ranges; `copy` allows them to overlap.
                    unsafe { std::ptr::copy(source, target, to.len as usize) };
                }
                Direction::HostToDevice => {
                    let source = host(runtime, from)?;
                    let target = runtime.write(to)?;
                    // SAFETY: `host` vouches for the range, and device memory is no host memory, so they do not overlap.
                    unsafe { std::ptr::copy_nonoverlapping(source, target.as_mut_ptr(), target.len()) };
                }
                Direction::DeviceToHost => {
                    let target = host(runtime, to)?;
                    let source = runtime.read(from)?;
                    // SAFETY: as above, the other way.
                    unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target, source.len()) };
                }
                Direction::DeviceToDevice => {
                    let bytes = runtime.read(from)?.to_vec();
                    runtime.write(to)?.copy_from_slice(&bytes);
                }
            }
        }
        Ok(())
    }
}

fn count(m: &mut Machine, direction: Direction, copy: Copy2d) {
    let (copies, bytes) = m.counters.copies.entry(direction.name()).or_default();
    *copies += 1;
    *bytes += copy.width * copy.height;
}

/// A copy that is done when the call returns. It does not wait for streams.
fn copy_now(m: &mut Machine, copy: Copy2d, kind: i32) -> Result<(), Refusal> {
    let context = m.sound()?;
    m.refuse_while_capturing()?;
    let direction = copy.direction(m, kind)?;
    count(m, direction, copy);
    m.at_once(context, |runtime| copy.run(direction, runtime, |_, range| Ok(range.start as *mut u8)))
}

/// A copy that runs on a stream, so its host side must be page-locked.
fn copy_queued(m: &mut Machine, name: &'static str, copy: Copy2d, kind: i32, stream: u64) -> Result<(), Refusal> {
    m.sound()?;
    let stream = m.stream(stream)?;
    let direction = copy.direction(m, kind)?;
    if direction == Direction::HostToHost {
        return Err(refusal!(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "a queued copy from host to host"));
    }
    let pageable = [copy.to, copy.from].into_iter().find(|&address| m.memory.place(address) == Place::Pageable);
    if let Some(address) = pageable {
        m.refuse_while_capturing()?;
        return Err(refusal!(
            ACL_ERROR_RT_INVALID_HANDLE,
            "{address:#x} is host memory that aclrtMallocHost did not give"
        ));
    }
    let delay = m.settings.slow;
    let ranges = copy.rows().flat_map(|(to, from)| [to, from]).collect();
    let work = move |runtime: &mut Runtime| copy.run(direction, runtime, |runtime, range| runtime.memory.pinned(range));
    m.submit(stream, Task { name, ranges, delay, action: Action::Work(Arc::new(work)) })?;
    count(m, direction, copy);
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtMemcpy(to: *mut c_void, max: usize, from: *const c_void, bytes: usize, kind: i32) -> i32 {
    call("aclrtMemcpy", Needs::Init, |m| {
        room(max, bytes)?;
        copy_now(m, flat(to, from, bytes), kind)
    })
}

fn flat(to: *mut c_void, from: *const c_void, bytes: usize) -> Copy2d {
    Copy2d { to: to as u64, to_pitch: 0, from: from as u64, from_pitch: 0, width: bytes as u64, height: 1 }
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtMemcpyAsync(
    to: *mut c_void,
    max: usize,
    from: *const c_void,
    bytes: usize,
    kind: i32,
    stream: *mut c_void,
) -> i32 {
    call("aclrtMemcpyAsync", Needs::Init, |m| {
        room(max, bytes)?;
        copy_queued(m, "aclrtMemcpyAsync", flat(to, from, bytes), kind, handle(stream))
    })
}

fn rows(
    to: *mut c_void,
    to_pitch: usize,
    from: *const c_void,
    from_pitch: usize,
    width: usize,
    height: usize,
) -> Result<Copy2d, Refusal> {
    room(to_pitch.min(from_pitch), width)?;
    Ok(Copy2d {
        to: to as u64,
        to_pitch: to_pitch as u64,
        from: from as u64,
        from_pitch: from_pitch as u64,
        width: width as u64,
        height: height as u64,
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtMemcpy2d(
    to: *mut c_void,
    to_pitch: usize,
    from: *const c_void,
    from_pitch: usize,
    width: usize,
    height: usize,
    kind: i32,
) -> i32 {
    call("aclrtMemcpy2d", Needs::Init, |m| copy_now(m, rows(to, to_pitch, from, from_pitch, width, height)?, kind))
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtMemcpy2dAsync(
    to: *mut c_void,
    to_pitch: usize,
    from: *const c_void,
    from_pitch: usize,
    width: usize,
    height: usize,
    kind: i32,
    stream: *mut c_void,
) -> i32 {
    call("aclrtMemcpy2dAsync", Needs::Init, |m| {
        let copy = rows(to, to_pitch, from, from_pitch, width, height)?;
        copy_queued(m, "aclrtMemcpy2dAsync", copy, kind, handle(stream))
    })
}
