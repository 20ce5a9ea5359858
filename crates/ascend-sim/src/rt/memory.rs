//! Allocation, copies, fills.

use std::{ffi::c_void, sync::Arc};

use crate::{
    array::{Fault, Refusal},
    constants::*,
    machine::{Machine, Needs, call, refusal},
    memory::{Memory, Place, Range},
    meta::put,
    rt::handle,
    runtime::Runtime,
    stream::{Action, Task},
};

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtMalloc(address: *mut *mut c_void, size: usize, _policy: i32) -> i32 {
    call("aclrtMalloc", Needs::Init, |m| {
        let block = allocate(m, size as u64)?;
        // SAFETY: the C ABI has room for a pointer there.
        unsafe { put(address, block as *mut c_void) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtMallocAlign32(address: *mut *mut c_void, size: usize, _policy: i32) -> i32 {
    call("aclrtMallocAlign32", Needs::Init, |m| {
        let block = allocate(m, size as u64)?;
        // SAFETY: the C ABI has room for a pointer there.
        unsafe { put(address, block as *mut c_void) }
    })
}

fn allocate(m: &mut Machine, size: u64) -> Result<u64, Refusal> {
    m.sound()?;
    let device = m.current_device()?;
    if size == 0 {
        return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "zero bytes"));
    }
    let (budget, footprint) = (m.settings.memory, Memory::footprint(size));
    let state = &mut m.devices[device as usize];
    let used = state.used.saturating_add(footprint);
    let out = || refusal!(ACL_ERROR_RT_MEMORY_ALLOCATION, "{size} bytes: {} of {budget} are in use", used - footprint);
    if used > budget {
        return Err(out());
    }
    let address = m.memory.allocate(device, size).ok_or_else(out)?;
    state.used = used;
    state.peak = state.peak.max(used);
    Ok(address)
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtFree(address: *mut c_void) -> i32 {
    call("aclrtFree", Needs::Init, |m| free(m, handle(address)))
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtFreeWithDevSync(address: *mut c_void) -> i32 {
    let code = super::device::aclrtSynchronizeDevice();
    if code != 0 { code } else { call("aclrtFreeWithDevSync", Needs::Init, |m| free(m, handle(address))) }
}

fn free(m: &mut Machine, address: u64) -> Result<(), Refusal> {
    m.current()?;
    if address == 0 {
        return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "the address is null"));
    }
    if let Some(user) = m.memory.block(address).and_then(|range| m.queued_user(range)) {
        m.violation(format!("aclrtFree: a queued {user} uses the memory"));
    }
    let freed = m.memory.free(address);
    let (device, size) = freed.map_err(|text| {
        m.violation(format!("aclrtFree: {text}"));
        refusal!(ACL_ERROR_RT_PARAM_INVALID, "{text}")
    })?;
    m.devices[device as usize].used -= Memory::footprint(size);
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtMallocHost(address: *mut *mut c_void, size: usize) -> i32 {
    call("aclrtMallocHost", Needs::Init, |m| {
        m.current()?;
        if size == 0 {
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "zero bytes"));
        }
        let block = m.memory.allocate_pinned(size as u64);
        let block = block.ok_or_else(|| refusal!(ACL_ERROR_BAD_ALLOC, "{size} bytes of host memory"))?;
        // SAFETY: the C ABI has room for a pointer there.
        unsafe { put(address, block as *mut c_void) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtFreeHost(address: *mut c_void) -> i32 {
    call("aclrtFreeHost", Needs::Init, |m| {
        if let Some(user) = m.memory.pinned_block(handle(address)).and_then(|range| m.queued_user(range)) {
            m.violation(format!("aclrtFreeHost: a queued {user} uses the memory"));
        }
        m.memory.free_pinned(handle(address)).map_err(|text| {
            m.violation(format!("aclrtFreeHost: {text}"));
            refusal!(ACL_ERROR_RT_PARAM_INVALID, "{text}")
        })
    })
}

/// Any attribute of memory that a chip has answers with the whole budget; chips without HBM answer for DDR.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtGetMemInfo(attribute: i32, free: *mut usize, total: *mut usize) -> i32 {
    call("aclrtGetMemInfo", Needs::Init, |m| {
        let device = m.current_device()?;
        if !(ACL_DDR_MEM..=17).contains(&attribute.into()) {
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemAttr {attribute}"));
        }
        let (budget, used) = (m.settings.memory, m.devices[device as usize].used);
        // SAFETY: the C ABI has room for a number at both.
        unsafe { put(free, budget.saturating_sub(used) as usize).and(put(total, budget as usize)) }
    })
}

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

fn room(room: usize, wanted: usize) -> Result<(), Refusal> {
    if room < wanted {
        return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "{wanted} bytes into room for {room}"));
    }
    Ok(())
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
#[expect(clippy::too_many_arguments, reason = "the C ABI has as many")]
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

#[unsafe(no_mangle)]
pub extern "C" fn aclrtMemset(to: *mut c_void, max: usize, value: i32, bytes: usize) -> i32 {
    call("aclrtMemset", Needs::Init, |m| {
        let context = m.sound()?;
        m.refuse_while_capturing()?;
        room(max, bytes)?;
        m.at_once(context, fill(to, value, bytes))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtMemsetAsync(to: *mut c_void, max: usize, value: i32, bytes: usize, stream: *mut c_void) -> i32 {
    call("aclrtMemsetAsync", Needs::Init, |m| {
        room(max, bytes)?;
        let stream = m.stream(handle(stream))?;
        let ranges = vec![Range::new(to as u64, bytes as u64)];
        let action = Action::Work(Arc::new(fill(to, value, bytes)));
        m.submit(stream, Task { ranges, ..Task::plain("aclrtMemsetAsync", action) }).map(drop)
    })
}

fn fill(to: *mut c_void, value: i32, bytes: usize) -> impl Fn(&mut Runtime) -> Result<(), Fault> + Send + Sync {
    let range = Range::new(to as u64, bytes as u64);
    move |runtime| {
        runtime.write(range)?.fill(value as u8);
        Ok(())
    }
}
