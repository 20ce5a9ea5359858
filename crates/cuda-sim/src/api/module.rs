//! Modules, functions and launches.

use std::{
    ffi::{CStr, c_char, c_void},
    sync::Arc,
};

use super::context::{MAX_BLOCK, MAX_GRID, MAX_THREADS, shared_memory_of_block};
use crate::{
    codes::{cuda, function::*},
    control::Effect,
    emulator::Launch,
    machine::{Fail, Guard, Machine, fail, in_context, outside_capture, put, waiting},
    module,
    stream::Task,
};

/// # Safety
/// `image` is what the compiler gave.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(handle: *mut u64, image: *const u8) -> i32 {
    outside_capture("cuModuleLoadData", |m, context| {
        if image.is_null() {
            return Err(fail!(cuda::INVALID_VALUE, "no image"));
        }
        // SAFETY: as the caller promises.
        let library = unsafe { module::load(image, m.settings.cc) }?;
        put(handle, m.load_module(context, library))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(handle: u64) -> i32 {
    outside_capture("cuModuleUnload", |m, _| m.unload(handle))
}

/// # Safety
/// `name` ends in zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(function: *mut u64, module: u64, name: *const c_char) -> i32 {
    in_context("cuModuleGetFunction", |m, _| {
        // SAFETY: as the caller promises.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        put(function, m.function(module, &name)?)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: u64, attribute: i32, value: i32) -> i32 {
    in_context("cuFuncSetAttribute", |m, _| {
        let most = shared_memory_of_block(m.settings.cc);
        let function = m.functions.get_mut(function)?;
        match attribute {
            MAX_DYNAMIC_SHARED_SIZE_BYTES if value >= 0 && value as u32 <= most => {
                function.dynamic_shared = value as u32
            }
            MAX_DYNAMIC_SHARED_SIZE_BYTES => {
                return Err(fail!(cuda::INVALID_VALUE, "{value} bytes of shared memory: a block has at most {most}"));
            }
            PREFERRED_SHARED_MEMORY_CARVEOUT if (-1..=100).contains(&value) => {}
            _ => return Err(fail!(cuda::INVALID_VALUE, "the function's attribute {attribute} = {value}")),
        }
        Ok(())
    })
}

/// What the host's compiler does not tell is what a small kernel has.
#[unsafe(no_mangle)]
pub extern "C" fn cuFuncGetAttribute(value: *mut i32, attribute: i32, function: u64) -> i32 {
    in_context("cuFuncGetAttribute", |m, _| {
        let cc = m.settings.cc as i32;
        let dynamic = m.functions.get(function)?.dynamic_shared as i32;
        let known = match attribute {
            MAX_THREADS_PER_BLOCK => MAX_THREADS as i32,
            SHARED_SIZE_BYTES | CONST_SIZE_BYTES | LOCAL_SIZE_BYTES | CACHE_MODE_CA => 0,
            NUM_REGS => 64,
            PTX_VERSION | BINARY_VERSION => cc,
            MAX_DYNAMIC_SHARED_SIZE_BYTES => dynamic,
            PREFERRED_SHARED_MEMORY_CARVEOUT => -1,
            _ => return Err(fail!(cuda::INVALID_VALUE, "the function's attribute {attribute}")),
        };
        put(value, known)
    })
}

/// # Safety
/// `parameters` points to as many pointers to arguments as the kernel has parameters.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: u64,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    shared: u32,
    stream: u64,
    parameters: *const *const c_void,
    extra: *const *const c_void,
) -> i32 {
    waiting("cuLaunchKernel", |mut guard, context, effect| {
        let launched = (|m: &mut Guard| {
            let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
            let stream = m.target(context, stream)?;
            m.check_launch(context, function, grid, block, shared)?;
            if !extra.is_null() {
                return Err(fail!(cuda::INVALID_VALUE, "arguments by `extra` are not simulated"));
            }
            // SAFETY: as the caller promises.
            let arguments = unsafe { m.arguments(function, parameters) }?;
            if let Some(Effect::Run(code)) = effect {
                return m.submit(stream, Task::Fault(fail!(code, "a fault that was asked for"))).map(drop);
            }
            let found = m.functions.get(function)?;
            let (library, kernel) = (Arc::clone(&found.library), found.kernel);
            let launch = Launch { function, library, kernel, grid, block, shared, arguments };
            m.submit(stream, Task::Launch(Arc::new(launch))).map(drop)
        })(&mut guard);
        (guard, launched)
    })
}

impl Machine {
    fn check_launch(
        &self,
        context: u64,
        function: u64,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
    ) -> Result<(), Fail> {
        let found = self.functions.get(function)?;
        if found.context != context {
            return Err(fail!(cuda::INVALID_HANDLE, "the function belongs to another context than the thread's"));
        }
        let name = found.library.name(found.kernel);
        let within =
            |size: &[u32; 3], most: &[u32; 3]| size.iter().zip(most).all(|(size, most)| (1..=*most).contains(size));
        if !within(&grid, &MAX_GRID) {
            return Err(fail!(cuda::INVALID_VALUE, "{name}: a grid of {grid:?} blocks"));
        }
        if !within(&block, &MAX_BLOCK) || block.iter().product::<u32>() > MAX_THREADS {
            return Err(fail!(cuda::INVALID_VALUE, "{name}: a block of {block:?} threads"));
        }
        if shared > found.dynamic_shared {
            let most = found.dynamic_shared;
            return Err(fail!(cuda::INVALID_VALUE, "{name}: {shared} bytes of shared memory, allowed are {most}"));
        }
        Ok(())
    }

    /// # Safety
    /// As of [`cuLaunchKernel`].
    unsafe fn arguments(&self, function: u64, parameters: *const *const c_void) -> Result<Vec<Box<[u128]>>, Fail> {
        let found = self.functions.get(function)?;
        let sizes = found.library.parameters(found.kernel);
        let copy = |(i, &bytes): (usize, &u32)| {
            let mut words = vec![0u128; (bytes as usize).div_ceil(16)].into_boxed_slice();
            // SAFETY: as the caller promises, the pointer is there and so are the parameter's bytes.
            unsafe {
                let from = *parameters.add(i);
                std::ptr::copy_nonoverlapping(from.cast::<u8>(), words.as_mut_ptr().cast(), bytes as usize);
            }
            words
        };
        if parameters.is_null() && !sizes.is_empty() {
            return Err(fail!(cuda::INVALID_VALUE, "{}: no arguments", found.library.name(found.kernel)));
        }
        Ok(sizes.iter().enumerate().map(copy).collect())
    }
}
