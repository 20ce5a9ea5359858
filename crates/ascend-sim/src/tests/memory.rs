//! Device memory, page-locked memory, copies.

use std::ptr::null_mut;

use super::harness::*;

const UP: i32 = ACL_MEMCPY_HOST_TO_DEVICE as i32;
const DOWN: i32 = ACL_MEMCPY_DEVICE_TO_HOST as i32;
const ACROSS: i32 = ACL_MEMCPY_DEVICE_TO_DEVICE as i32;

fn pinned(bytes: &[u8]) -> Ptr {
    let address = made(|out| unsafe { aclrtMallocHost(out, bytes.len()) });
    // SAFETY: the block has as many bytes, and is nobody else's.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address.cast(), bytes.len()) };
    address
}

#[test]
pub fn a_host_that_follows_a_device_pointer_crashes() {
    let s = Session::new();
    let address = s.upload(&[1; 64]);
    // SAFETY: the child only reads one byte and exits; it takes no lock and allocates nothing.
    let status = unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            std::hint::black_box(address.cast::<u8>().read_volatile());
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        status
    };
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "status {status}");
}

#[test]
pub fn a_range_past_the_end_poisons_the_context() {
    for past in [0, 4] {
        let s = Session::new();
        let (a, b) = (s.upload_floats(&[1.0; 8]), s.upload_floats(&[1.0; 8]));
        // The last view ends `past` bytes behind its block.
        let out = view(s.upload_floats(&[0.0; 8]), &[8], &[1], past / 4, &[8 + past / 4], ACL_FLOAT);
        assert_eq!(s.add(tensor(a, &[8], ACL_FLOAT), tensor(b, &[8], ACL_FLOAT), 1.0, out), 0);
        let expected = if past == 0 { 0 } else { ACL_ERROR_RT_AICORE_EXCEPTION };
        assert_eq!(i64::from(s.synchronize()), expected);
    }
    let s = Session::new();
    let host = tensor(Box::leak(Box::new([0.0_f32; 16])).as_mut_ptr().wrapping_byte_add(0).cast(), &[1], ACL_FLOAT);
    let out = tensor(s.upload_floats(&[0.0]), &[1], ACL_FLOAT);
    assert_eq!(s.add(host, out, 1.0, out), 0);
    assert_eq!(i64::from(s.synchronize()), ACL_ERROR_RT_AICORE_EXCEPTION, "host memory is no device memory");
}

#[test]
fn memory_of_another_device_is_out_of_range_without_peer_access() {
    let s = Session::new();
    aclrtSetDevice(1);
    let far = s.upload(&[9; 8]);
    aclrtSetDevice(0);
    let near = s.upload(&[0; 8]);
    assert_eq!(i64::from(aclrtMemcpy(near, 8, far, 8, ACROSS)), ACL_ERROR_RT_PARAM_INVALID);
    assert_eq!(aclrtDeviceEnablePeerAccess(1, 0), 0);
    assert_eq!(aclrtMemcpy(near, 8, far, 8, ACROSS), 0);
    assert_eq!(s.download(near, 8), [9; 8]);
}

#[test]
pub fn a_double_free_and_a_use_after_free_are_violations() {
    let s = Session::new();
    let address = s.upload(&[1; 8]);
    assert_eq!(aclrtFree(address), 0);
    assert_eq!(i64::from(aclrtFree(address)), ACL_ERROR_RT_PARAM_INVALID);
    s.assert_violation("aclrtFree");
    lock().counters = Default::default();
    let bytes = [0_u8; 8];
    assert_eq!(i64::from(aclrtMemcpy(address, 8, bytes.as_ptr().cast(), 8, UP)), ACL_ERROR_RT_PARAM_INVALID);
    s.assert_violation("use after free");
}

#[test]
pub fn zero_bytes_and_a_null_free_are_refused() {
    let _s = Session::new();
    let mut out = null_mut();
    assert_eq!(i64::from(unsafe { aclrtMalloc(&mut out, 0, 0) }), ACL_ERROR_RT_PARAM_INVALID);
    assert_eq!(i64::from(aclrtFree(null_mut())), ACL_ERROR_RT_PARAM_INVALID);
}

#[test]
pub fn new_memory_is_garbage() {
    let s = Session::new();
    let address = made(|out| unsafe { aclrtMalloc(out, 100, 0) });
    assert_eq!(address as usize % 64, 0);
    assert_eq!(s.download(address, 100), [0xA5; 100]);
}

#[test]
pub fn more_bytes_than_room_are_refused() {
    let s = Session::new();
    let (address, bytes) = (s.upload(&[0; 8]), [0_u8; 9]);
    let refused = ACL_ERROR_RT_PARAM_INVALID;
    assert_eq!(i64::from(aclrtMemcpy(address, 8, bytes.as_ptr().cast(), 9, UP)), refused);
    assert_eq!(i64::from(aclrtMemcpyAsync(address, 8, bytes.as_ptr().cast(), 9, UP, s.stream)), refused);
    assert_eq!(i64::from(aclrtMemset(address, 8, 0, 9)), refused);
    assert_eq!(i64::from(aclrtMemcpy2d(address, 2, bytes.as_ptr().cast(), 3, 3, 2, UP)), refused);
}

