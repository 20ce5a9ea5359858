//! Start and stop, devices, contexts, facts about both.

use std::ffi::{c_char, c_void};

use crate::{
    array::{Chip, Refusal},
    constants::*,
    machine::{Context, Machine, Needs, call, call_waiting, refusal, set_current, take_message},
    meta::put,
    report::write_report,
    rt::{handle, timeout},
    stream::synchronize,
};

#[unsafe(no_mangle)]
pub extern "C" fn aclInit(_config: *const c_char) -> i32 {
    call("aclInit", Needs::Nothing, |m| {
        if m.settings.stub {
            return Err(refusal!(ACL_ERROR_COMPILING_STUB_MODE, "this is a library for linking, not for running"));
        }
        if std::mem::replace(&mut m.initialized, true) {
            return Err(refusal!(ACL_ERROR_REPEAT_INITIALIZE, "aclInit was called before"));
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclFinalize() -> i32 {
    call("aclFinalize", Needs::Nothing, |m| {
        write_report(m);
        match std::mem::replace(&mut m.initialized, false) {
            true => Ok(()),
            false => Err(refusal!(ACL_ERROR_REPEAT_FINALIZE, "aclFinalize without aclInit")),
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclFinalizeReference(count: *mut u64) -> i32 {
    let code = aclFinalize();
    // SAFETY: the C ABI has room for a count there, or null.
    if code == 0 && !count.is_null() && unsafe { put(count, 0) }.is_err() {
        return ACL_ERROR_RT_PARAM_INVALID as i32;
    }
    code
}

/// The lighter start of the operator library; both may be called.
#[unsafe(no_mangle)]
pub extern "C" fn aclnnInit(_config: *const c_char) -> i32 {
    call("aclnnInit", Needs::Nothing, |m| {
        m.initialized = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclnnFinalize() -> i32 {
    call("aclnnFinalize", Needs::Nothing, |m| {
        m.initialized = false;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclGetRecentErrMsg() -> *const c_char {
    take_message()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtGetDeviceCount(count: *mut u32) -> i32 {
    call("aclrtGetDeviceCount", Needs::Init, |m| {
        // SAFETY: the C ABI has room for a count there.
        unsafe { put(count, m.settings.devices) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtSetDevice(device: i32) -> i32 {
    call("aclrtSetDevice", Needs::Init, |m| {
        m.device(device.into())?.references += 1;
        if !m.contexts.contains(m.devices[device as usize].default_context) {
            m.devices[device as usize].default_context = m.create_context(device as u32);
        }
        set_current(m.devices[device as usize].default_context);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtGetDevice(device: *mut i32) -> i32 {
    call("aclrtGetDevice", Needs::Init, |m| {
        let current = m.current_device()?;
        // SAFETY: the C ABI has room for a number there.
        unsafe { put(device, current as i32) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtResetDevice(device: i32) -> i32 {
    call("aclrtResetDevice", Needs::Init, |m| {
        let references = m.device(device.into())?.references.saturating_sub(1);
        m.devices[device as usize].references = references;
        write_report(m);
        if references == 0 {
            release(m, device as u32);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtResetDeviceForce(device: i32) -> i32 {
    call("aclrtResetDeviceForce", Needs::Init, |m| {
        m.device(device.into())?.references = 0;
        write_report(m);
        release(m, device as u32);
        Ok(())
    })
}

/// Ends everything that a device holds: contexts, streams, events, memory.
fn release(m: &mut Machine, device: u32) {
    let gone: Vec<u64> = m.contexts.iter().filter(|(_, c)| c.device == device).map(|(handle, _)| handle).collect();
    for context in gone {
        drop_context(m, context);
    }
    m.memory.clear(device);
    m.devices[device as usize].used = 0;
}

fn drop_context(m: &mut Machine, context: u64) {
    m.streams.retain(|stream| stream.context != context);
    m.events.retain(|event| event.context != context);
    m.graphs.retain(|graph| graph.context != context);
    m.contexts.remove(context).expect("the caller found it");
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtSynchronizeDevice() -> i32 {
    synchronize_device("aclrtSynchronizeDevice", -1)
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtSynchronizeDeviceWithTimeout(milliseconds: i32) -> i32 {
    synchronize_device("aclrtSynchronizeDeviceWithTimeout", milliseconds)
}

fn synchronize_device(symbol: &'static str, milliseconds: i32) -> i32 {
    call_waiting(symbol, Needs::Init, |mut guard| {
        guard.sound()?;
        let device = guard.current_device()?;
        let of_device = |context: u64| guard.contexts.get(context).is_ok_and(|c| c.device == device);
        let streams = guard.streams.iter().filter(|(_, stream)| of_device(stream.context));
        let targets: Vec<_> = streams.map(|(handle, stream)| (handle, stream.submitted)).collect();
        for &(stream, _) in &targets {
            guard.refuse_captured(stream)?;
        }
        synchronize(guard, &targets, timeout(milliseconds), ACL_ERROR_RT_WAIT_TIMEOUT)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtCreateContext(context: *mut *mut c_void, device: i32) -> i32 {
    call("aclrtCreateContext", Needs::Init, |m| {
        m.device(device.into())?;
        let made = m.create_context(device as u32);
        set_current(made);
        // SAFETY: the C ABI has room for a pointer there.
        unsafe { put(context, made as *mut c_void) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtDestroyContext(context: *mut c_void) -> i32 {
    call("aclrtDestroyContext", Needs::Init, |m| {
        m.contexts.get(handle(context))?;
        if m.devices.iter().any(|device| device.default_context == handle(context)) {
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "a device's default context ends with aclrtResetDevice"));
        }
        drop_context(m, handle(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtSetCurrentContext(context: *mut c_void) -> i32 {
    call("aclrtSetCurrentContext", Needs::Init, |m| {
        m.contexts.get(handle(context))?;
        set_current(handle(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtGetCurrentContext(context: *mut *mut c_void) -> i32 {
    call("aclrtGetCurrentContext", Needs::Init, |m| {
        let current = m.current()?;
        // SAFETY: the C ABI has room for a pointer there.
        unsafe { put(context, current as *mut c_void) }
    })
}

/// Levels of determinism are accepted up to 3, and change nothing: the simulator is deterministic unless `perturb` is set.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtCtxSetSysParamOpt(option: i32, value: i64) -> i32 {
    call("aclrtCtxSetSysParamOpt", Needs::Init, |m| {
        let context: &mut Context = { m.contexts.get_mut(m.current()?)? };
        match (i64::from(option), value) {
            (ACL_OPT_DETERMINISTIC, 0..=3) => context.determinism = value,
            (ACL_OPT_ENABLE_DEBUG_KERNEL | ACL_OPT_STRONG_CONSISTENCY, 0..=1) => {}
            _ => return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "option {option} with value {value}")),
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtGetSocName() -> *const c_char {
    let mut name = std::ptr::null();
    call("aclrtGetSocName", Needs::Init, |m| {
        m.device(0)?;
        name = m.settings.soc.as_ptr();
        Ok(())
    });
    name
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtGetRunMode(mode: *mut i32) -> i32 {
    call("aclrtGetRunMode", Needs::Init, |_| {
        // SAFETY: the C ABI has room for an enum there.
        unsafe { put(mode, ACL_HOST as i32) }
    })
}

/// Cores of the cube and of the vectors, and bytes of L2, as a chip of the kind has them.
fn cores(chip: Chip) -> (i64, i64, i64) {
    match chip {
        Chip::A2 | Chip::A3 => (24, 48, 192 << 20),
        Chip::P310 => (8, 8, 16 << 20),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclGetDeviceCapability(device: u32, info: i32, value: *mut i64) -> i32 {
    call("aclGetDeviceCapability", Needs::Init, |m| {
        m.device(device.into())?;
        let (cube, vector, l2) = cores(m.settings.chip());
        let answer = match i64::from(info) {
            ACL_DEVICE_INFO_AI_CORE_NUM => cube,
            ACL_DEVICE_INFO_VECTOR_CORE_NUM => vector,
            ACL_DEVICE_INFO_L2_SIZE => l2,
            _ => return Err(refusal!(ACL_ERROR_INVALID_PARAM, "aclDeviceInfo {info}")),
        };
        // SAFETY: the C ABI has room for a number there.
        unsafe { put(value, answer) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtGetDeviceInfo(device: u32, attribute: i32, value: *mut i64) -> i32 {
    call("aclrtGetDeviceInfo", Needs::Init, |m| {
        m.device(device.into())?;
        let (cube, vector, l2) = cores(m.settings.chip());
        let answer = match i64::from(attribute) {
            ACL_DEV_ATTR_AICORE_CORE_NUM | ACL_DEV_ATTR_CUBE_CORE_NUM => cube,
            ACL_DEV_ATTR_VECTOR_CORE_NUM => vector,
            ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE => m.settings.memory as i64,
            ACL_DEV_ATTR_L2_CACHE_SIZE => l2,
            _ => return Err(refusal!(ACL_ERROR_INVALID_PARAM, "aclrtDevAttr {attribute}")),
        };
        // SAFETY: the C ABI has room for a number there.
        unsafe { put(value, answer) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclGetCannAttribute(attribute: i32, value: *mut i32) -> i32 {
    call("aclGetCannAttribute", Needs::Init, |m| {
        let modern = i32::from(m.settings.chip() != Chip::P310);
        let answer = match i64::from(attribute) {
            ACL_CANN_ATTR_INF_NAN | ACL_CANN_ATTR_BF16 => modern,
            ACL_CANN_ATTR_JIT_COMPILE => 0,
            _ => return Err(refusal!(ACL_ERROR_INVALID_PARAM, "aclCannAttr {attribute}")),
        };
        // SAFETY: the C ABI has room for a number there.
        unsafe { put(value, answer) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtGetVersion(major: *mut i32, minor: *mut i32, patch: *mut i32) -> i32 {
    call("aclrtGetVersion", Needs::Nothing, |_| {
        // SAFETY: the C ABI has room for a number at each.
        unsafe { put(major, 1).and(put(minor, 14)).and(put(patch, 0)) }
    })
}

/// The version of a package of the toolkit; all have the one that was set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclsysGetVersionStr(package: *const c_char, version: *mut c_char) -> i32 {
    call("aclsysGetVersionStr", Needs::Nothing, |m| {
        if package.is_null() || version.is_null() {
            return Err(refusal!(ACL_ERROR_INVALID_PARAM, "package or version is null"));
        }
        let text = m.settings.version.to_bytes_with_nul();
        // SAFETY: the C ABI has room for 128 characters, which the setting does not exceed.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), version, text.len()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtDeviceCanAccessPeer(can: *mut i32, device: i32, peer: i32) -> i32 {
    call("aclrtDeviceCanAccessPeer", Needs::Init, |m| {
        m.device(device.into())?;
        m.device(peer.into())?;
        // SAFETY: the C ABI has room for a number there.
        unsafe { put(can, i32::from(device != peer)) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclrtDeviceEnablePeerAccess(peer: i32, flags: u32) -> i32 {
    call("aclrtDeviceEnablePeerAccess", Needs::Init, |m| {
        if flags != 0 {
            return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "flags {flags}: must be 0"));
        }
        m.device(peer.into())?;
        let device = m.current_device()?;
        m.device(device.into())?.peers.push(peer as u32);
        Ok::<(), Refusal>(())
    })
}
