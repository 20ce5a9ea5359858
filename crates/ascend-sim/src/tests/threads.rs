//! Start, devices, contexts and threads.

use std::{ptr::null, thread};

use super::harness::*;

#[test]
pub fn a_call_before_init_is_refused() {
    let s = Session::new();
    lock().initialized = false;
    assert_eq!(i64::from(aclrtSetDevice(0)), ACL_ERROR_UNINITIALIZE);
    assert_eq!(i64::from(s.synchronize()), ACL_ERROR_UNINITIALIZE);
    assert_eq!((aclInit(null()), aclrtSetDevice(0)), (0, 0));
}

#[test]
pub fn a_second_init_is_told() {
    let _s = Session::new();
    assert_eq!(i64::from(aclInit(null())), ACL_ERROR_REPEAT_INITIALIZE);
    assert_eq!(aclFinalize(), 0);
    assert_eq!(i64::from(aclFinalize()), ACL_ERROR_REPEAT_FINALIZE);
    assert_eq!(aclInit(null()), 0);
}

#[test]
pub fn a_thread_without_a_device_is_told() {
    let s = Session::new();
    let stream = s.stream as usize;
    let calls = thread::spawn(move || {
        let mut address = std::ptr::null_mut();
        let before = [unsafe { aclrtMalloc(&mut address, 64, 0) }, aclrtSynchronizeStream(stream as Ptr)];
        aclrtSetDevice(0);
        (before, aclrtSynchronizeStream(stream as Ptr))
    });
    assert_eq!(calls.join().unwrap(), ([ACL_ERROR_RT_CONTEXT_NULL as i32; 2], 0));
}

#[test]
pub fn a_device_that_is_not_there_is_refused() {
    let _s = Session::new();
    for device in [-1, 2] {
        assert_eq!(i64::from(aclrtSetDevice(device)), ACL_ERROR_RT_INVALID_DEVICEID);
    }
    assert_eq!(aclrtSetDevice(1), 0);
}

#[test]
pub fn a_stream_of_another_context_and_a_destroyed_one_are_refused() {
    let s = Session::new();
    aclrtSetDevice(1);
    assert_eq!(i64::from(s.synchronize()), ACL_ERROR_RT_STREAM_CONTEXT);
    aclrtSetDevice(0);
    assert_eq!(aclrtDestroyStream(s.stream), 0);
    assert_eq!(i64::from(s.synchronize()), ACL_ERROR_RT_INVALID_HANDLE);
}

#[test]
pub fn an_error_text_is_of_its_thread_and_is_read_once() {
    let _s = Session::new();
    assert_eq!(message(), None);
    aclrtSetDevice(7);
    assert_eq!(thread::spawn(message).join().unwrap(), None);
    assert_eq!(message().unwrap(), "aclrtSetDevice: device 7: there are 2, counted from 0");
    assert_eq!(message(), None);
}

#[test]
fn a_device_is_released_by_as_many_resets_as_it_was_set() {
    let s = Session::new();
    aclrtSetDevice(0);
    assert_eq!((aclrtResetDevice(0), s.synchronize()), (0, 0));
    assert_eq!(aclrtResetDevice(0), 0);
    assert_eq!(i64::from(s.synchronize()), ACL_ERROR_RT_CONTEXT_NULL);
    assert!(report().contains("\"device_bytes\":0"));
}

#[test]
fn facts_follow_the_chip() {
    let _s = Session::new();
    let bf16 = || {
        let mut value = -1;
        assert_eq!(unsafe { aclGetCannAttribute(ACL_CANN_ATTR_BF16 as i32, &mut value) }, 0);
        value
    };
    assert_eq!(bf16(), 1);
    control("soc=Ascend310P3");
    assert_eq!(bf16(), 0);
    // SAFETY: the name ends in zero, and lives as long as the process.
    assert_eq!(unsafe { std::ffi::CStr::from_ptr(aclrtGetSocName()) }, c"Ascend310P3");
}
