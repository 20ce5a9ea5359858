//! Device memory and page-locked memory: allocation, and what is free.

use crate::{
    codes::cuda,
    machine::{Fail, Machine, fail, in_context, outside_capture, put, waiting},
    stream::synchronize,
};

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> i32 {
    in_context("cuMemGetInfo_v2", |m, context| {
        let device = m.contexts.get(context)?.device as usize;
        put(free, m.settings.memory.saturating_sub(m.devices[device].used) as usize)?;
        put(total, m.settings.memory as usize)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> i32 {
    outside_capture("cuMemAlloc_v2", |m, context| {
        if bytes == 0 {
            return Err(fail!(cuda::INVALID_VALUE, "no bytes"));
        }
        let device = m.contexts.get(context)?.device;
        m.take(device, bytes as u64)?;
        match m.memory.allocate(device, bytes as u64) {
            Some(block) => put(address, block),
            None => {
                m.devices[device as usize].used -= bytes as u64;
                Err(fail!(cuda::OUT_OF_MEMORY, "{bytes} bytes: no addresses are left"))
            }
        }
    })
}

/// Waits for the device: tasks that use the block have run.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> i32 {
    waiting("cuMemFree_v2", |mut guard, context, _| {
        if let Err(failure) = guard.refuse_in_capture("cuMemFree_v2") {
            return (guard, Err(failure));
        }
        if address == 0 {
            return (guard, Ok(()));
        }
        let streams = guard.all_streams(context);
        let (mut guard, result) = synchronize(guard, &streams);
        let result = result.and_then(|()| guard.free(address));
        (guard, result)
    })
}

impl Machine {
    fn free(&mut self, address: u64) -> Result<(), Fail> {
        let (device, bytes) = self.memory.free(address)?;
        self.devices[device as usize].used -= bytes;
        Ok(())
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostAlloc(address: *mut u64, bytes: usize, _flags: u32) -> i32 {
    outside_capture("cuMemHostAlloc", |m, _| allocate_pinned(m, address, bytes))
}

fn allocate_pinned(m: &mut Machine, address: *mut u64, bytes: usize) -> Result<(), Fail> {
    if bytes == 0 {
        return Err(fail!(cuda::INVALID_VALUE, "no bytes"));
    }
    let block = m.memory.allocate_pinned(bytes as u64);
    put(address, block.ok_or_else(|| fail!(cuda::OUT_OF_MEMORY, "{bytes} bytes of page-locked memory"))?)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(address: u64) -> i32 {
    outside_capture("cuMemFreeHost", |m, _| m.memory.free_pinned(address))
}
