//! Allocation and fills.

use std::{ffi::c_void, sync::Arc};

use crate::{
    array::{Fault, Refusal},
    constants::*,
    machine::{Machine, Needs, call, refusal},
    memory::{Memory, Range},
    meta::put,
    rt::{handle, room},
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
