//! The run-time compiler. It needs no driver and no device.

use std::{
    ffi::{CStr, CString, c_char},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

use crate::{
    codes::nvrtc,
    compiler::{Source, compile, target},
    emulator::lowered_name,
    machine::put,
    module::image,
    table::{Kind, Table},
};

struct Program {
    source: Source,
    /// Names of the expressions, once compiled.
    lowered: Vec<CString>,
    image: Option<Vec<u8>>,
    /// Whether the image is machine code.
    exact: bool,
    log: String,
}

static PROGRAMS: LazyLock<Mutex<Table<Program>>> = LazyLock::new(|| Mutex::new(Table::new(Kind::Program)));

fn programs() -> MutexGuard<'static, Table<Program>> {
    PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Programs that were not destroyed.
pub fn live() -> usize {
    programs().len()
}

/// Runs `body` on a program; a code of its own is returned.
fn with(program: u64, body: impl FnOnce(&mut Program) -> Result<(), i32>) -> i32 {
    match programs().get_mut(program) {
        Ok(program) => body(program).err().unwrap_or(nvrtc::SUCCESS),
        Err(_) => nvrtc::INVALID_PROGRAM,
    }
}

fn give<T>(out: *mut T, value: T) -> Result<(), i32> {
    put(out, value).map_err(|_| nvrtc::INVALID_INPUT)
}

/// # Safety
/// The text ends in zero.
unsafe fn text(text: *const c_char) -> String {
    // SAFETY: as the caller promises.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcVersion(major: *mut i32, minor: *mut i32) -> i32 {
    give(major, 13).and_then(|()| give(minor, 0)).err().unwrap_or(nvrtc::SUCCESS)
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetErrorString(result: i32) -> *const c_char {
    let name = match result {
        nvrtc::SUCCESS => c"NVRTC_SUCCESS",
        nvrtc::INVALID_INPUT => c"NVRTC_ERROR_INVALID_INPUT",
        nvrtc::INVALID_PROGRAM => c"NVRTC_ERROR_INVALID_PROGRAM",
        nvrtc::INVALID_OPTION => c"NVRTC_ERROR_INVALID_OPTION",
        nvrtc::COMPILATION => c"NVRTC_ERROR_COMPILATION",
        nvrtc::NO_NAME_EXPRESSIONS_AFTER_COMPILATION => c"NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION",
        nvrtc::NO_LOWERED_NAMES_BEFORE_COMPILATION => c"NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION",
        nvrtc::NAME_EXPRESSION_NOT_VALID => c"NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID",
        nvrtc::INTERNAL_ERROR => c"NVRTC_ERROR_INTERNAL_ERROR",
        _ => c"NVRTC_ERROR unknown",
    };
    name.as_ptr()
}

/// # Safety
/// Texts end in zero, and there are as many headers and names as is said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut u64,
    source: *const c_char,
    name: *const c_char,
    header_count: i32,
    headers: *const *const c_char,
    include_names: *const *const c_char,
) -> i32 {
    if source.is_null() || header_count < 0 {
        return nvrtc::INVALID_INPUT;
    }
    // SAFETY: as the caller promises.
    let source = unsafe {
        let header = |i: usize| (text(*include_names.add(i)), text(*headers.add(i)));
        Source {
            text: text(source),
            name: if name.is_null() { "default_program".to_owned() } else { text(name) },
            headers: (0..header_count as usize).map(header).collect(),
            expressions: Vec::new(),
        }
    };
    let made = Program { source, lowered: Vec::new(), image: None, exact: false, log: String::new() };
    let handle = programs().insert(made);
    give(program, handle).err().unwrap_or(nvrtc::SUCCESS)
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcDestroyProgram(program: *mut u64) -> i32 {
    if program.is_null() {
        return nvrtc::INVALID_PROGRAM;
    }
    // SAFETY: not null, so the caller's handle.
    let handle = unsafe { *program };
    match programs().remove(handle) {
        Ok(_) => give(program, 0).err().unwrap_or(nvrtc::SUCCESS),
        Err(_) => nvrtc::INVALID_PROGRAM,
    }
}

/// # Safety
/// The expression ends in zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcAddNameExpression(program: u64, expression: *const c_char) -> i32 {
    // SAFETY: as the caller promises.
    let expression = unsafe { text(expression) };
    with(program, |program| {
        if program.image.is_some() {
            return Err(nvrtc::NO_NAME_EXPRESSIONS_AFTER_COMPILATION);
        }
        program.source.expressions.push(expression);
        Ok(())
    })
}

/// # Safety
/// There are as many options as is said, and they end in zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCompileProgram(handle: u64, count: i32, options: *const *const c_char) -> i32 {
    // SAFETY: as the caller promises.
    let options: Vec<String> = (0..count.max(0) as usize).map(|i| unsafe { text(*options.add(i)) }).collect();
    let target = match target(&options) {
        Ok(target) => target,
        Err(log) => {
            return with(handle, |program| {
                program.log = log;
                Err(nvrtc::INVALID_OPTION)
            });
        }
    };
    // Others may compile meanwhile: the program is out of the table's lock while the host's compiler runs.
    let source = match programs().get_mut(handle) {
        Ok(program) => program.source.clone(),
        Err(_) => return nvrtc::INVALID_PROGRAM,
    };
    let compiled = compile(&source, &target);
    with(handle, |program| {
        let library = compiled.map_err(|log| {
            program.log = log;
            nvrtc::COMPILATION
        })?;
        let lowered = source.expressions.iter().enumerate().map(|(i, e)| CString::new(lowered_name(i, e)));
        program.lowered = lowered.map(|name| name.expect("letters, digits and lines")).collect();
        program.image = Some(image(&library, target.arch, target.exact));
        program.exact = target.exact;
        program.log.clear();
        Ok(())
    })
}