#[test]
fn a_kind_that_contradicts_the_addresses_is_refused() {
    let s = Session::new();
    let (address, bytes) = (s.upload(&[0; 8]), [0_u8; 8]);
    assert_eq!(i64::from(aclrtMemcpy(address, 8, bytes.as_ptr().cast(), 8, DOWN)), ACL_ERROR_RT_PARAM_INVALID);
    assert_eq!(aclrtMemcpy(address, 8, bytes.as_ptr().cast(), 8, ACL_MEMCPY_DEFAULT as i32), 0);
}

#[test]
pub fn pageable_memory_in_a_queued_copy_is_refused() {
    let s = Session::new();
    let (address, mut bytes) = (s.upload(&[0; 8]), [0_u8; 8]);
    let code = aclrtMemcpyAsync(address, 8, bytes.as_ptr().cast(), 8, UP, s.stream);
    assert_eq!(i64::from(code), ACL_ERROR_RT_INVALID_HANDLE);
    let code = aclrtMemcpyAsync(bytes.as_mut_ptr().cast(), 8, address, 8, DOWN, s.stream);
    assert_eq!(i64::from(code), ACL_ERROR_RT_INVALID_HANDLE);
    let [from, to] = [0; 2].map(|_| pinned(&[3; 8]));
    let code = aclrtMemcpyAsync(to, 8, from, 8, ACL_MEMCPY_HOST_TO_HOST as i32, s.stream);
    assert_eq!(i64::from(code), ACL_ERROR_RT_FEATURE_NOT_SUPPORT);
    assert_eq!(aclrtMemcpyAsync(address, 8, from, 8, UP, s.stream), 0);
    assert_eq!(s.download(address, 8), [0; 8], "a queued copy has not run yet");
    assert_eq!((s.synchronize(), s.download(address, 8)), (0, vec![3; 8]));
}

#[test]
fn a_queued_copy_reads_its_source_when_it_runs() {
    let s = Session::new();
    let (address, source) = (s.upload(&[0; 8]), pinned(&[3; 8]));
    assert_eq!(aclrtMemcpyAsync(address, 8, source, 8, UP, s.stream), 0);
    // SAFETY: the block has eight bytes, and no copy runs while this writes.
    unsafe { std::ptr::write_bytes(source.cast::<u8>(), 4, 8) };
    assert_eq!((s.synchronize(), s.download(address, 8)), (0, vec![4; 8]));
}

#[test]
pub fn a_blocking_copy_does_not_wait_for_streams() {
    let s = Session::new();
    let address = s.upload(&[0; 8]);
    assert_eq!(aclrtMemsetAsync(address, 8, 1, 8, s.stream), 0);
    assert_eq!(s.download(address, 8), [0; 8]);
    assert_eq!((s.synchronize(), s.download(address, 8)), (0, vec![1; 8]));
}

#[test]
pub fn a_free_of_memory_that_a_queued_task_needs_is_a_violation() {
    let s = Session::new();
    let address = s.upload(&[0; 8]);
    assert_eq!(aclrtMemsetAsync(address, 8, 1, 4, s.stream), 0);
    assert_eq!(aclrtFree(address), 0);
    s.assert_violation("a queued aclrtMemsetAsync uses the memory");
    assert_eq!(i64::from(s.synchronize()), ACL_ERROR_RT_AICORE_EXCEPTION);

    let s = {
        drop(s);
        Session::new()
    };
    let (address, source) = (s.upload(&[0; 8]), pinned(&[3; 8]));
    assert_eq!(aclrtMemcpyAsync(address, 8, source, 8, UP, s.stream), 0);
    assert_eq!(aclrtFreeHost(source), 0);
    s.assert_violation("a queued aclrtMemcpyAsync uses the memory");
}

#[test]
pub fn memory_ends_at_the_budget_and_comes_back_with_a_free() {
    let _s = Session::new();
    control("memory=4096");
    let info = || {
        let (mut free, mut total) = (0, 0);
        assert_eq!(unsafe { aclrtGetMemInfo(ACL_HBM_MEM as i32, &mut free, &mut total) }, 0);
        (free, total)
    };
    let mut out = null_mut();
    let code = unsafe { aclrtMalloc(&mut out, 4096, 0) };
    assert_eq!(i64::from(code), ACL_ERROR_RT_MEMORY_ALLOCATION, "32 bytes more than asked for are taken");
    assert_eq!(unsafe { aclrtMalloc(&mut out, 4064, 0) }, 0);
    assert_eq!(info(), (0, 4096));
    let mut second = null_mut();
    assert_eq!(i64::from(unsafe { aclrtMalloc(&mut second, 1, 0) }), ACL_ERROR_RT_MEMORY_ALLOCATION);
    assert_eq!((aclrtFree(out), info()), (0, (4096, 4096)));
    assert!(report().contains("\"peak_bytes\":[4096"));
}

#[test]
fn rows_are_copied_by_their_pitches() {
    let s = Session::new();
    let (address, rows) = (s.upload(&[0; 8]), [1_u8, 2, 3, 4, 5, 6]);
    assert_eq!(aclrtMemcpy2d(address, 4, rows.as_ptr().cast(), 3, 2, 2, UP), 0);
    assert_eq!(s.download(address, 8), [1, 2, 0, 0, 4, 5, 0, 0]);
}
