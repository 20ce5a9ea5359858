//! The exported runtime functions, as thin as they can be: each says what it needs and asks the machine.

pub mod copy;
pub mod device;
pub mod event;
pub mod graph;
pub mod hccl;
pub mod memory;
pub mod stream;

use std::{ffi::c_void, time::Duration};

use crate::{array::Refusal, constants::ACL_ERROR_RT_PARAM_INVALID, machine::refusal};

/// A timeout in milliseconds as the C ABI gives it; negative is for ever.
fn timeout(milliseconds: i32) -> Option<Duration> {
    u64::try_from(milliseconds).ok().map(Duration::from_millis)
}

/// The handle in a pointer.
fn handle(raw: *const c_void) -> u64 {
    raw as u64
}

/// Refuses more bytes than there is room for.
fn room(room: usize, wanted: usize) -> Result<(), Refusal> {
    if room < wanted {
        return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "{wanted} bytes into room for {room}"));
    }
    Ok(())
}
