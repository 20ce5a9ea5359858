//! Memory, copies, and when they happen.

use super::harness::*;

#[test]
fn calls_without_a_context_are_refused() {
    let _session = Session::new();
    well(cuCtxSetCurrent(0));
    assert_eq!(cuMemAlloc_v2(&mut 0, 1), cuda::INVALID_CONTEXT);
    assert_eq!(cuStreamCreate(&mut 0, 0), cuda::INVALID_CONTEXT);
}

#[test]
fn memory_is_as_much_as_was_said_and_comes_back() {
    let session = Session::with("memory=1000000");
    let free = || {
        let (mut free, mut total) = (0, 0);
        well(cuMemGetInfo_v2(&mut free, &mut total));
        assert_eq!(total, 1_000_000);
        free
    };
    let block = session.alloc(600_000);
    assert_eq!(free(), 400_000);
    assert_eq!(cuMemAlloc_v2(&mut 0, 400_001), cuda::OUT_OF_MEMORY);
    well(cuMemFree_v2(block));
    assert_eq!(free(), 1_000_000);
    assert_eq!(cuMemFree_v2(block), cuda::INVALID_VALUE, "freed twice");
    assert_eq!((count("bytes.peak.0"), count("bytes.device")), (600_000, 0));
}

#[test]
fn copies_out_of_a_block_or_of_freed_memory_are_refused() {
    let session = Session::new();
    let block = session.alloc(100);
    let host = [0u8; 101];
    assert_eq!(cuMemcpyHtoD_v2(block, host.as_ptr() as u64, 101), cuda::INVALID_VALUE);
    assert_eq!(cuMemcpyHtoDAsync_v2(block + 100, host.as_ptr() as u64, 1, session.stream), cuda::INVALID_VALUE);
    assert_eq!(cuMemcpyHtoD_v2(block, block, 10), cuda::INVALID_VALUE, "a device address in place of the host's");
    well(cuMemFree_v2(block));
    assert_eq!(cuMemcpyHtoD_v2(block, host.as_ptr() as u64, 1), cuda::INVALID_VALUE);
}

#[test]
fn page_locked_memory_is_read_when_the_copy_runs_and_pageable_memory_at_the_call() {
    let session = Session::new();
    let (to, other) = (session.alloc(1), session.alloc(1));
    let pinned = made(|out| cuMemHostAlloc(out, 1, 0)) as *mut u8;
    let mut pageable = 1u8;
    // SAFETY: a byte of live page-locked memory.
    unsafe { pinned.write(1) };
    well(cuMemcpyHtoDAsync_v2(to, pinned as u64, 1, session.stream));
    well(cuMemcpyHtoDAsync_v2(other, &raw const pageable as u64, 1, session.stream));
    // SAFETY: as above.
    unsafe { pinned.write(2) };
    pageable *= 2;
    assert_eq!((session.download::<u8>(to, 1), session.download::<u8>(other, 1)), (vec![2], vec![1]));
    well(cuMemFreeHost(pinned as u64));
    assert_eq!((pageable, count("copied.host_to_device"), count("live.host_blocks")), (2, 2, 0));
}

#[test]
fn nothing_runs_before_somebody_waits() {
    let session = Session::new();
    let from = session.upload(&[7u8; 4]);
    let pinned = made(|out| cuMemHostAlloc(out, 4, 0));
    let held = || {
        // SAFETY: four bytes of live page-locked memory.
        unsafe { std::slice::from_raw_parts(pinned as *const u8, 4) }.to_vec()
    };
    well(cuMemcpyDtoHAsync_v2(pinned, from, 4, session.stream));
    assert_ne!(held(), [7; 4]);
    let event = made(|out| cuEventCreate(out, 2));
    well(cuEventRecord(event, session.stream));
    assert_eq!(cuEventQuery(event), cuda::NOT_READY);
    assert_eq!(held(), [7; 4], "a query lets the device do one task");
    assert_eq!(cuEventQuery(event), cuda::NOT_READY);
    well(cuEventQuery(event));
    well(cuMemFreeHost(pinned));
}

#[test]
fn a_blocking_copy_does_not_wait_for_a_stream_that_is_not_blocking() {
    let session = Session::new();
    let block = session.upload(&[1u8]);
    let mut host = 0u8;
    well(cuMemsetD8Async(block, 5, 1, session.stream));
    well(cuMemcpyDtoH_v2(&raw mut host as u64, block, 1));
    assert_eq!(host, 1);
    let blocking = made(|out| cuStreamCreate(out, 0));
    well(cuMemsetD8Async(block, 6, 1, blocking));
    well(cuMemcpyDtoH_v2(&raw mut host as u64, block, 1));
    assert_eq!(host, 6);
}

#[test]
fn a_stream_waits_for_an_event_of_another() {
    let session = Session::new();
    let other = made(|out| cuStreamCreate(out, flag::STREAM_NON_BLOCKING));
    let block = session.upload(&[0u32; 2]);
    let event = made(|out| cuEventCreate(out, 0));
    well(cuMemsetD32Async(block, 3, 1, other));
    well(cuEventRecord(event, other));
    well(cuStreamWaitEvent(session.stream, event, 0));
    well(cuMemcpyDtoDAsync_v2(block + 4, block, 4, session.stream));
    assert_eq!(session.download::<u32>(block, 2), [3, 3]);
    well(cuStreamDestroy_v2(other));
    assert_eq!(cuStreamSynchronize(other), cuda::INVALID_HANDLE);
}

#[test]
fn memory_that_is_freed_is_an_illegal_address_to_what_was_queued() {
    if !can_compile() {
        return;
    }
    let session = Session::new();
    let kernel = session.kernel("__global__ void write(int* at) { *at = 1; }", "write");
    let block = session.alloc(4);
    well(cuMemFree_v2(block));
    well(session.launch(kernel, 1, 1, 0, &[&block]));
    assert_eq!(session.synchronize(), cuda::ILLEGAL_ADDRESS);
}

#[test]
fn the_host_cannot_touch_device_memory() {
    let session = Session::new();
    let block = session.upload(&[1u8; 4]);
    well(session.synchronize());
    // SAFETY: a system call looks at the address; it does not follow it where that would be a fault.
    let readable = unsafe {
        let mut ends = [0; 2];
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        let written = libc::write(ends[1], block as *const _, 4);
        ends.iter().for_each(|&end| assert_eq!(libc::close(end), 0));
        written
    };
    assert_eq!(readable, -1);
}
