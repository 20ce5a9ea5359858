//! Ranks on threads of their own.

use std::{ptr::null_mut, sync::Arc, thread};

use super::harness::*;

/// Runs `body` with (rank, communicator, stream) on a thread per rank, one device each; what each gave.
fn ranks<T: Send + 'static>(count: u32, body: impl Fn(u32, Ptr, Ptr) -> T + Send + Sync + 'static) -> Vec<T> {
    let mut root = [0_u8; 4108];
    assert_eq!(unsafe { HcclGetRootInfo(root.as_mut_ptr().cast()) }, 0);
    let body = Arc::new(body);
    let start = |rank| {
        let body = body.clone();
        thread::spawn(move || {
            assert_eq!(aclrtSetDevice(rank as i32), 0);
            let stream = made(|out| unsafe { aclrtCreateStream(out) });
            let communicator = made(|out| unsafe { HcclCommInitRootInfo(count, root.as_ptr().cast(), rank, out) });
            let given = body(rank, communicator, stream);
            assert_eq!(HcclCommDestroy(communicator), 0);
            given
        })
    };
    let threads: Vec<_> = (0..count).map(start).collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

fn upload(values: &[f32]) -> Ptr {
    let bytes = values.len() * 4;
    let address = made(|out| unsafe { aclrtMalloc(out, bytes, 0) });
    let code = aclrtMemcpy(address, bytes, values.as_ptr().cast(), bytes, ACL_MEMCPY_HOST_TO_DEVICE as i32);
    assert_eq!(code, 0);
    address
}

fn download(address: Ptr, len: usize) -> Vec<f32> {
    let mut values = vec![0.0_f32; len];
    let to = values.as_mut_ptr().cast();
    assert_eq!(aclrtMemcpy(to, len * 4, address, len * 4, ACL_MEMCPY_DEVICE_TO_HOST as i32), 0);
    values
}

const F32: i32 = HCCL_DATA_TYPE_FP32 as i32;
const SUM: i32 = HCCL_REDUCE_SUM as i32;

#[test]
fn every_rank_has_the_sum_also_in_place_and_many_times() {
    let s = Session::new();
    control("devices=4");
    let sums = ranks(4, |rank, communicator, stream| {
        let buffer = upload(&[rank as f32, 1.0]);
        for _ in 0..3 {
            assert_eq!(HcclAllReduce(buffer, buffer, 2, F32, SUM, communicator, stream), 0);
        }
        assert_eq!(aclrtSynchronizeStream(stream), 0, "{:?}", message());
        download(buffer, 2)
    });
    assert_eq!(sums, vec![vec![96.0, 64.0]; 4]);
    assert!(s.violations().is_empty());
}

#[test]
fn gather_scatter_broadcast_messages_and_barriers_do_what_they_say() {
    let _s = Session::new();
    let results = ranks(2, |rank, communicator, stream| {
        let (own, all, part) = (upload(&[rank as f32 + 1.0]), upload(&[0.0; 2]), upload(&[0.0]));
        let told = upload(&[rank as f32]);
        assert_eq!(HcclAllGather(own, all, 1, F32, communicator, stream), 0);
        assert_eq!(HcclReduceScatter(all, part, 1, F32, SUM, communicator, stream), 0);
        assert_eq!(HcclBroadcast(told, 1, F32, 1, communicator, stream), 0);
        assert_eq!(HcclBarrier(communicator, stream), 0);
        let message = if rank == 0 {
            HcclSend(own, 1, F32, 1, communicator, stream)
        } else {
            HcclRecv(own, 1, F32, 0, communicator, stream)
        };
        assert_eq!(message, 0);
        assert_eq!(aclrtSynchronizeStream(stream), 0);
        [download(all, 2), download(part, 1), download(told, 1), download(own, 1)].concat()
    });
    assert_eq!(results, [[1.0, 2.0, 2.0, 1.0, 1.0], [1.0, 2.0, 4.0, 1.0, 1.0]]);
}

#[test]
fn ranks_that_ask_for_different_things_all_fail() {
    let s = Session::new();
    let results = ranks(2, |rank, communicator, stream| {
        let buffer = upload(&[0.0; 4]);
        assert_eq!(HcclAllReduce(buffer, buffer, 2 + u64::from(rank), F32, SUM, communicator, stream), 0);
        let code = aclrtSynchronizeStream(stream);
        let mut error = 0;
        unsafe { HcclGetCommAsyncError(communicator, &mut error) };
        (i64::from(code), i64::from(error))
    });
    assert_eq!(results, [(ACL_ERROR_RT_AICORE_EXCEPTION, HCCL_E_PARA); 2]);
    s.assert_violation("rank 1 asks for");
}

#[test]
fn a_rank_that_waits_for_one_that_does_not_come_gives_up() {
    let _s = Session::new();
    control("collective_timeout=200");
    let results = ranks(2, |rank, communicator, stream| {
        if rank == 1 {
            return (0, 0);
        }
        let buffer = upload(&[0.0; 4]);
        assert_eq!(HcclAllReduce(buffer, buffer, 4, F32, SUM, communicator, stream), 0);
        let code = aclrtSynchronizeStream(stream);
        let mut error = 0;
        unsafe { HcclGetCommAsyncError(communicator, &mut error) };
        (i64::from(code), i64::from(error))
    });
    assert_eq!(results, [(ACL_ERROR_RT_TASK_TIMEOUT, HCCL_E_TIMEOUT), (0, 0)]);
}

#[test]
fn a_group_is_whole_or_is_not_made() {
    let _s = Session::new();
    control("collective_timeout=20");
    let mut root = [0_u8; 4108];
    assert_eq!(unsafe { HcclGetRootInfo(root.as_mut_ptr().cast()) }, 0);
    let mut out = null_mut();
    let mut join =
        |count, rank| i64::from(unsafe { HcclCommInitRootInfo(count, root.as_ptr().cast(), rank, &mut out) });
    assert_eq!(join(2, 2), HCCL_E_PARA);
    assert_eq!(join(2, 0), HCCL_E_TIMEOUT);
    assert_eq!(join(3, 0), HCCL_E_PARA, "the others said two");
}

#[test]
fn one_thread_makes_all_communicators_of_its_devices() {
    let s = Session::new();
    aclrtSetDevice(1);
    let second = made(|out| unsafe { aclrtCreateStream(out) });
    let (far, mut communicators) = (upload(&[2.0]), [null_mut(); 2]);
    aclrtSetDevice(0);
    let near = upload(&[1.0]);
    assert_eq!(unsafe { HcclCommInitAll(2, [0, 1].as_ptr(), communicators.as_mut_ptr()) }, 0, "{:?}", message());
    assert_eq!(HcclAllReduce(near, near, 1, F32, SUM, communicators[0], s.stream), 0);
    aclrtSetDevice(1);
    assert_eq!(HcclAllReduce(far, far, 1, F32, SUM, communicators[1], second), 0);
    assert_eq!((aclrtSynchronizeStream(second), download(far, 1)), (0, vec![3.0]));
    aclrtSetDevice(0);
    assert_eq!((s.synchronize(), download(near, 1)), (0, vec![3.0]));
}
