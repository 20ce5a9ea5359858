//! What the driver's codes call for: whether the context is broken, the device is gone, or one call failed.

use std::ffi::{CStr, c_char};

use cudarc::driver::sys::{self, CUresult};

/// What a failed call leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// No room.
    Memory,
    /// The context takes no more calls: errors of a running kernel are sticky.
    Poisoned,
    /// The device does not come back without help from outside.
    Lost,
    /// This call alone.
    Call,
}

/// The class of a code.
pub(crate) fn class(code: CUresult) -> Class {
    use CUresult::*;
    match code {
        CUDA_ERROR_OUT_OF_MEMORY => Class::Memory,
        CUDA_ERROR_ILLEGAL_ADDRESS
        | CUDA_ERROR_LAUNCH_TIMEOUT
        | CUDA_ERROR_CONTEXT_IS_DESTROYED
        | CUDA_ERROR_ASSERT
        | CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUDA_ERROR_MISALIGNED_ADDRESS
        | CUDA_ERROR_INVALID_ADDRESS_SPACE
        | CUDA_ERROR_INVALID_PC
        | CUDA_ERROR_LAUNCH_FAILED
        | CUDA_ERROR_EXTERNAL_DEVICE
        | CUDA_ERROR_TENSOR_MEMORY_LEAK
        | CUDA_ERROR_UNKNOWN => Class::Poisoned,
        CUDA_ERROR_DEINITIALIZED
        | CUDA_ERROR_DEVICE_UNAVAILABLE
        | CUDA_ERROR_NO_DEVICE
        | CUDA_ERROR_INVALID_DEVICE
        | CUDA_ERROR_ECC_UNCORRECTABLE
        | CUDA_ERROR_NVLINK_UNCORRECTABLE
        | CUDA_ERROR_CONTAINED
        | CUDA_ERROR_MPS_CONNECTION_FAILED
        | CUDA_ERROR_MPS_RPC_FAILURE
        | CUDA_ERROR_MPS_CLIENT_TERMINATED
        | CUDA_ERROR_SYSTEM_NOT_READY => Class::Lost,
        _ => Class::Call,
    }
}

/// The driver's name of a code and its words for it; its number where the driver does not know it either. A newer driver has
/// codes that the binding's type has no name for.
pub(crate) fn describe(code: CUresult) -> String {
    let text = |ask: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: a valid out pointer; the driver's texts live for ever.
        unsafe {
            let known = ask(code, &raw mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
            known.then(|| CStr::from_ptr(text).to_string_lossy())
        }
    };
    match (text(sys::cuGetErrorName), text(sys::cuGetErrorString)) {
        (Some(name), Some(words)) => format!("{name} ({words})"),
        _ => format!("code {}", code as u32),
    }
}
