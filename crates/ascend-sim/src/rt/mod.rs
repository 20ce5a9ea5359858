//! The exported runtime functions, as thin as they can be: each says what it needs and asks the machine.

pub mod device;
pub mod event;
pub mod graph;
pub mod hccl;
pub mod memory;
pub mod stream;

use std::{ffi::c_void, time::Duration};

/// A timeout in milliseconds as the C ABI gives it; negative is for ever.
fn timeout(milliseconds: i32) -> Option<Duration> {
    u64::try_from(milliseconds).ok().map(Duration::from_millis)
}

/// The handle in a pointer.
fn handle(raw: *const c_void) -> u64 {
    raw as u64
}