/// The name is valid until the program is destroyed.
///
/// # Safety
/// The expression ends in zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetLoweredName(program: u64, expression: *const c_char, name: *mut *const c_char) -> i32 {
    // SAFETY: as the caller promises.
    let expression = unsafe { text(expression) };
    with(program, |program| {
        if program.image.is_none() {
            return Err(nvrtc::NO_LOWERED_NAMES_BEFORE_COMPILATION);
        }
        let known = program.source.expressions.iter().position(|e| *e == expression);
        give(name, program.lowered[known.ok_or(nvrtc::NAME_EXPRESSION_NOT_VALID)?].as_ptr())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetProgramLogSize(program: u64, size: *mut usize) -> i32 {
    with(program, |program| give(size, program.log.len() + 1))
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetProgramLog(program: u64, log: *mut c_char) -> i32 {
    with(program, |program| {
        copy_out(log, program.log.as_bytes()).and_then(|()| give(log.wrapping_add(program.log.len()), 0))
    })
}

/// None for portable code.
#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetCUBINSize(program: u64, size: *mut usize) -> i32 {
    with(program, |program| give(size, program.cubin()?.len()))
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetCUBIN(program: u64, out: *mut c_char) -> i32 {
    with(program, |program| copy_out(out, program.cubin()?))
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetPTXSize(program: u64, size: *mut usize) -> i32 {
    with(program, |program| give(size, program.compiled()?.len()))
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetPTX(program: u64, out: *mut c_char) -> i32 {
    with(program, |program| copy_out(out, program.compiled()?))
}

impl Program {
    fn compiled(&self) -> Result<&[u8], i32> {
        self.image.as_deref().ok_or(nvrtc::INVALID_PROGRAM)
    }

    fn cubin(&self) -> Result<&[u8], i32> {
        self.compiled().map(|image| if self.exact { image } else { &[] })
    }
}

/// To a caller that asked for the size before.
fn copy_out(out: *mut c_char, bytes: &[u8]) -> Result<(), i32> {
    if out.is_null() {
        return Err(nvrtc::INVALID_INPUT);
    }
    // SAFETY: the caller gives as much room as it was told is needed.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), out.cast(), bytes.len()) };
    Ok(())
}
