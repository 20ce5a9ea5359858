//! The driver itself, devices, and their primary contexts.

use std::ffi::{CStr, c_char};

use crate::{
    codes::{attribute::*, cuda},
    machine::{Context, Fail, Machine, call, fail, lock, notify, put, set_current, waiting},
    report,
    stream::{Stream, synchronize},
};

/// Largest grids; the first dimension may be larger than the others.
pub const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];
pub const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
pub const MAX_THREADS: u32 = 1024;

/// Bytes of shared memory of a multiprocessor, by compute capability.
pub fn shared_memory(cc: u32) -> u32 {
    match cc {
        80 | 87 => 164 << 10,
        86 | 89 | 120 => 100 << 10,
        75 => 64 << 10,
        _ => 228 << 10,
    }
}

/// Bytes of shared memory that a block can ask for: all but what the system keeps for itself.
pub fn shared_memory_of_block(cc: u32) -> u32 {
    shared_memory(cc) - RESERVED
}

/// Bytes of shared memory that each block costs beside its own.
pub const RESERVED: u32 = 1 << 10;

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: u32) -> i32 {
    let mut m = lock();
    let result = m.enter("cuInit").and_then(|_| match (flags, m.settings.devices) {
        (0, 0) => Err(fail!(cuda::NO_DEVICE, "no devices")),
        (0, _) => Ok(()),
        _ => Err(fail!(cuda::INVALID_VALUE, "flags {flags}")),
    });
    m.initialized |= result.is_ok();
    m.answer("cuInit", result)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDriverGetVersion(version: *mut i32) -> i32 {
    let mut m = lock();
    let driver = m.settings.driver;
    let result = m.enter("cuDriverGetVersion").and_then(|_| put(version, driver));
    m.answer("cuDriverGetVersion", result)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(error: i32, text: *mut *const c_char) -> i32 {
    describe(error, text)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorString(error: i32, text: *mut *const c_char) -> i32 {
    describe(error, text)
}

fn describe(error: i32, text: *mut *const c_char) -> i32 {
    let name = cuda::name(error);
    match put(text, name.map_or(std::ptr::null(), CStr::as_ptr)) {
        Ok(()) if name.is_some() => cuda::SUCCESS,
        _ => cuda::INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetCount(count: *mut i32) -> i32 {
    call("cuDeviceGetCount", |m| put(count, m.settings.devices as i32))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(device: *mut i32, ordinal: i32) -> i32 {
    call("cuDeviceGet", |m| {
        m.device(ordinal)?;
        put(device, ordinal)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetName(name: *mut c_char, len: i32, device: i32) -> i32 {
    call("cuDeviceGetName", |m| {
        m.device(device)?;
        let text = format!("Simulated GPU {}.{}\0", m.settings.cc / 10, m.settings.cc % 10);
        if len < text.len() as i32 {
            return Err(fail!(cuda::INVALID_VALUE, "{len} bytes for a name of {}", text.len()));
        }
        text.bytes().enumerate().try_for_each(|(i, byte)| put(name.wrapping_add(i), byte as c_char))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetAttribute(value: *mut i32, attribute: i32, device: i32) -> i32 {
    call("cuDeviceGetAttribute", |m| {
        m.device(device)?;
        let cc = m.settings.cc;
        let known = match attribute {
            MAX_THREADS_PER_BLOCK => MAX_THREADS,
            MAX_BLOCK_DIM_X => MAX_BLOCK[0],
            MAX_BLOCK_DIM_Y => MAX_BLOCK[1],
            MAX_BLOCK_DIM_Z => MAX_BLOCK[2],
            MAX_GRID_DIM_X => MAX_GRID[0],
            MAX_GRID_DIM_Y => MAX_GRID[1],
            MAX_GRID_DIM_Z => MAX_GRID[2],
            MAX_SHARED_MEMORY_PER_BLOCK => 48 << 10,
            WARP_SIZE => 32,
            CLOCK_RATE => 1_980_000,
            MULTIPROCESSOR_COUNT => m.settings.sms,
            INTEGRATED | COMPUTE_MODE => 0,
            ECC_ENABLED | UNIFIED_ADDRESSING => 1,
            MEMORY_CLOCK_RATE => 3_201_000,
            GLOBAL_MEMORY_BUS_WIDTH => 6144,
            L2_CACHE_SIZE => 50 << 20,
            MAX_THREADS_PER_MULTIPROCESSOR => 2048,
            COMPUTE_CAPABILITY_MAJOR => cc / 10,
            COMPUTE_CAPABILITY_MINOR => cc % 10,
            MAX_SHARED_MEMORY_PER_MULTIPROCESSOR => shared_memory(cc),
            MAX_REGISTERS_PER_MULTIPROCESSOR => 65536,
            MAX_SHARED_MEMORY_PER_BLOCK_OPTIN => shared_memory_of_block(cc),
            MAX_BLOCKS_PER_MULTIPROCESSOR => 32,
            RESERVED_SHARED_MEMORY_PER_BLOCK => RESERVED,
            _ => return Err(fail!(cuda::INVALID_VALUE, "the device's attribute {attribute} is not simulated")),
        };
        put(value, known as i32)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(context: *mut u64, device: i32) -> i32 {
    call("cuDevicePrimaryCtxRetain", |m| {
        let (existing, fault) = m.device(device).map(|d| (d.context, d.fault))?;
        let handle = existing.unwrap_or_else(|| {
            let made = m.contexts.insert(Context { device: device as u32, default_stream: 0, fault });
            m.contexts.get_mut(made).expect("made just now").default_stream = m.streams.insert(Stream::new(made, 0));
            made
        });
        let device = m.device(device)?;
        device.context = Some(handle);
        device.retained += 1;
        put(context, handle)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> i32 {
    call("cuDevicePrimaryCtxRelease_v2", |m| {
        let held = m.device(device)?;
        if held.retained == 0 {
            return Err(fail!(cuda::INVALID_CONTEXT, "the primary context was not retained"));
        }
        held.retained -= 1;
        if held.retained == 0 {
            m.destroy_context(device)?;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxReset_v2(device: i32) -> i32 {
    call("cuDevicePrimaryCtxReset_v2", |m| m.destroy_context(device))
}

impl Machine {
    /// Ends a device's context with all that belongs to it. What was queued does not run.
    fn destroy_context(&mut self, device: i32) -> Result<(), Fail> {
        let Some(context) = self.device(device)?.context.take() else { return Ok(()) };
        self.device(device)?.used = 0;
        report::write(self);
        self.contexts.remove(context)?;
        self.streams.retain(|s| s.context != context);
        self.events.retain(|e| e.context != context);
        self.modules.retain(|module| module.context != context);
        self.functions.retain(|function| function.context != context);
        self.graphs.retain(|graph| graph.context != context);
        self.execs.retain(|graph| graph.context != context);
        self.memory.clear(device as u32);
        // Whoever waits for what does not run any more.
        notify();
        Ok(())
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: u64) -> i32 {
    call("cuCtxSetCurrent", |m| {
        if context != 0 {
            m.contexts.get(context)?;
        }
        set_current(context);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> i32 {
    waiting("cuCtxSynchronize", |mut guard, context, _| {
        let capturing = guard.streams.iter_mut().filter(|(_, s)| s.context == context);
        let captures = capturing.filter_map(|(_, s)| s.capture.as_mut()).map(|capture| capture.broken = true).count();
        if captures > 0 {
            return (guard, Err(fail!(cuda::STREAM_CAPTURE_UNSUPPORTED, "a synchronise during a capture")));
        }
        let streams = guard.all_streams(context);
        synchronize(guard, &streams)
    })
}
